"""Calls of `fab_step` that every implementation is held against, and their results in numpy's float64.

Shape suffixes: B batch, N pixels of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import fab_step
from tests.kernels.exact import Array
from tests.kernels.holding import assert_same_bits, numpy, poisoned, serving

NORMS = {"Linf": math.inf, "L2": 2.0}
TOLERANCE = 3e-7
"""Of a pixel in float32: half the distance of neighbours below 1, and eta and alpha_max, which Triton rounds."""


# ---------------------------------------------------------------- gradients and differences


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def sparse(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Nine entries out of ten are zero, of either sign."""
    return normal(shape, generator) * (torch.rand(shape, generator=generator) < 0.1)


def uneven(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Magnitudes over six decades: pixels reach the border one after the other in L2."""
    return normal(shape, generator).sign() * 10 ** (6 * torch.rand(shape, generator=generator) - 3)


def equal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return normal(shape, generator).sign()


def tiny(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Subnormal in float32: zero in L2."""
    return 1e-40 * normal(shape, generator)


def huge(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The squares are infinite in float32."""
    return 1e30 * normal(shape, generator)


def near_zero(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """About 1e-8, below which an entry is zero in L2."""
    return 1e-8 * normal(shape, generator)


def zero(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def broken(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The first image's gradient is NaN at a pixel, the second one's infinite."""
    grad = normal(shape, generator)
    grad.flatten(1)[:1, -1] = torch.nan
    grad.flatten(1)[1:2, 0] = -torch.inf
    return grad


GRADIENTS = (normal, sparse, uneven, equal, tiny, huge, near_zero, zero, broken)


@dataclass(frozen=True)
class FabCase:
    """reach: the difference in units of the farthest that the box reaches, beyond which lies a corner of the box.

    border: share of the pixels that are 0 or 1. far: how far x_adv is from x_nat, at most.
    """

    shape: tuple[int, ...]
    threat_model: str
    gradient: Callable[[tuple[int, ...], torch.Generator], Tensor] = normal
    reach: float = 0.01
    border: float = 0.1
    far: float = 0.1
    layout: torch.memory_format = torch.contiguous_format
    alpha_max: float = 0.1
    eta: float = 1.05
    seed: int = 0

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        last = " channels last" * (self.layout == torch.channels_last)
        return f"{size}{last} {self.threat_model} {self.gradient.__name__} {self.reach:g} {self.border:g}"

    @property
    def keys(self) -> dict[str, Any]:
        return {"threat_model": self.threat_model, "alpha_max": self.alpha_max, "eta": self.eta}


def cases() -> list[FabCase]:
    small = (3, 3, 4, 5)
    found = [
        FabCase(small, norm, gradient, reach, 0.3)
        for norm in NORMS
        for gradient in GRADIENTS
        for reach in (-0.02, 0.3)
    ]
    for norm in NORMS:
        found += [FabCase(small, norm, reach=reach, seed=1) for reach in (0.0, 1e-7, -0.9, 0.999, -1.5, 100.0)]
        found += [FabCase(small, norm, border=border, far=far) for border in (0.0, 1.0) for far in (0.0, 1.0)]
        found += [FabCase(shape, norm) for shape in ((2, 1), (2, 3), (5, 1, 1, 1), (0, 3, 4, 4), (2, 0, 4, 4))]
        found += [FabCase((2, 3, 32, 32), norm, gradient, reach=-0.1) for gradient in (normal, uneven)]
        found += [FabCase((2, 3, 7, 5), norm, layout=torch.channels_last), FabCase((2, 3, 24, 25), norm)]
        found += [FabCase(small, norm, alpha_max=alpha_max, eta=1.0) for alpha_max in (0.0, 1.0)]
    return found


FAB_CASES = cases()
ANY_FAB = st.builds(
    FabCase,
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=3).map(lambda image: (3, *image)),
    threat_model=st.sampled_from(tuple(NORMS)),
    gradient=st.sampled_from(GRADIENTS),
    reach=st.sampled_from((0.0, 1.0, -1.0)) | st.floats(-1.5, 1.5),
    border=st.floats(0, 1),
    far=st.sampled_from((0.0, 0.1, 1.0)),
    alpha_max=st.floats(0, 1),
    eta=st.floats(1, 1.1),
    seed=st.integers(0, 2**32 - 1),
)


def arguments(case: FabCase, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_adv, x_nat, the gradient and the difference, in float32."""
    generator = torch.Generator().manual_seed(case.seed)
    x_nat = torch.rand(case.shape, generator=generator)
    away = case.far * (2 * torch.rand(case.shape, generator=generator) - 1)
    at_border = torch.rand(case.shape, generator=generator) < case.border
    x_nat = torch.where(at_border, x_nat.round(), x_nat)
    x_adv = torch.where(at_border & (away > 0), x_nat, (x_nat + away).clamp(0, 1))
    grad = case.gradient(case.shape, generator)
    away_from = (grad * case.reach > 0).to(grad.dtype)  # the pixels that go down
    farthest_B = (grad.double().abs() * torch.where(away_from > 0, x_adv, 1 - x_adv)).flatten(1).sum(dim=1)
    difference_B = (case.reach * farthest_B).to(torch.float32)
    x_adv, x_nat, grad = (given.to(device).contiguous(memory_format=case.layout) for given in (x_adv, x_nat, grad))
    return x_adv, x_nat, grad, difference_B.to(device)


# ---------------------------------------------------------------- in float64


def projection(point_N: Array, normal_N: Array, distance: float, threat_model: str) -> Array:
    """The projection of `reference.box_projection`, by the corners of the piecewise linear function, sorted."""
    weight_N = np.abs(normal_N)
    if threat_model == "L2":
        weight_N = np.where(weight_N < 1e-8, 0, weight_N)
    speed_N = np.where(weight_N > 0, weight_N if threat_model == "L2" else 1.0, 0.0)
    down_N = (normal_N if distance >= 0 else -normal_N) > 0
    room_N = np.where(down_N, point_N, 1 - point_N)
    moving = np.flatnonzero(weight_N)
    corner_N = room_N[moving] / speed_N[moving]
    order, corner_K = moving[np.argsort(corner_N)], np.sort(corner_N)
    whole_K = np.cumsum((weight_N * room_N)[order])
    left_K = np.cumsum((weight_N * speed_N)[order][::-1])[::-1]
    reached_K = whole_K + corner_K * np.append(left_K[1:], 0)
    multiplier = np.interp(abs(distance), np.append(0, reached_K), np.append(0, corner_K))
    way_N: Array = np.where(down_N, -1, 1) * np.minimum(multiplier * speed_N, room_N)
    return way_N


def exact_step(case: FabCase, given: tuple[Tensor, ...]) -> Array:
    """The step image by image."""
    x_adv, x_nat, grad, difference_B = map(numpy, given)
    found = x_adv.astype(np.float64)
    for i in range(len(found) if found.size else 0):
        x, nat, w, difference = (array[i].astype(np.float64) for array in (found, x_nat, grad, difference_B))
        if not (np.isfinite(w).all() and np.isfinite(difference)):
            continue
        to_nat = float((w * (nat - x)).sum())
        p, p_nat = (
            projection(point.ravel(), w.ravel(), distance, case.threat_model).reshape(x.shape)
            for point, distance in ((x, float(difference)), (nat, float(difference) + to_nat))
        )
        norm, norm_nat = (
            max(float(np.linalg.norm(way.ravel(), NORMS[case.threat_model])), 1e-8) for way in (p, p_nat)
        )
        alpha = min(norm / (norm + norm_nat), case.alpha_max)
        found[i] = np.clip((1 - alpha) * (x + case.eta * p) + alpha * (nat + case.eta * p_nat), 0, 1)
    return found


def check_fab_step(case: FabCase, implementation: str, device: str = "cpu") -> None:
    """The implementation serves, is exact, changes nothing else, and gives the same bits twice."""
    given = arguments(case, device)
    with serving("fab_step", implementation, device), poisoned():
        outcomes = []
        for _ in range(2):
            x_adv = given[0].clone()
            assert fab_step(x_adv, *given[1:], **case.keys) is x_adv
            outcomes.append(x_adv)
    for tensor, before in zip(given, arguments(case, device), strict=True):
        assert torch.equal(tensor.nan_to_num(), before.nan_to_num())
    assert outcomes[0].stride() == given[0].stride()
    assert_same_bits({"x_adv": outcomes[0]}, {"x_adv": outcomes[1]})
    np.testing.assert_allclose(numpy(outcomes[0]), exact_step(case, given), rtol=0, atol=TOLERANCE)
    assert not outcomes[0].numel() or 0 <= outcomes[0].min() <= outcomes[0].max() <= 1


def check_many_corners(threat_model: str, implementation: str, device: str = "cpu") -> None:
    """Rooms and weights over 30 decades, for which Newton's method takes 29 steps in L-inf and 43 in L2.

    Compared is the share of its room that each pixel moves.
    """
    case = FabCase((8, 3000), threat_model, alpha_max=0.0, eta=1.0)
    x_adv = torch.logspace(0, -30, 3000).expand(8, -1).to(device).contiguous()
    grad = torch.logspace(0, 30, 3000).expand(8, -1).to(device).contiguous()
    shares_B = torch.tensor([1e-4, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 1.1], device=device)
    difference_B = shares_B * (x_adv * grad).sum(dim=1)
    before, expected = numpy(x_adv), exact_step(case, (x_adv, x_adv, grad, difference_B))
    with serving("fab_step", implementation, device):
        moved = numpy(fab_step(x_adv.clone(), x_adv, grad, difference_B, **case.keys))
    np.testing.assert_allclose((before - moved) / before, (before - expected) / before, rtol=0, atol=1e-4)
