"""Checks of an attack on a batch: the gradients that it took, and that its images stay in the ball. B batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.attacks.masking import MOST_ZEROS
from engine.attacks.pgd import NORMS

SLACK = 1e-6
"""Distance from the ball or from [0, 1] that rounding alone may cause."""


class GradientCounts:
    """Counts, on the device, entries of the gradients with respect to what the model is given.

    signed_B: entries that have a sign, neither zero nor NaN, of each image of the batch; per_image: of how many.
    passes: their number, which on_pass is called with after each; the device is not waited for.
    """

    def __init__(
        self, size: int, device: torch.device, on_pass: Callable[[int], object] = lambda passes: None
    ) -> None:
        self.entries = self.per_image = self.passes = 0
        self._on_pass = on_pass
        self.zeros, self.not_finite = torch.zeros(2, dtype=torch.int64, device=device)
        self.signed_B = torch.zeros(size, dtype=torch.float64, device=device)

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Gradients of passes inside count."""
        watching = model.register_forward_pre_hook(self._watch)
        try:
            yield
        finally:
            watching.remove()

    def _watch(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and inputs[0].requires_grad:
            inputs[0].register_hook(self._count)

    def _count(self, gradient: Tensor) -> None:
        self.passes += 1
        self._on_pass(self.passes)
        self.entries += gradient.numel()
        self.zeros += gradient.numel() - torch.count_nonzero(gradient)
        self.not_finite += torch.count_nonzero(gradient - gradient)  # NaN where an entry is not finite
        if len(gradient) == len(self.signed_B):  # some attacks' passes are of those images that are left
            self.per_image += gradient[0].numel()  # the sign of NaN is 0 in torch
            self.signed_B += gradient.sign().abs_().sum(dim=tuple(range(1, gradient.dim())), dtype=torch.float32)

    def hidden_B(self) -> Tensor:
        """True for images most of whose gradient entries were zero or NaN."""
        return (self.per_image - self.signed_B) * len(self.signed_B) > MOST_ZEROS * self.entries


def excess_of(x_adv: Tensor, x_nat: Tensor, epsilon: float, threat_model: str) -> Tensor:
    """max(|x_adv - x_nat| - epsilon, distance to [0, 1]) over the batch; NaN where a pixel is."""
    distance_B = torch.linalg.vector_norm((x_adv - x_nat).flatten(1), NORMS[threat_model].order, dim=1)
    outside = (x_adv - x_adv.clamp(0, 1)).abs().amax()
    return torch.maximum(distance_B.amax() - epsilon, outside)
