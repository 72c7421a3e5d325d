"""`fab_step`: the projections against the published ones, a linear program and conditions of optimality."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from engine.kernels import fab_step, reference
from tests.kernels.fab_cases import (
    ANY_FAB,
    FAB_CASES,
    NORMS,
    FabCase,
    arguments,
    check_fab_step,
    check_many_corners,
    exact_step,
    projection,
    uneven,
)
from tests.kernels.holding import numpy, threads

by_norm = pytest.mark.parametrize("threat_model", NORMS)
Planes = tuple[Tensor, Tensor, Tensor]


# ---------------------------------------------------------------- projections


@st.composite
def planes(draw: Callable[[Any], Any], rows: int = 4, most: int = 70, decades: float = 4.0) -> Planes:
    """Points in the box, some at its border; normals, some entries 0; offsets b of <w, v> = b."""
    size, seed = draw(st.integers(1, most)), draw(st.integers(0, 2**32 - 1))
    border, zeros, equal = draw(st.floats(0, 1)), draw(st.floats(0, 1)), draw(st.booleans())
    reach_B = torch.tensor(draw(st.lists(st.floats(-1.3, 1.3), min_size=rows, max_size=rows)), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rand = torch.rand(4, rows, size, generator=generator, dtype=torch.float64)
    points = torch.where(rand[0] < border, rand[1].round(), rand[1])
    normals = torch.randn(rows, size, generator=generator, dtype=torch.float64).sign()
    normals = normals if equal else normals * 10 ** (decades * (rand[2] - 0.5))
    normals = torch.where(rand[3] < zeros, 0.0, normals)
    farthest = normals * torch.where(normals * reach_B[:, None] > 0, points, points - 1)
    return points, normals, (normals * points).sum(dim=1) - reach_B * farthest.sum(dim=1).abs()


def touches(given: Planes) -> Tensor:
    """True where the farthest corner of the box lies on the plane, about."""
    points, normals, offset = given
    distance = (normals * points).sum(dim=1) - offset
    room = torch.where(normals * torch.where(distance < 0, -1, 1)[:, None] > 0, points, 1 - points)
    farthest = (normals.abs() * room).sum(dim=1)
    return (farthest > 0) & (farthest - distance.abs()).abs().le(1e-9 * farthest)


def ours(given: Planes, threat_model: str) -> Tensor:
    points, normals, offset = given
    return reference.box_projection(points, normals, (normals * points).sum(dim=1) - offset, threat_model == "L2")


def published(threat_model: str) -> Callable[..., Tensor]:
    """The projection that AutoAttack's authors published, which sorts."""
    module = pytest.importorskip("pyautoattack.fab_projections", reason="pyautoattack is not installed")
    project: Callable[..., Tensor] = getattr(module, f"projection_{threat_model.lower()}")
    return project


@by_norm
def test_projections_are_the_published_ones(threat_model: str) -> None:
    """But where a plane just touches the box, see below, and to the digits that their cumulative sums leave."""
    project = published(threat_model)

    @settings(max_examples=300, deadline=None)
    @given(planes(decades=2.0))
    def compare(given: Planes) -> None:
        assume(not touches(given).any())
        torch.testing.assert_close(ours(given, threat_model), project(*given), rtol=1e-9, atol=1e-11)

    compare()


@by_norm
@settings(max_examples=150, deadline=None)
@given(given=planes())
def test_projections_are_those_of_sorted_corners(threat_model: str, given: Planes) -> None:
    points, normals, offset = given
    distance = (normals * points).sum(dim=1) - offset
    expected = [
        projection(point, normal, float(far), threat_model)
        for point, normal, far in zip(numpy(points), numpy(normals), distance, strict=True)
    ]
    np.testing.assert_allclose(numpy(ours(given, threat_model)), np.stack(expected), rtol=1e-9, atol=1e-11)


@by_norm
@settings(max_examples=100, deadline=None)
@given(given=planes())
def test_a_projection_lies_in_the_box_and_on_the_plane_or_as_near_as_the_box_comes(
    threat_model: str, given: Planes
) -> None:
    points, normals, offset = given
    ways = ours(given, threat_model)
    there = points + ways
    assert there.min() >= -1e-15
    assert there.max() <= 1 + 1e-15
    distance, left = (normals * points).sum(dim=1) - offset, (normals * there).sum(dim=1) - offset
    farthest = (normals * distance.sign()[:, None] > 0).logical_not().to(points.dtype)
    corner = (normals * torch.where(normals == 0, points, farthest)).sum(dim=1) - offset
    reaches = corner * distance <= 0
    size = (normals.abs().sum(dim=1) + 1) * 1e-14
    assert (left.abs() <= size)[reaches].all()
    assert ((left - corner).abs() <= size)[~reaches].all()


