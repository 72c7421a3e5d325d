"""Adversarial weight perturbation (Wu et al., 2020): the loss is lowered where the weights are worst, nearby."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engine.system.distributed import World


@contextmanager
def perturbed(student: nn.Module, loss: Tensor, gamma: float, world: World) -> Iterator[None]:
    """Weights inside are w + gamma * |w| / |g| * g, layer by layer; afterwards they are as before, to the bit.

    loss: of this process's part of the batch, a sum over which is the loss of all; g is the gradient of that.
    Vectors, as biases and the weights of BatchNorm, stay (Eq. 9 and the published code).
    """
    weights: list[Tensor] = [weight for weight in student.parameters() if weight.dim() > 1]
    before = [weight.detach().clone() for weight in weights]
    _ascend(weights, loss, gamma, world)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, before)


def _ascend(weights: Sequence[Tensor], loss: Tensor, gamma: float, world: World) -> None:
    gradients = list(torch.autograd.grad(loss, weights))
    world.sum_in_place(gradients)
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight += gamma * weight.norm() / (gradient.norm() + 1e-12) * gradient
