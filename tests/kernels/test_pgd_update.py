from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import pgd_update, random_start

NORMS = ("Linf", "L2")


def images(*, seed: int = 0, shape: tuple[int, ...] = (4, 3, 5, 6), dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def signed(*, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * images(seed=seed, dtype=dtype) - 1


def step(x_adv: Tensor, grad: Tensor, x_nat: Tensor, **keys: Any) -> Tensor:
    """`pgd_update` of a copy."""
    return pgd_update(x_adv.clone(), grad, x_nat, **keys)


def length(delta: Tensor, threat_model: str) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(delta.flatten(1), math.inf if threat_model == "Linf" else 2, dim=1)
    return norm


# ---------------------------------------------------------------- the step


@pytest.mark.parametrize("threat_model", NORMS)
@pytest.mark.parametrize("far", [0.0, 0.5, 1.0], ids=lambda far: f"{far:g} of the way out")
def test_a_step_equals_numpy_sample_by_sample(dtype: torch.dtype, threat_model: str, far: float) -> None:
    epsilon, step_size = {"Linf": (0.1, 0.07), "L2": (1.3, 0.6)}[threat_model]
    x_nat, grad, away = (draw(seed=seed, dtype=dtype) for seed, draw in enumerate((images, signed, signed), 1))
    x_adv = x_nat + far * epsilon * away / length(away, threat_model)[:, None, None, None]

    expected = []
    for nat, adv, gradient in zip(*(each.double().numpy() for each in (x_nat, x_adv, grad)), strict=True):
        if threat_model == "Linf":
            moved = np.clip(adv + step_size * np.sign(gradient), nat - epsilon, nat + epsilon)
        else:
            delta = adv + step_size * gradient / math.sqrt((gradient**2).sum()) - nat
            moved = nat + delta * min(1.0, epsilon / math.sqrt((delta**2).sum()))
        expected.append(np.clip(moved, 0, 1))

    before = grad.clone(), x_nat.clone()
    got = pgd_update(x_adv, grad, x_nat, threat_model=threat_model, epsilon=epsilon, step_size=step_size)
    np.testing.assert_allclose(got.numpy(), np.stack(expected), rtol=0, atol=5 * torch.finfo(dtype).eps)
    assert got is x_adv
    assert torch.equal(grad, before[0])
    assert torch.equal(x_nat, before[1])


@settings(max_examples=80, deadline=None)
@given(
    threat_model=st.sampled_from(NORMS),
    epsilon=st.floats(0, 3),
    step_size=st.floats(0, 5),
    magnitude=st.sampled_from([1e-40, 1e-25, 1.0, 1e25]),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_step_ends_in_the_ball_and_in_the_range_of_images(
    dtype: torch.dtype,
    threat_model: str,
    epsilon: float,
    step_size: float,
    magnitude: float,
    channels_last: bool,
    seed: int,
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x_nat = images(seed=seed, dtype=dtype).to(memory_format=layout)
    x_adv = images(seed=seed + 1, dtype=dtype)
    grad = magnitude * (2 * images(seed=seed + 2, dtype=dtype) - 1)
    moved = step(x_adv, grad, x_nat, threat_model=threat_model, epsilon=epsilon, step_size=step_size)
    assert moved.dtype == dtype
    assert length(moved - x_nat, threat_model).max() <= epsilon + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1


@pytest.mark.parametrize("threat_model", NORMS)
def test_a_sample_without_gradient_stays_and_the_others_move(dtype: torch.dtype, threat_model: str) -> None:
    x_nat, grad = images(seed=1, dtype=dtype), signed(seed=2, dtype=dtype)
    grad[1] = 0
    moved = step(x_nat, grad, x_nat, threat_model=threat_model, epsilon=0.3, step_size=0.1)
    assert torch.equal(moved[1], x_nat[1])
    assert (length(moved - x_nat, threat_model)[[0, 2, 3]] > 0.05).all()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("threat_model", NORMS)
@pytest.mark.parametrize("magnitude", [1e-37, 1e-30, 1e-23, 1e22, 1e38])
def test_the_magnitude_of_the_gradient_does_not_matter(threat_model: str, magnitude: float) -> None:
    """The squares of 1e-23 and of 1e22 are 0 and infinity in float32."""
    x_nat = images(seed=1, dtype=torch.float32)
    grad = (0.5 + images(seed=2, dtype=torch.float32)) * signed(seed=3).sign().float()
    keys = {"epsilon": 2.0, "step_size": 0.3}
    expected = step(x_nat, grad, x_nat, threat_model=threat_model, **keys)
    got = step(x_nat, magnitude * grad, x_nat, threat_model=threat_model, **keys)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("implementation")
def test_a_half_precision_gradient_moves_full_precision_images() -> None:
    x_nat, grad = images(seed=1, dtype=torch.float32), signed(seed=2)
    got = step(x_nat, grad.half(), x_nat, threat_model="Linf", epsilon=8 / 255, step_size=2 / 255)
    expected = step(x_nat, grad.float(), x_nat, threat_model="Linf", epsilon=8 / 255, step_size=2 / 255)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_nan_in_the_gradient_stops_the_pixel_in_linf_and_shows_in_l2(dtype: torch.dtype) -> None:
    x_nat, grad = images(seed=1, dtype=dtype), signed(seed=2, dtype=dtype)
    grad[1, 0, 0, 0] = torch.nan
    healthy = grad.nan_to_num(0.0)
    linf = step(x_nat, grad, x_nat, threat_model="Linf", epsilon=0.1, step_size=0.05)
    assert torch.equal(linf, step(x_nat, healthy, x_nat, threat_model="Linf", epsilon=0.1, step_size=0.05))
    assert linf[1, 0, 0, 0] == x_nat[1, 0, 0, 0]
    l2 = step(x_nat, grad, x_nat, threat_model="L2", epsilon=0.1, step_size=0.05)
    assert l2[1].isnan().all()
    assert not l2[[0, 2, 3]].isnan().any()


def test_zero_and_non_finite_entries_of_the_gradient_are_added_to_the_counts(dtype: torch.dtype) -> None:
    x_nat, grad = images(seed=1, dtype=dtype), signed(seed=2, dtype=dtype)
    grad[0, 0] = 0
    grad[0, 1, 0] = -0.0
    grad[1, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    counts = torch.tensor([100, 2**33])
    for _ in range(2):
        step(x_nat, grad, x_nat, threat_model="Linf", epsilon=0.1, step_size=0.05, counts=counts)
    assert counts.tolist() == [100 + 2 * (30 + 6), 2**33 + 2 * 3]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"threat_model": "L1"}, ["threat_model", "'L1'", "Linf, L2"]),
        ({"grad": torch.zeros(4, 3, 5, 5)}, ["one shape", "(4, 3, 5, 5)"]),
        ({"x_nat": torch.zeros(3, 5, 6)}, ["one shape", "(3, 5, 6)"]),
        (dict.fromkeys(("x_adv", "grad", "x_nat"), torch.zeros(4)), ["x_adv", "(B, ...)", "(4,)"]),
        ({"x_nat": images(dtype=torch.float64)}, ["one floating dtype", "float32", "float64"]),
        ({"grad": torch.zeros(4, 3, 5, 6, dtype=torch.int64)}, ["floating", "int64"]),
        ({"counts": torch.zeros(2)}, ["counts", "int64", "float32"]),
        ({"counts": torch.zeros(3, dtype=torch.int64)}, ["counts", "(2,)", "(3,)"]),
    ],
)
@pytest.mark.usefixtures("implementation")
def test_a_wrong_argument_is_named_in_one_line(changes: dict[str, Any], names: list[str]) -> None:
    right: dict[str, Any] = {
        "x_adv": images(dtype=torch.float32),
        "grad": images(dtype=torch.float32),
        "x_nat": images(dtype=torch.float32),
        "threat_model": "Linf",
        "epsilon": 0.1,
        "step_size": 0.1,
    }
    pgd_update(**right)
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        pgd_update(**right | changes)
    assert [name for name in names if name not in str(error.value)] == []


# ---------------------------------------------------------------- the random start


def start(
    x_nat: Tensor,
    sample: Tensor | None = None,
    *,
    kind: str = "uniform",
    threat_model: str = "Linf",
    epsilon: float = 0.5,
    gaussian_std: float = 0.001,
    seed: int = 7,
    counter: int = 3,
) -> Tensor:
    return random_start(
        x_nat,
        torch.arange(len(x_nat)) if sample is None else sample,
        kind=kind,
        threat_model=threat_model,
        epsilon=epsilon,
        gaussian_std=gaussian_std,
        seed=seed,
        counter=counter,
    )


KINDS = [("uniform", "Linf"), ("uniform", "L2"), ("gaussian", "Linf"), ("gaussian", "L2")]
by_kind = pytest.mark.parametrize(("kind", "threat_model"), KINDS)


def kolmogorov(cdf: Tensor) -> float:
    """Largest distance between a distribution and its n samples, given as its cdf at them, times sqrt(n)."""
    expected = cdf.flatten().sort().values
    n = len(expected)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum(steps[1:] - expected, expected - steps[:-1]).max()) * math.sqrt(n)


