"""Calls of `batch_norm` that every implementation is held against, and their results in float64.

Shape suffixes: B batch, C channels, H, W; R rows, the pixels of all images.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import batch_norm
from tests.kernels.exact import Number
from tests.kernels.holding import Errors, assert_accurate, assert_same_bits, poisoned, serving

SINGLE, BRAIN, DOUBLE = torch.float32, torch.bfloat16, torch.float64
EPS, MOMENTUM = 1e-3, 0.3
CHAIN = 16  # roundings in a row of a sum, about: it is made of partial sums


@dataclass(frozen=True)
class NormCase:
    """mean, std: of the input, in the units of the standard normal numbers that it is made of."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype = SINGLE
    residual: bool = False
    relu: bool = False
    mean: float = 0.5
    std: float = 2.0
    seed: int = 0

    def __str__(self) -> str:
        after = "+residual" * self.residual + "+relu" * self.relu
        size = "x".join(map(str, self.shape))
        return f"{size} {str(self.dtype).removeprefix('torch.')}{after} mean {self.mean:g} std {self.std:g}"


ANY_NORM = st.builds(
    NormCase,
    shape=st.tuples(st.integers(2, 9), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from((SINGLE, BRAIN)),
    residual=st.booleans(),
    relu=st.booleans(),
    mean=st.floats(-5, 5),
    std=st.floats(0.5, 50),
    seed=st.integers(0, 2**32 - 1),
)


def last(numbers: Tensor) -> Tensor:
    return numbers.contiguous(memory_format=torch.channels_last)


def arguments(case: NormCase, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a call, and the gradient from above; 0 where rounding decides what a ReLU lets through."""
    generator = torch.Generator().manual_seed(case.seed)
    channels = case.shape[1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    given = {name: last(normal(*case.shape)) for name in ("x", "residual", "grad")}
    given["x"] = case.std * given["x"] + case.mean * (1 + torch.arange(channels)[:, None, None] % 3)
    given = {name: last(value.to(case.dtype)) for name, value in given.items()}
    if not case.residual:
        del given["residual"]
    given |= {"weight": (normal(channels) + 0.2).float(), "bias": normal(channels).float()}
    given |= {"running_mean": normal(channels).float(), "running_var": normal(channels).square().float()}
    if case.relu:
        before = exactly(given, NormCase(case.shape, DOUBLE, case.residual))["y"]
        unsure = torch.from_numpy(abs(before.value) < 0.02 * before.size / CHAIN)
        given["grad"] = last(given["grad"].masked_fill(unsure, 0))
    return {name: value.to(device) for name, value in given.items()}


def outputs(given: dict[str, Tensor], case: NormCase) -> dict[str, Tensor]:
    """Results of a call by whatever serves, and all of its gradients."""
    asking: dict[str, Any] = {name: given[name].detach().requires_grad_() for name in ("x", "weight", "bias")}
    if case.residual:
        asking["residual"] = given["residual"].detach().requires_grad_()
    running: dict[str, Any] = {name: given[name].clone() for name in ("running_mean", "running_var")}
    rest: dict[str, Any] = {"relu": case.relu, "momentum": MOMENTUM, "eps": EPS}
    y = batch_norm(**asking, **running, **rest)
    gradients = torch.autograd.grad(y, list(asking.values()), given["grad"])
    named = {f"grad_{name}": value for name, value in zip(asking, gradients, strict=True)}
    return {"y": y.detach(), **running, **named}


def exactly(given: dict[str, Tensor], case: NormCase) -> dict[str, Number]:
    """The formulas in float64, and the sizes of what each result is a sum of."""
    tensors = {name: value.detach().cpu().double() for name, value in given.items()}
    channels = case.shape[1]

    def rows(name: str) -> Tensor:
        return tensors[name].permute(0, 2, 3, 1).reshape(-1, channels)

    x_RC, grad_RC, weight, bias = rows("x"), rows("grad"), tensors["weight"], tensors["bias"]
    count = len(x_RC)
    mean = x_RC.sum(0) / count
    var = (x_RC - mean).square().sum(0) / count
    rstd = 1 / (var + EPS).sqrt()
    normal_RC = (x_RC - mean) * rstd
    z_RC = normal_RC * weight + bias
    size_RC = ((x_RC.abs() + mean.abs()) * rstd + normal_RC.abs()) * weight.abs() + bias.abs()
    if case.residual:
        z_RC, size_RC = z_RC + rows("residual"), size_RC + rows("residual").abs()
    if case.relu:
        grad_RC = grad_RC * (z_RC > 0)
        z_RC = z_RC.clamp_min(0)
    along, alongside = grad_RC.sum(0), (grad_RC * normal_RC).sum(0)
    grad_x_RC = weight * rstd * (grad_RC - along / count - normal_RC * alongside / count)
    sizes = grad_RC.abs().sum(0), (grad_RC * (normal_RC.abs() + (x_RC.abs() + mean.abs()) * rstd)).abs().sum(0)
    grad_x_size_RC = (weight * rstd).abs() * (
        grad_RC.abs() + sizes[0] / count + normal_RC.abs() * sizes[1] / count
    )
    grad_x_size_RC += (weight * rstd).abs() * (x_RC.abs() + mean.abs()) * rstd * (alongside.abs() / count)
    running_mean, running_var = tensors["running_mean"], tensors["running_var"]
    unbiased = var * count / (count - 1)
    found = {
        "y": (z_RC, size_RC),
        "running_mean": (
            (1 - MOMENTUM) * running_mean + MOMENTUM * mean,
            running_mean.abs() + MOMENTUM * x_RC.abs().mean(0),
        ),
        "running_var": (
            (1 - MOMENTUM) * running_var + MOMENTUM * unbiased,
            running_var + MOMENTUM * (unbiased + mean.square() * 1e-3),
        ),
        "grad_x": (grad_x_RC, grad_x_size_RC),
        "grad_weight": (alongside, sizes[1]),
        "grad_bias": (along, sizes[0]),
    }
    if case.residual:
        found["grad_residual"] = (grad_RC, grad_RC.abs())
    batch, _, height, width = case.shape
    result = {}
    for name, (value, size) in found.items():
        if value.dim() == 2:
            value, size = (v.view(batch, height, width, channels).permute(0, 3, 1, 2) for v in (value, size))
        result[name] = Number(value.numpy(), CHAIN * size.numpy())
    return result


def check_batch_norm(case: NormCase, implementation: str, device: str = "cpu") -> dict[str, Errors]:
    """Each result near its value in float64, every element written, twice the same bits."""
    given = arguments(case, device)
    with serving("batch_norm", "reference", device):
        eager = outputs(given, case)
    with serving("batch_norm", implementation, device), poisoned():
        found, again = outputs(given, case), outputs(given, case)
    assert_same_bits(found, again)
    assert found["y"].stride() == found["grad_x"].stride() == given["x"].stride()
    return {
        name: assert_accurate(name, found[name], eager[name], right)
        for name, right in exactly(given, case).items()
    }


SHAPES = ((4, 16, 8, 8), (3, 5, 3, 7), (2, 3, 1, 1), (2, 1, 4, 4), (5, 130, 3, 3), (16, 64, 16, 16), (9, 33, 9, 8))
NORM_CASES = [
    *(
        NormCase(shape, dtype, residual, relu)
        for shape, dtype, residual, relu in itertools.product(
            SHAPES, (SINGLE, BRAIN), (False, True), (False, True)
        )
    ),
    *(
        NormCase((4, 8, 9, 9), SINGLE, mean=mean, std=std)
        for mean, std in ((100, 1), (0, 1e-4), (0, 1e4), (-3, 0))
    ),
]
