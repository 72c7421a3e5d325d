"""Calls of `image_conv3x3` that every implementation is held against, and their results in float64.

Shape suffixes: B batch, O channels out, H, W.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import image_conv3x3, image_conv3x3_update
from tests.kernels import exact
from tests.kernels.exact import ROUNDING, Array, Number
from tests.kernels.holding import Errors, assert_accurate, assert_same_bits, poisoned, serving

SINGLE, BRAIN, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
CHAIN = 16  # roundings in a row of a sum, about: they are of either sign
EPSILON, STEP = 8 / 255, 2 / 255


@dataclass(frozen=True)
class StemCase:
    """shape: batch, channels out, height, width. dtype: of the output and its gradient."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype = SINGLE
    bias: bool = True
    normalised: bool = True
    seed: int = 0

    def __str__(self) -> str:
        given = "+bias" * self.bias + "+mean" * self.normalised
        return f"{'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}{given}"


ANY_STEM = st.builds(
    StemCase,
    shape=st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 37), st.integers(1, 37)),
    dtype=st.sampled_from((SINGLE, BRAIN)),
    bias=st.booleans(),
    normalised=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)

SHAPES = (
    (2, 16, 8, 8),
    (3, 1, 5, 7),
    (1, 5, 1, 1),
    (2, 20, 9, 3),
    (1, 64, 19, 33),
    (2, 70, 1, 17),
    (2, 16, 32, 32),
    (5, 70, 4, 1),
)
STEM_CASES = [
    StemCase(shape, dtype, bias, normalised)
    for shape, dtype, (bias, normalised) in itertools.product(
        SHAPES, (SINGLE, BRAIN), ((True, True), (False, True), (True, False), (False, False))
    )
]
# Of the implementations that know float16.
HALF_CASES = [replace(case, dtype=HALF) for case in STEM_CASES[::8]]


def last(numbers: Tensor) -> Tensor:
    return numbers.contiguous(memory_format=torch.channels_last)


