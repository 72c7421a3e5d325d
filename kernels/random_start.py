"""The random start of a projected-gradient attack. B batch; an image may have any shape after it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels import dispatch, reference
from engine.kernels.contract import dense_layout, look_up
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
    counter: int | Tensor,
) -> Tensor:
    """Initial perturbation, of the shape, dtype and strides of x_nat, not clamped to the range of images.

    kind "uniform": uniform in the L-inf ball, or in the L2 ball a uniform direction with a uniform radius.
    kind "gaussian": gaussian_std * N(0, 1), as TRADES starts. kind "none": zero.
    Numbers depend on (seed, counter, sample) alone: not on the batch, the device or the process.
    counter: 0 <= counter < 2**32, or an int64 scalar on the device of x_nat, which a CUDA graph reads anew.
    sample_B: int64, one for each image. Raises ValueError where it is not, and for unknown names.
    """
    if sample_B.dtype != torch.int64 or sample_B.shape != x_nat.shape[:1]:
        raise ValueError(
            f"sample_B: expected int64 ({len(x_nat)},), got {sample_B.dtype} of {tuple(sample_B.shape)}"
        )
    start = look_up("threat_model", threat_model, look_up("random_start", kind, STARTS))
    return start(x_nat, sample_B, StartParameters(epsilon, gaussian_std, seed, counter))


class StartParameters(NamedTuple):
    """The numbers of one call of `random_start`."""

    epsilon: float
    gaussian_std: float
    seed: int
    counter: int | Tensor


def _none(x_nat: Tensor, sample_B: Tensor, numbers: StartParameters) -> Tensor:
    return torch.zeros_like(x_nat)


def _gaussian(x_nat: Tensor, sample_B: Tensor, numbers: StartParameters) -> Tensor:
    return _like(x_nat, numbers.gaussian_std * _normal(x_nat, sample_B, numbers))


def _uniform_l2(x_nat: Tensor, sample_B: Tensor, numbers: StartParameters) -> Tensor:
    noise_BN = _normal(x_nat, sample_B, numbers)
    radius_B1 = uniform(numbers.seed, Stream.ATTACK_SCALE, numbers.counter, sample_B, 1)
    return _like(x_nat, numbers.epsilon * radius_B1 * noise_BN / noise_BN.norm(dim=1, keepdim=True))


def _normal(x_nat: Tensor, sample_B: Tensor, numbers: StartParameters) -> Tensor:
    count = math.prod(x_nat.shape[1:])
    return normal(numbers.seed, Stream.ATTACK_START, numbers.counter, sample_B, count)


def _like(x_nat: Tensor, noise_BN: Tensor) -> Tensor:
    # Numbers run over an image in (C, H, W) order whatever its strides, so that both layouts start alike.
    return torch.empty_like(x_nat).copy_(noise_BN.view(x_nat.shape))


def _uniform_linf(x_nat: Tensor, sample_B: Tensor, numbers: StartParameters) -> Tensor:
    """`epsilon * U(-1, 1)`, the default start, by the implementation that serves here: the same bits from all.

    The one kind that the fused implementations have, under the name of the op.
    """
    noise = torch.empty_like(x_nat)
    fused = (
        noise.dtype == torch.float32
        and noise.dim() == 4
        and dense_layout(noise) is not None
        and not torch.compiler.is_compiling()
    )
    implementation = dispatch.choose("random_start", x_nat.device, fused=fused)
    serve = reference.random_start
    if implementation != "reference":
        serve, sample_B = dispatch.fused(implementation, "random_start", "random_start"), sample_B.contiguous()
    serve(noise, sample_B, numbers.epsilon, numbers.seed, numbers.counter)
    return noise


# By kind and threat model.
STARTS: dict[str, dict[str, Callable[[Tensor, Tensor, StartParameters], Tensor]]] = {
    "none": {"Linf": _none, "L2": _none},
    "uniform": {"Linf": _uniform_linf, "L2": _uniform_l2},
    "gaussian": {"Linf": _gaussian, "L2": _gaussian},
}
