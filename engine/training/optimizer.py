"""The optimizer: SGD or AdamW, fused into one pass over the parameters, and its groups of parameters."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
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

Groups = list[dict[str, Any]]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_LAYERS = (nn.Linear, _ConvNd)
_OF_TORCH = (torch.optim.SGD, torch.optim.AdamW)


@dataclass(frozen=True)
class Implementation:
    """An optimizer of a library.

    make: of groups of parameters and the keys that it alone has. averages: names of what its state keeps of each
    parameter, in its shape. counts: names of numbers beside them.
    """

    make: Callable[[Groups, dict[str, Any]], torch.optim.Optimizer]
    averages: tuple[str, ...]
    counts: tuple[str, ...] = ()


def build(network: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer of `optim.implementation` for the parameters of a network, in the groups of `groups`.

    Raises ValueError where apex is wanted and is not there, or PyPI's unrelated package of that name is.
    """
    name = config.optim.implementation
    implementation = look_up("optim.implementation", name, IMPLEMENTATIONS)
    keys = {key: getattr(config.optim, key) for key in OPTIMIZERS[name].keys}
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


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Learn with that rate from now on, each group with its part of it."""
    for group in optimizer.param_groups:
        number = lr * group["lr_scale"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(number)
            group["lr_number"] = number
        else:
            group["lr"] = number


def rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate of `set_rate`."""
    group = optimizer.param_groups[0]
    return float(_number(group) / group["lr_scale"])


def put_rate_on_device(optimizer: torch.optim.Optimizer) -> None:
    """Keep each group's rate in a float32 tensor beside its parameters, which `set_rate` fills in place.

    A captured update then reads the rate of its replay; `rate` and `state_dict` read numbers of the host, without
    a wait. The optimizer's `load_state_dict` brings numbers back: call this again then, and capture again.
    Raises ValueError for an optimizer that is not torch's.
    """
    if type(optimizer) not in _OF_TORCH:
        known = ", ".join(made.__name__ for made in _OF_TORCH)
        raise ValueError(f"optimizer: {type(optimizer).__name__} takes no tensor for its rate; known are {known}")
    for group in optimizer.param_groups:
        device = group["params"][0].device
        if not isinstance(group["lr"], Tensor):
            group["lr_number"] = group["lr"]
            group["lr"] = torch.full((), group["lr"], dtype=torch.float32, device=device)
        if "capturable" in group:  # of AdamW, whose counts of steps the fused update has on the device
            group["capturable"] = device.type == "cuda"


def state_dict(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's own, with rates as numbers wherever they are kept."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = _number(group)
        group.pop("lr_number", None)
    return state


def _number(group: dict[str, Any]) -> float:
    number: float = group.get("lr_number", group["lr"])
    return number


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
    return torch.optim.AdamW(groups, **keys, fused=True)


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