def arguments(case: StemCase, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a call, and the gradient from above."""
    generator = torch.Generator().manual_seed(case.seed)
    batch, channels, height, width = case.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    given = {"images": last(torch.rand(batch, 3, height, width, generator=generator))}
    given |= {"weight": last(normal(channels, 3, 3, 3) / 5), "grad": last(normal(*case.shape).to(case.dtype))}
    if case.bias:
        given["bias"] = normal(channels)
    if case.normalised:
        given |= {"mean": 0.5 + 0.1 * normal(3, 1, 1), "std": 0.2 + 0.1 * torch.rand(3, 1, 1, generator=generator)}
    return {name: value.to(device) for name, value in given.items()}


def outputs(given: dict[str, Tensor], case: StemCase) -> dict[str, Tensor]:
    """Results of a call by whatever serves, and the gradients of images, weight and bias."""
    asking: dict[str, Any] = {
        name: given[name].detach().requires_grad_() for name in ("images", "weight", "bias") if name in given
    }
    y = image_conv3x3(
        asking["images"],
        asking["weight"],
        asking.get("bias"),
        given.get("mean"),
        given.get("std"),
        dtype=case.dtype,
    )
    gradients = torch.autograd.grad(y, list(asking.values()), given["grad"])
    return {"y": y.detach()} | {f"grad_{name}": value for name, value in zip(asking, gradients, strict=True)}


def exactly(given: dict[str, Tensor]) -> dict[str, Number]:
    """The formulas in float64, and the sizes of what each result is a sum of."""
    of = {name: value.detach().cpu().double().numpy() for name, value in given.items()}
    grad, mean, std = of["grad"], of.get("mean", np.zeros(())), of.get("std", np.ones(()))
    channels, height, width = grad.shape[1:]
    border = ((0, 0), (0, 0), (1, 1), (1, 1))
    normalised = np.pad((of["images"] - mean) / std, border)
    bias = of.get("bias", np.zeros(channels))[:, None, None]
    # Each a sum of products; its size is that of the same sum of absolute values.
    y, images, weight = ([np.zeros(shape) for _ in range(2)] for shape in _shapes(grad))
    for size, sign in enumerate((lambda value: value, abs)):
        y[size] += sign(bias)
        for i, j in itertools.product(range(3), range(3)):
            of_tap = sign(of["weight"][:, :, i, j])
            seen = sign(normalised[:, :, i : i + height, j : j + width])
            y[size] += np.einsum("oc,bchw->bohw", of_tap, seen)
            images[size][:, :, i : i + height, j : j + width] += np.einsum("oc,bohw->bchw", of_tap, sign(grad))
            weight[size][:, :, i, j] = np.einsum("bohw,bchw->oc", sign(grad), seen)
    found = {
        "y": y,
        "grad_images": [value[:, :, 1:-1, 1:-1] / std for value in images],
        "grad_weight": weight,
    }
    if "bias" in of:
        found["grad_bias"] = [grad.sum((0, 2, 3)), abs(grad).sum((0, 2, 3))]
    return {name: Number(value, CHAIN * size) for name, (value, size) in found.items()}


def _shapes(grad: Array) -> tuple[tuple[int, ...], ...]:
    """Shapes of the output, of the gradients of the padded images and of the weight."""
    batch, channels, height, width = grad.shape
    return grad.shape, (batch, 3, height + 2, width + 2), (channels, 3, 3, 3)


def check_image_conv3x3(case: StemCase, implementation: str, device: str = "cpu") -> dict[str, Errors]:
    """Each result near its value in float64, every element written, twice the same bits."""
    given = arguments(case, device)
    with serving("image_conv3x3", "reference", device):
        eager = outputs(given, case)
    with serving("image_conv3x3", implementation, device), poisoned():
        found, again = outputs(given, case), outputs(given, case)
    assert_same_bits(found, again)
    for name in ("y", "grad_images"):
        assert found[name].is_contiguous(memory_format=torch.channels_last), name
    return {name: assert_accurate(name, found[name], eager[name], right) for name, right in exactly(given).items()}


# ---------------------------------------------------------------- the attack's step


def update_arguments(case: StemCase, device: str = "cpu") -> dict[str, Tensor]:
    """As `arguments`; x_nat, and x_adv in its ball, some on its border; of the first image's gradient some is 0.

    Of the last image, where it has pixels enough, one entry is NaN, one infinite, one minus infinity.
    """
    given = arguments(case, device)
    generator = torch.Generator().manual_seed(case.seed + 1)
    x_nat = given.pop("images").cpu()
    moved = torch.rand(x_nat.shape, generator=generator)
    start = x_nat + EPSILON * (4 * moved - 2).clamp(-1, 1)
    given |= {"x_nat": x_nat.to(device), "x_adv": last(start.clamp(0, 1).float()).to(device)}
    grad = given["grad"]
    grad[0, :, : (grad.shape[2] + 1) // 2] = 0
    if min(grad.shape[2:]) >= 8:
        for place, value in ((0, torch.nan), (3, torch.inf), (6, -torch.inf)):
            grad[-1, 0, place, place] = value
    return given


def updated(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """x_adv after a step by whatever serves, and the counts of zero and of not finite gradients."""
    x_adv, counts = given["x_adv"].clone(), torch.zeros(2, dtype=torch.int64, device=given["x_adv"].device)
    rest = (given["grad"], given["x_nat"], given["weight"], given.get("std"))
    returned = image_conv3x3_update(x_adv, *rest, epsilon=EPSILON, step_size=STEP, counts=counts)
    assert returned is x_adv
    without = given["x_adv"].clone()
    image_conv3x3_update(without, *rest, epsilon=EPSILON, step_size=STEP)
    assert_same_bits({"x_adv": x_adv}, {"x_adv": without})
    return {"x_adv": x_adv, "counts": counts}


def check_image_conv3x3_update(case: StemCase, implementation: str, device: str = "cpu") -> None:
    """The step by the gradient's sign in float64, by any sign where rounding decides it; twice the same bits."""
    given = update_arguments(case, device)
    with serving("image_conv3x3", implementation, device), poisoned():
        found, again = updated(given), updated(given)
    assert_same_bits(found, again)
    with np.errstate(invalid="ignore"):
        gradient = exactly(given | {"images": given["x_nat"]})["grad_images"]
    x_adv, x_nat = (given[name].cpu().numpy() for name in ("x_adv", "x_nat"))
    finite = np.isfinite(gradient.size)
    unsure = finite & (abs(gradient.value) <= ROUNDING * gradient.size) & (gradient.size > 0)
    assert unsure.mean() < 0.1
    moved = found["x_adv"].cpu().numpy()

    def step(sign: Array) -> Array:
        return exact.pgd_linf(x_adv, sign, x_nat, EPSILON, STEP)

    assert (unsure | (moved == step(gradient.value))).all()
    any_sign = [step(np.full_like(gradient.value, sign)) for sign in (-1, 0, 1)]
    assert np.logical_or.reduce([moved == one for one in any_sign]).all()
    zero, not_finite = found["counts"].tolist()
    assert 0 <= zero - (gradient.size == 0).sum() <= unsure.sum()
    assert not_finite == (~finite).sum()