@settings(max_examples=100, deadline=None)
@given(given=planes())
def test_an_l2_projection_fulfils_the_conditions_of_optimality(given: Planes) -> None:
    """p = clip(-mu w) into the box for one mu, which suffices, as the problem is convex."""
    points, normals, _ = given
    for point, normal, way in zip(points, normals, ours(given, "L2"), strict=True):
        inside = (way != 0) & (point + way > 1e-12) & (point + way < 1 - 1e-12)
        if not inside.any():  # then each pixel has moved to its border, or none has
            continue
        mu = -(way * normal)[inside].sum() / (normal[inside] ** 2).sum()
        torch.testing.assert_close(way, (point - mu * normal).clamp(0, 1) - point, rtol=0, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(given=planes(rows=1, most=12))
def test_an_linf_projection_is_as_short_as_a_linear_program_finds(given: Planes) -> None:
    """min m over v in the box on the plane with |v - point| <= m."""
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    points, normals, offset = given
    (point,), (normal,) = numpy(points), numpy(normals)
    eye, one = np.eye(len(point)), np.ones((len(point), 1))
    found = optimize.linprog(
        np.append(np.zeros(len(point)), 1),
        A_ub=np.block([[eye, -one], [-eye, -one]]),
        b_ub=np.concatenate((point, -point)),
        A_eq=np.append(normal, 0)[None],
        b_eq=numpy(offset),
        bounds=[*[(0, 1)] * len(point), (0, None)],
    )
    if found.status == 0:
        assert float(ours(given, "Linf").abs().max()) == pytest.approx(found.fun, abs=1e-6)


@by_norm
def test_the_steps_that_there_are_suffice(threat_model: str) -> None:
    """Rooms over 100 decades, weights over 90: 30 steps in L-inf, 48 in L2."""
    size, rows = 3000, 12
    points, normals = (torch.logspace(0, last, size, dtype=torch.float64).expand(rows, -1) for last in (-100, 90))
    farthest_B = (points * normals).sum(dim=1)
    distance_B = torch.logspace(-4, 1, rows, dtype=torch.float64) * farthest_B
    ways = reference.box_projection(points, normals, distance_B, threat_model == "L2")
    reached_B = -(ways * normals).sum(dim=1)
    torch.testing.assert_close(reached_B, distance_B.minimum(farthest_B), rtol=1e-12, atol=0)


def test_an_l2_projection_whose_plane_touches_the_box_is_its_corner() -> None:
    """The published one does not move there where one entry counts."""
    points = torch.full((1, 2), 0.5, dtype=torch.float64)
    normals, distance = torch.tensor([[0.0, -2.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert reference.box_projection(points, normals, distance, True).tolist() == [[0, 0.5]]
    assert published("L2")(points, normals, (normals * points).sum(dim=1) - distance).tolist() == [[0, 0]]


def test_an_l2_projection_of_entries_about_1e_8_is_exact_over_those_that_count() -> None:
    """The published one leaves small entries where they are and counts their squares: it misses the plane."""
    points = torch.full((1, 4), 0.5, dtype=torch.float64)
    normals = torch.tensor([[2e-8, 0.9e-8, 0.9e-8, 0.0]], dtype=torch.float64)
    distance = torch.tensor([2e-9], dtype=torch.float64)
    way = reference.box_projection(points, normals, distance, True)
    assert way.tolist() == [[pytest.approx(-0.1), 0, 0, 0]]
    missed = published("L2")(points, normals, (normals * points).sum(dim=1) - distance)
    assert float(missed[0, 0]) == pytest.approx(-0.1 * 4 / (4 + 2 * 0.81))


# ---------------------------------------------------------------- the step


@pytest.mark.parametrize("case", FAB_CASES, ids=str)
def test_a_step_equals_numpy_image_by_image(implementation: str, case: FabCase) -> None:
    check_fab_step(case, implementation)


@settings(max_examples=150, deadline=None)
@given(case=ANY_FAB)
def test_any_step(implementation: str, case: FabCase) -> None:
    check_fab_step(case, implementation)


@by_norm
def test_a_step_whose_pixels_reach_the_border_one_by_one(implementation: str, threat_model: str) -> None:
    check_many_corners(threat_model, implementation)


@by_norm
def test_a_step_is_the_formula_with_the_published_projections(threat_model: str) -> None:
    project = published(threat_model)
    generator = torch.Generator().manual_seed(0)
    x_nat, away, grad = (torch.rand(6, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    x_adv, grad = (x_nat + 0.2 * (away - 0.5)).clamp(0, 1), grad - 0.5
    difference_B = torch.tensor([-0.1, 2.0, -3.0, 0.0, 0.01, 100.0], dtype=torch.float64)
    x, nat, w = x_adv.flatten(1), x_nat.flatten(1), grad.flatten(1)
    b = (w * x).sum(dim=1) - difference_B
    p, p_nat = project(x, w, b), project(nat, w, b)
    norm, norm_nat = (
        torch.linalg.vector_norm(way, NORMS[threat_model], dim=1, keepdim=True).clamp_min(1e-8)
        for way in (p, p_nat)
    )
    alpha = (norm / (norm + norm_nat)).clamp_max(0.1)
    expected = ((1 - alpha) * (x + 1.05 * p) + alpha * (nat + 1.05 * p_nat)).clamp(0, 1)
    got = fab_step(x_adv, x_nat, grad, difference_B, threat_model=threat_model)
    assert got is x_adv
    torch.testing.assert_close(got.flatten(1), expected, rtol=0, atol=1e-12)


@by_norm
def test_a_step_on_a_linear_function_crosses_its_boundary(implementation: str, threat_model: str) -> None:
    """With eta above 1, no way back and no pixel at its border the new difference has the other sign."""
    case = FabCase((8, 3, 8, 8), threat_model, reach=-0.05, border=0.0, alpha_max=0.0)
    _, x_nat, grad, difference_B = arguments(case)
    x_adv = 0.25 + 0.5 * x_nat
    before = x_adv.clone()
    fab_step(x_adv, x_nat, grad, difference_B, **case.keys)
    after_B = difference_B + (grad * (x_adv - before)).flatten(1).sum(dim=1)
    torch.testing.assert_close(after_B, -0.05 * difference_B, rtol=1e-3, atol=0)


@by_norm
def test_what_is_not_finite_stays_and_the_others_move(dtype: torch.dtype, threat_model: str) -> None:
    x_adv, x_nat, grad, difference_B = (
        given.to(dtype) for given in arguments(FabCase((6, 3, 4, 5), threat_model, reach=0.1))
    )
    grad[0, 0, 0, 0] = torch.nan
    grad[1, 2, 3, 4] = torch.inf
    grad[2, 0, 0, :2] = torch.tensor([torch.inf, -torch.inf])
    difference_B[3], difference_B[4] = torch.nan, -torch.inf
    moved = fab_step(x_adv.clone(), x_nat, grad, difference_B, threat_model=threat_model)
    assert torch.equal(moved[:5], x_adv[:5])
    assert (moved[5] != x_adv[5]).any()


@by_norm
def test_without_gradient_a_step_goes_a_tenth_of_the_way_back(dtype: torch.dtype, threat_model: str) -> None:
    x_adv, x_nat, grad, difference_B = (
        given.to(dtype) for given in arguments(FabCase((3, 3, 4, 5), threat_model, border=0.0))
    )
    moved = fab_step(x_adv.clone(), x_nat, 0 * grad, difference_B, threat_model=threat_model)
    expected = 0.9 * x_adv + 0.1 * x_nat
    torch.testing.assert_close(moved, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("threat_model", "magnitude"),
    [("Linf", 1e-37), ("Linf", 1e-20), ("Linf", 1e36), ("L2", 1e-3), ("L2", 1e20), ("L2", 1e36)],
)
def test_the_magnitude_of_the_gradient_does_not_matter(
    implementation: str, threat_model: str, magnitude: float
) -> None:
    """In L2 but for what is below 1e-8."""
    case = FabCase((4, 3, 4, 5), threat_model, reach=0.2)
    x_adv, x_nat, grad, difference_B = arguments(case)
    expected = fab_step(x_adv.clone(), x_nat, grad, difference_B, **case.keys)
    got = fab_step(x_adv, x_nat, magnitude * grad, magnitude * difference_B, **case.keys)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


@by_norm
def test_strides_and_formats_do_not_matter(implementation: str, threat_model: str) -> None:
    """Images with gaps and gradients in other formats are the reference's; a dense image takes all."""
    case = FabCase((3, 3, 6, 6), threat_model, reach=0.1)
    x_adv, x_nat, grad, difference_B = arguments(case)
    grad = grad.bfloat16().float()
    expected = fab_step(x_adv.clone(), x_nat, grad, difference_B, **case.keys)
    room = torch.zeros(3, 3, 6, 12)
    room[..., ::2] = x_adv
    spread_B = difference_B.repeat_interleave(2)[::2]
    last = x_adv.contiguous(memory_format=torch.channels_last)
    for image in (room[..., ::2], last.clone(memory_format=torch.preserve_format), x_adv.clone()):
        strides = image.stride()
        got = fab_step(image, x_nat.transpose(2, 3).contiguous().transpose(2, 3), grad, spread_B, **case.keys)
        assert got is image
        assert got.stride() == strides
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)
    half = fab_step(x_adv.clone(), x_nat, grad.bfloat16(), difference_B, **case.keys)
    torch.testing.assert_close(half, expected, rtol=0, atol=1e-7)
    assert not room[..., 1::2].any()


@by_norm
def test_images_that_are_one_tensor_with_the_originals(implementation: str, threat_model: str) -> None:
    case = FabCase((3, 3, 6, 6), threat_model, reach=0.1, far=0.0, border=0.0)
    x_adv, _, grad, difference_B = arguments(case)
    expected = exact_step(case, (x_adv, x_adv, grad, difference_B))
    fab_step(x_adv, x_adv, grad, difference_B, **case.keys)
    np.testing.assert_allclose(numpy(x_adv), expected, rtol=0, atol=3e-7)


@by_norm
def test_the_bits_do_not_depend_on_the_number_of_threads(implementation: str, threat_model: str) -> None:
    case = FabCase((37, 3, 16, 16), threat_model, uneven, reach=0.3)
    x_adv, *rest = arguments(case)
    alone = fab_step(x_adv.clone(), *rest, **case.keys)
    for count in (2, 3, 7):
        with threads(count):
            assert torch.equal(fab_step(x_adv.clone(), *rest, **case.keys), alone)


# ---------------------------------------------------------------- as a part of torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("l2", [False, True])
def test_opcheck_of_fab_step(implementation: str, device: str, dtype: torch.dtype, l2: bool) -> None:
    x_adv, x_nat, grad = (torch.rand(2, 3, 4, 5, dtype=dtype, device=device) for _ in range(3))
    difference_B = torch.tensor([1.0, -2.0], dtype=dtype, device=device)
    opcheck(torch.ops.engine.fab_step.default, (x_adv, x_nat, grad, difference_B, l2, 0.1, 1.05))


@by_norm
def test_a_compiled_step_equals_the_eager_one(implementation: str, device: str, threat_model: str) -> None:
    case = FabCase((3, 3, 4, 5), threat_model, reach=0.1)

    def two_steps(x_adv: Tensor, x_nat: Tensor, grad: Tensor, difference_B: Tensor) -> Tensor:
        fab_step(x_adv, x_nat, grad, difference_B, **case.keys)
        return fab_step(x_adv, x_nat, grad.flip(0), difference_B, **case.keys) + 1

    torch.compiler.reset()
    outcomes = []
    for steps in (two_steps, torch.compile(two_steps, fullgraph=True, backend="aot_eager")):
        given = arguments(case, device)
        outcomes.append((steps(*given), given[0]))
    torch.compiler.reset()
    for eager, compiled in zip(*outcomes, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-7)


def test_autograd_refuses_images_that_a_step_has_changed(implementation: str) -> None:
    x_adv, x_nat, grad, difference_B = arguments(FabCase((2, 3, 4, 5), "Linf"))
    weight = torch.ones_like(x_adv, requires_grad=True)
    product = (weight * x_adv).sum()
    fab_step(x_adv, x_nat, grad, difference_B, threat_model="Linf")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(product)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"threat_model": "L1"}, ["threat_model", "'L1'", "Linf, L2"]),
        ({"grad": torch.zeros(4, 3, 5, 5)}, ["one shape", "(4, 3, 5, 5)"]),
        (dict.fromkeys(("x_adv", "grad", "x_nat"), torch.zeros(4)), ["x_adv", "(B, ...)", "(4,)"]),
        ({"difference_B": torch.zeros(3)}, ["difference_B", "(4,)", "(3,)"]),
        ({"difference_B": torch.zeros(4, 1)}, ["difference_B", "(4, 1)"]),
        ({"difference_B": torch.zeros(4, dtype=torch.int64)}, ["floating", "int64"]),
        ({"x_nat": torch.zeros(4, 3, 5, 6, dtype=torch.float64)}, ["one floating dtype", "float64"]),
        ({"difference_B": torch.zeros(4, device="meta")}, ["difference_B is on meta"]),
        ({"x_adv": torch.zeros(4, 3, 5, 6, requires_grad=True)}, ["x_adv", "no_grad"]),
    ],
)
def test_a_wrong_argument_is_named_in_one_line(
    implementation: str, changes: dict[str, Any], names: list[str]
) -> None:
    right: dict[str, Any] = {name: torch.rand(4, 3, 5, 6) for name in ("x_adv", "x_nat", "grad")}
    right |= {"difference_B": torch.zeros(4), "threat_model": "Linf"}
    fab_step(**right)
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        fab_step(**right | changes)
    assert [name for name in names if name not in str(error.value)] == []
    assert not math.isnan(float(right["x_adv"].sum()))
