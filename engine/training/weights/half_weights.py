"""Copies of weights in half precision, which the optimizer writes with the weights themselves.

Autocast would convert each weight in every step, and each of their gradients; a twin of the student would convert
them once more. The copies take their place: the student is trained on them, its twin shares them, and their
gradients go to the optimizer as they are.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from engine.attacks.twin import runs_in_half, traced
from engine.common.lookup import look_up
from engine.config import RunConfig
from engine.config.optimizers import OPTIMIZERS
from engine.models.layers import has_hooks
from engine.system.precision import Precision


class _Copied(NamedTuple):
    """A weight, its module and its name there, and its copy."""

    module: nn.Module
    name: str
    weight: nn.Parameter
    half: nn.Parameter


class HalfWeights:
    """The weights of a network that its passes under autocast read in half precision alone, each with a copy.

    of: copies by weight. The weights may have gradients in half precision from now on.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        self._copied = [
            _Copied(module, name, weight, nn.Parameter(weight.detach().to(dtype), weight.requires_grad))
            for module, name, weight in _converted(network)
        ]
        for one in self._copied:
            one.weight.grad_dtype = None  # any
        self.of: Mapping[Tensor, Tensor] = {one.weight: one.half for one in self._copied}
        self.note()

    def note(self) -> None:
        """Know that each copy is its weight now."""
        self._seen = self._now()

    @torch.no_grad()
    def follow(self) -> None:
        """Copy again the weights that something but `note`'s caller has written, as the loading of a state does.

        What writes through `weight.data` in place is not seen: torch does not count it.
        """
        now = self._now()
        if now != self._seen:
            changed = [one for one, seen, is_ in zip(self._copied, self._seen, now, strict=True) if seen != is_]
            torch._foreach_copy_([one.half for one in changed], [one.weight for one in changed])
            self.note()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network reads the copies inside; afterwards the weights have the gradients of the copies."""
        for one in self._copied:
            one.half.requires_grad_(one.weight.requires_grad)
            one.module._parameters[one.name] = one.half
        try:
            yield
            for one in self._copied:
                if one.half.grad is not None:
                    one.weight.grad = one.half.grad
        finally:
            for one in self._copied:
                one.module._parameters[one.name] = one.weight
                one.half.grad = None

    def _now(self) -> list[tuple[int, int]]:
        return [(one.weight.data_ptr(), one.weight._version) for one in self._copied]


def build(student: nn.Module, config: RunConfig, precision: Precision, replicas: int) -> HalfWeights | None:
    """The copies of a student that is trained so, None where autocast converts its weights.

    It does with an optimizer that knows no copies; where gradients are clipped, or summed over micro-batches;
    where the weights are attacked; where activations are computed again; and where there are several `replicas`,
    whose gradients are averaged in each backward.
    """
    optimizer = look_up("optim.implementation", config.optim.implementation, OPTIMIZERS)
    if (
        precision.amp_dtype is None
        or not optimizer.writes_halves
        or config.optim.clip_norm is not None
        or config.micro_batch is not None
        or config.awp.gamma > 0
        or config.checkpoint_activations
        or replicas > 1
    ):
        return None
    found = HalfWeights(student, precision.amp_dtype)
    return found if found.of else None


def _converted(network: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Module, name and parameter of what one layer alone reads, and autocast converts.

    A network may read a weight itself, to normalise it say: that one is none of them. Where no tracer sees the
    network, nothing is.
    """
    nodes = _operations(network)
    if nodes is None:
        return []
    read = {str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr"}
    modules = list(network.named_modules())
    count = Counter(
        weight for _, module in modules for weight in module._parameters.values() if weight is not None
    )
    return [
        (module, name, weight)
        for path, module in modules
        if runs_in_half(module) and path not in read and not has_hooks(module) and "weight" in module._parameters
        for name, weight in module._parameters.items()
        if weight is not None and count[weight] == 1
    ]


def _operations(network: nn.Module) -> list[fx.Node] | None:
    """As `traced`, of a copy: a forward may keep what it is given, and so what traces it."""
    try:
        own = copy.deepcopy(network)
    except Exception:  # modules of anybody may hold what cannot be copied
        return None
    return traced(own)
