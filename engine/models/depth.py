"""Depth of parameters in a network, counted in layers from the images to the logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from engine.common import optional

_SEQUENCES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def depths(network: nn.Module) -> dict[str, int]:
    """The layer that each parameter is of, by its name: 0 for the stem, the largest number for the head.

    A network of timm tells its layers by `group_matcher`. In others a layer is an element of a sequence, or a part
    of the network that is none, in the order in which they were made. A norm belongs to the layer before it, and
    what belongs to no layer, as an embedding of positions, to the stem.
    """
    names = [name for name, _ in network.named_parameters()]
    for prefix, module in network.named_modules():
        if (matcher := getattr(module, "group_matcher", None)) is not None:
            told = {_joined(prefix, name): layer for name, layer in _told_by_timm(module, matcher).items()}
            return {name: told.get(name, 0) for name in names}
    found = dict.fromkeys(names, 0)
    layer = -1
    for prefix, part in _parts(network, most=_size(network) / 2):
        if layer < 0 or any(weight.dim() > 1 for weight in part.parameters()):
            layer += 1
        found |= {name: layer for name, _ in part.named_parameters(prefix) if name in found}
    return found


def _told_by_timm(module: nn.Module, matcher: Any) -> dict[str, int]:
    missing = "optim.layer_decay: the layers of this network are told by timm, which cannot be imported: {reason}"
    timm = optional.load("timm.models", missing=missing)
    told: dict[str, int] = timm.group_parameters(module, matcher(coarse=False), reverse=True)
    return told


def _parts(module: nn.Module, most: float, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers and norms of a module, by their names. What has more than `most` weights is no single layer."""
    for name, child in module.named_children():
        is_element = isinstance(module, _SEQUENCES)
        is_large = _size(child) > most and any(True for _ in child.children()) and not is_element
        if isinstance(child, _SEQUENCES) or is_large:
            yield from _parts(child, most, _joined(prefix, name))
        elif _size(child):
            yield _joined(prefix, name), child


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