def test_the_uniform_linf_start_is_uniform_in_every_pixel() -> None:
    noise = start(torch.zeros(2000, 1, 3, 4), epsilon=0.25).double()
    assert noise.abs().max() <= 0.25
    # P(K > 2) is 7e-4 for numbers of that distribution.
    assert kolmogorov(noise / 0.5 + 0.5) < 2
    assert kolmogorov(noise[:, 0, 1, 2] / 0.5 + 0.5) < 2
    correlation = torch.corrcoef(noise.flatten(1).T) - torch.eye(12)
    assert correlation.abs().max() < 5 / math.sqrt(2000)


def test_the_l2_start_has_a_uniform_radius_and_a_uniform_direction() -> None:
    noise = start(torch.zeros(3000, 3, 2, 2), threat_model="L2", epsilon=0.8).double().flatten(1)
    radius = noise.norm(dim=1)
    assert radius.max() <= 0.8 * (1 + 1e-6)
    assert kolmogorov(radius / 0.8) < 2
    direction = noise / radius[:, None]
    # A uniform direction in N dimensions has covariance I / N, and it is independent of the radius.
    covariance = direction.T @ direction / 3000
    assert (covariance - torch.eye(12) / 12).abs().max() < 5 / (12 * math.sqrt(3000)) * math.sqrt(2)
    assert direction.mean(dim=0).abs().max() < 5 / math.sqrt(12 * 3000)
    assert torch.corrcoef(torch.stack((radius, direction[:, 0].abs())))[0, 1].abs() < 5 / math.sqrt(3000)


