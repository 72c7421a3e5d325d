"""Adversarial weight perturbation (Wu et al., 2020): the loss is lowered where the weights are worst, nearby."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from engine.config import RunConfig, epochs_of
from engine.models.layers import running_statistics_stay
from engine.system.distributed import World


def is_active(config: RunConfig, epoch: int) -> bool:
    """True if the weights are attacked in that epoch, counted from 0."""
    return config.awp.gamma > 0 and epoch >= epochs_of(config.awp.start, config.epochs)


@contextmanager
def perturbed(student: nn.Module, loss: Callable[[], Tensor], gamma: float, world: World) -> Iterator[None]:
    """Weights inside are w + gamma * |w| / |g| * g, layer by layer; afterwards they are as before, to the bit.

    loss: computes that of this process's part of the batch; g is the gradient of its sum over all processes, and
    the loss may be scaled. Weights whose gradient is not finite, as a gradient scaler's may be, stay.
    Running statistics do not move in it. Vectors, as biases and the weights of BatchNorm, stay (Eq. 9 and the
    published code).
    """
    weights: list[Tensor] = [weight for weight in student.parameters() if weight.dim() > 1]
    with record_function("weight attack"), running_statistics_stay(student):
        value = loss()
        before = [weight.detach().clone() for weight in weights]
        _ascend(weights, value, gamma, world)
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
            norm = gradient.norm()
            step = gamma * weight.norm() / (norm + 1e-12) * gradient
            weight += torch.where(norm.isfinite(), step, 0)
