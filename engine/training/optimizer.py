"""The optimizer: SGD, fused into one pass over the parameters."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from engine.common import optional
from engine.common.lookup import look_up
from engine.config import RunConfig


def sgd(parameters: Iterable[nn.Parameter], config: RunConfig) -> torch.optim.Optimizer:
    """SGD with momentum and weight decay (Section 5), of torch or of NVIDIA's apex as `optim.implementation` says.

    Raises ValueError where apex is wanted and is not there, or PyPI's unrelated package of that name is.
    """
    optim = config.optim
    keys = {
        "lr": config.lr,
        "momentum": optim.momentum,
        "nesterov": optim.nesterov,
        "weight_decay": optim.weight_decay,
    }
    return look_up("optim.implementation", optim.implementation, IMPLEMENTATIONS)(parameters, keys)


def _torch(parameters: Iterable[nn.Parameter], keys: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, **keys, fused=True)


def _apex(parameters: Iterable[nn.Parameter], keys: dict[str, Any]) -> torch.optim.Optimizer:
    check_apex()
    optimizer: torch.optim.Optimizer = importlib.import_module("apex.optimizers").FusedSGD(parameters, **keys)
    return optimizer


IMPLEMENTATIONS = {"torch": _torch, "apex": _apex}


def check_apex() -> None:
    """Raise ValueError, one line, where apex.optimizers.FusedSGD cannot be used."""
    how = "build it from source, see https://github.com/NVIDIA/apex; or drop --optimizer apex"
    apex = optional.load("apex", missing=f"--optimizer apex: NVIDIA's apex is not installed; {how}")
    try:
        importlib.import_module("apex.optimizers").FusedSGD  # noqa: B018  # whether it is there
    except (ImportError, AttributeError):
        where = getattr(apex, "__file__", None) or "an empty folder"
        raise ValueError(
            f"--optimizer apex: {where} is not NVIDIA's apex, but PyPI's unrelated package of that name; {how}"
        ) from None
    if not torch.cuda.is_available():
        raise ValueError("--optimizer apex: FusedSGD needs a CUDA GPU")
