"""The optimizer: SGD or AdamW, fused into one pass over the parameters, and its groups of parameters."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from engine.common import optional
from engine.common.lookup import look_up
from engine.config import RunConfig
from engine.config.optimizers import OPTIMIZERS
from engine.models.depth import depths
from engine.training.weights.half_weights import HalfWeights
from engine.training.weights.sgd import HalfSGD

Groups = list[dict[str, Any]]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_LAYERS = (nn.Linear, _ConvNd)


@dataclass(frozen=True)
class Implementation:
    """An optimizer of a library.

    make: of groups of parameters and the keys that it alone has. averages: names of what its state keeps of each
    parameter, in its shape. counts: names of numbers beside them.
    """

    make: Callable[[Groups, dict[str, Any]], torch.optim.Optimizer]
    averages: tuple[str, ...]
    counts: tuple[str, ...] = ()


def build(network: nn.Module, config: RunConfig, halves: HalfWeights | None = None) -> torch.optim.Optimizer:
    """The optimizer of `optim.implementation` for the parameters of a network, in the groups of `groups`.

    halves: copies that it writes, too, see `half_weights.build`.
    Raises ValueError where apex is wanted and is not there, or PyPI's unrelated package of that name is.
    """
    name = config.optim.implementation
    implementation = look_up("optim.implementation", name, IMPLEMENTATIONS)
    keys = {key: getattr(config.optim, key) for key in OPTIMIZERS[name].keys}
    if halves is not None:
        return HalfSGD(groups(network, config), halves, **keys)
    return implementation.make(groups(network, config), keys)


def groups(network: nn.Module, config: RunConfig) -> Groups:
    """The parameters by weight decay and by the factor of their learning rate, `lr_scale`, in the network's order.

    `lr_scale` is layer_decay^(L - l) at depth l of 0..L, see `depths`.
    """
    optim = config.optim
    decays_all = optim.decay_norms_and_biases
    if decays_all is None:
        decays_all = look_up("optim.implementation", optim.implementation, OPTIMIZERS).decays_all
    spared = set() if decays_all else set(undecayed(network))
    depth = depths(network) if optim.layer_decay != 1 else {}
    deepest = max(depth.values(), default=0)
    found: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        scale = optim.layer_decay ** (deepest - depth.get(name, 0))
        decay = 0.0 if name in spared else optim.weight_decay
        group = {"params": [], "lr": config.lr * scale, "lr_scale": scale, "weight_decay": decay}
        found.setdefault((scale, decay), group)["params"].append(parameter)
    return list(found.values())


def undecayed(network: nn.Module) -> Iterator[str]:
    """Names of norms, biases and other vectors, and of embeddings of tokens, positions and classes.

    A parameter that is added to a whole batch, of shape (1, ...), is one of the last; so is what a network of timm
    names in `no_weight_decay()`.
    """
    for prefix, module in network.named_modules():
        named = module.no_weight_decay() if callable(getattr(module, "no_weight_decay", None)) else ()
        yield from (f"{prefix}.{name}".lstrip(".") for name in named)
        for name, parameter in module.named_parameters(recurse=False):
            is_vector = sum(size > 1 for size in parameter.shape) <= 1
            is_embedding = isinstance(module, nn.Embedding) or parameter.shape[:1] == (1,)
            is_weight = isinstance(module, _LAYERS) and parameter.dim() > 1
            if "bias" in name or isinstance(module, _NORMS) or (not is_weight and (is_vector or is_embedding)):
                yield f"{prefix}.{name}".lstrip(".")


def state_dict(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> dict[str, Any]:
    """State for a checkpoint, with the rate of each group as a number."""
    state = optimizer.state_dict()
    groups = [group | {"lr": rate} for group, rate in zip(state["param_groups"], rates, strict=True)]
    return {**state, "param_groups": groups}


def begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Let SGD's momentum begin at 0: torch leaves it unwritten where a scaler skips the first step."""
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Parameters in the order by which the optimizer's state dict counts them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def expected_state(parameter: Tensor, config: RunConfig) -> dict[str, Tensor]:
    """Tensors on the meta device, as the optimizer keeps them of a parameter."""
    implementation = look_up("optim.implementation", config.optim.implementation, IMPLEMENTATIONS)
    number = torch.empty((), dtype=torch.float32, device="meta")
    like = torch.empty_like(parameter, device="meta")
    return dict.fromkeys(implementation.counts, number) | dict.fromkeys(implementation.averages, like)


def _torch(groups: Groups, keys: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, **keys, fused=True)


def _apex(groups: Groups, keys: dict[str, Any]) -> torch.optim.Optimizer:
    check_apex()
    made: torch.optim.Optimizer = importlib.import_module("apex.optimizers").FusedSGD(groups, **keys)
    return made


def _adamw(groups: Groups, keys: dict[str, Any]) -> torch.optim.Optimizer:
    on_gpu = groups[0]["params"][0].is_cuda  # as a captured step needs it; fused it is the same anyway
    return torch.optim.AdamW(groups, **keys, fused=True, capturable=on_gpu)


IMPLEMENTATIONS = {
    "torch": Implementation(_torch, ("momentum_buffer",)),
    "apex": Implementation(_apex, ("momentum_buffer",)),
    "adamw": Implementation(_adamw, ("exp_avg", "exp_avg_sq"), ("step",)),
}


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
