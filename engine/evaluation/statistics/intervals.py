"""Intervals of numbers measured on images, and tests of two networks on the same images.

Shape suffixes: N images, R random assignments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import torch
from torch import Tensor

CONFIDENCE = 0.95
"""Confidence level of every interval; two networks are told apart at 1 - CONFIDENCE."""
ASSIGNMENTS = 5000
"""Random assignments of `permutation_test`: no p-value is below 1 / (ASSIGNMENTS + 1)."""

_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_NUMBERS_AT_ONCE = 2_000_000


def wilson(count: int, n: int) -> tuple[float, float]:
    """Interval of a share count / n: all p with |count / n - p| <= z sqrt(p (1 - p) / n) (Wilson, 1927)."""
    share, shrink = count / n, 1 + _Z**2 / n
    center = (share + _Z**2 / (2 * n)) / shrink
    half = _Z / shrink * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def of_mean(values_N: Tensor) -> tuple[float, float]:
    """Interval of a mean: mean +- z s / sqrt(n), s the standard deviation with n - 1; one value alone has none."""
    n, mean = len(values_N), float(values_N.mean())
    half = _Z * float(values_N.std()) / math.sqrt(n) if n > 1 else math.inf
    return mean - half, mean + half


def permutation_test(left: Tensor, right: Tensor, statistic: Callable[[Tensor], Tensor], seed: int = 0) -> float:
    """P-value of statistic(left) - statistic(right), of two networks on the same images.

    left, right: numbers by image, (..., N). statistic: from (..., R, N) to (R,).
    For each of `ASSIGNMENTS` a coin per image says whether the two networks' numbers change places; p is
    (1 + times that the difference is as large as the measured one) / (1 + ASSIGNMENTS). For shares that is
    McNemar's exact test, sampled.
    """
    if not left.shape[-1]:
        return 1.0
    measured = float((statistic(left[..., None, :]) - statistic(right[..., None, :])).abs())
    generator = torch.Generator().manual_seed(seed)
    as_large, rows = 0, max(1, _NUMBERS_AT_ONCE // left.shape[-1])
    for first in range(0, ASSIGNMENTS, rows):
        size = (min(rows, ASSIGNMENTS - first), left.shape[-1])
        swap_RN = torch.randint(2, size, generator=generator, dtype=torch.bool)
        lefts = torch.where(swap_RN, right[..., None, :], left[..., None, :])
        rights = torch.where(swap_RN, left[..., None, :], right[..., None, :])
        differences_R = (statistic(lefts) - statistic(rights)).abs()
        as_large += int((differences_R >= measured - 1e-12).sum())  # equal but for rounding
    return (1 + as_large) / (1 + ASSIGNMENTS)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests, each made as large as all tests together demand (Holm, 1979), in their order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
