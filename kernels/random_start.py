"""The random start of a projected-gradient attack. B batch; an image may have any shape after it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.kernels import dispatch, native, reference
from engine.kernels.contract import dense_layout
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
    sample_B: int64, one for each image. Raises ValueError where it is not.
    """
    if sample_B.dtype != torch.int64 or sample_B.shape != x_nat.shape[:1]:
        raise ValueError(
            f"sample_B: expected int64 ({len(x_nat)},), got {sample_B.dtype} of {tuple(sample_B.shape)}"
        )
    if kind == "none":
        return torch.zeros_like(x_nat)
    # Numbers run over an image in (C, H, W) order whatever its strides, so that both layouts start alike.
    if kind == "uniform" and threat_model == "Linf":
        return _uniform_start(x_nat, sample_B, epsilon, seed, counter)
    count = math.prod(x_nat.shape[1:])
    noise_BN = normal(seed, Stream.ATTACK_START, counter, sample_B, count)
    if kind == "gaussian":
        noise_BN = gaussian_std * noise_BN
    else:
        radius_B1 = uniform(seed, Stream.ATTACK_SCALE, counter, sample_B, 1)
        noise_BN = epsilon * radius_B1 * noise_BN / noise_BN.norm(dim=1, keepdim=True)
    return torch.empty_like(x_nat).copy_(noise_BN.view(x_nat.shape))


def _uniform_start(x_nat: Tensor, sample_B: Tensor, epsilon: float, seed: int, counter: int) -> Tensor:
    """The start of every PGD step by default, by the implementation that serves here: the same bits from all."""
    noise = torch.empty_like(x_nat)
    fused = (
        noise.dtype == torch.float32
        and noise.dim() == 4
        and dense_layout(noise) is not None
        and not torch.compiler.is_compiling()
    )
    implementation = dispatch.choose("random_start", x_nat.device, fused=fused)
    if implementation == "native":
        native.uniform_start(noise, sample_B.contiguous(), epsilon, seed, counter)
    elif implementation == "triton":
        from engine.kernels.triton_ops import uniform_start as triton_uniform_start

        triton_uniform_start.uniform_start(noise, sample_B.contiguous(), epsilon, seed, counter)
    else:
        reference.uniform_start(noise, sample_B, epsilon, seed, counter)
    return noise
