"""The two moves of a projected-gradient attack: the random start and the step (Eq. 2).

Shape suffixes: B batch; an image may have any shape after it. L2 norms are taken per sample.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.kernels.philox import Stream, normal, uniform


def random_start(
    x_nat: Tensor,
    sample_B: Tensor,
    *,
    kind: str,
    threat_model: str,
    epsilon: float,
    gaussian_std: float = 0.001,
    seed: int,
    counter: int,
) -> Tensor:
    """Initial perturbation, of the shape, dtype and strides of x_nat, not clamped to the range of images.

    kind "uniform": uniform in the L-inf ball, or in the L2 ball a uniform direction with a uniform radius.
    kind "gaussian": gaussian_std * N(0, 1), as TRADES starts. kind "none": zero.
    Numbers depend on (seed, counter, sample) alone: not on the batch, the device or the process.
    """
    if kind == "none":
        return torch.zeros_like(x_nat)
    # Numbers run over an image in (C, H, W) order whatever its strides, so that both layouts start alike.
    count = math.prod(x_nat.shape[1:])
    if kind == "uniform" and threat_model == "Linf":
        noise_BN = epsilon * (2 * uniform(seed, Stream.ATTACK_START, counter, sample_B, count) - 1)
    else:
        noise_BN = normal(seed, Stream.ATTACK_START, counter, sample_B, count)
        if kind == "gaussian":
            noise_BN = gaussian_std * noise_BN
        else:
            radius_B1 = uniform(seed, Stream.ATTACK_SCALE, counter, sample_B, 1)
            noise_BN = epsilon * radius_B1 * noise_BN / noise_BN.norm(dim=1, keepdim=True)
    return torch.empty_like(x_nat).copy_(noise_BN.view(x_nat.shape))


def pgd_update(
    x_adv: Tensor, grad: Tensor, x_nat: Tensor, *, threat_model: str, epsilon: float, step_size: float
) -> Tensor:
    """One ascent step, projected onto the ball around x_nat and onto [0, 1].

    L-inf: clamp(project(x_adv + step_size * sign(grad))). L2: the gradient is divided by its norm instead.
    A sample whose gradient is zero stays where it is. Where a gradient is NaN, in L-inf the pixel stays, and in
    L2 the sample becomes NaN.
    """
    grad = grad.to(x_adv.dtype)
    if threat_model == "Linf":
        moved = x_adv + step_size * grad.sign()
        return torch.clamp(torch.minimum(torch.maximum(moved, x_nat - epsilon), x_nat + epsilon), 0, 1)
    tiny = torch.finfo(grad.dtype).tiny
    # First to a largest entry of 1: the squares of a tiny gradient would underflow, and its norm with them.
    grad = grad / grad.abs().amax(dim=tuple(range(1, grad.dim())), keepdim=True).clamp_min(tiny)
    delta = x_adv + step_size * grad / _norm(grad).clamp_min(tiny) - x_nat
    return torch.clamp(x_nat + delta * (epsilon / _norm(delta).clamp_min(tiny)).clamp_max(1), 0, 1)


def _norm(images: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(images, dim=tuple(range(1, images.dim())), keepdim=True)
    return norm