@pytest.mark.parametrize("threat_model", NORMS)
def test_the_gaussian_start_is_normal_with_the_given_deviation(threat_model: str) -> None:
    noise = start(
        torch.zeros(2000, 1, 3, 5), kind="gaussian", gaussian_std=0.02, threat_model=threat_model
    ).double()
    assert kolmogorov(torch.special.ndtr(noise / 0.02)) < 2
    correlation = torch.corrcoef(noise.flatten(1).T) - torch.eye(15)
    assert correlation.abs().max() < 5 / math.sqrt(2000)


@by_kind
def test_a_start_belongs_to_its_sample_and_not_to_its_batch(kind: str, threat_model: str) -> None:
    x_nat, sample = images(), torch.tensor([5, 900, 0, 2**32 - 1])
    noise = start(x_nat, sample, kind=kind, threat_model=threat_model)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(start(x_nat[order], sample[order], kind=kind, threat_model=threat_model), noise[order])
    alone = [start(x_nat[i : i + 1], sample[i : i + 1], kind=kind, threat_model=threat_model) for i in range(4)]
    assert torch.equal(torch.cat(alone), noise)
    assert len({row.numpy().tobytes() for row in noise}) == 4


@by_kind
def test_a_start_differs_between_seeds_and_between_counters(kind: str, threat_model: str) -> None:
    x_nat = images()
    noise = start(x_nat, kind=kind, threat_model=threat_model)
    assert torch.equal(start(x_nat, kind=kind, threat_model=threat_model), noise)
    for other in ({"seed": 8}, {"seed": 7 + 2**32}, {"counter": 4}):
        assert (start(x_nat, kind=kind, threat_model=threat_model, **other) != noise).float().mean() > 0.99  # type: ignore[arg-type]


@by_kind
def test_a_start_follows_the_images_in_dtype_and_strides_but_not_in_value(kind: str, threat_model: str) -> None:
    x_nat = images(dtype=torch.float32)
    noise = start(x_nat, kind=kind, threat_model=threat_model)
    layout = start(x_nat.to(memory_format=torch.channels_last), kind=kind, threat_model=threat_model)
    assert layout.stride() == x_nat.to(memory_format=torch.channels_last).stride()
    assert torch.equal(layout, noise)
    double = start(x_nat.double(), kind=kind, threat_model=threat_model)
    assert double.dtype == torch.float64
    assert torch.equal(double, noise.double())


def test_no_start_is_zero() -> None:
    assert torch.equal(start(images(), kind="none"), torch.zeros(4, 3, 5, 6, dtype=torch.float64))
