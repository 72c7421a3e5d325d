"""`batch_norm`: numbers against float64, autograd, registration, torch.compile, threads, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from engine.kernels import batch_norm, native
from tests.kernels import norms
from tests.kernels.holding import assert_no_worse_than_twice_eager, assert_same_bits, serving, threads
from tests.kernels.norms import ANY_NORM, NORM_CASES, NormCase, check_batch_norm, last

measured = functools.cache(check_batch_norm)
FLAGS = pytest.mark.parametrize(("residual", "relu"), [(False, False), (False, True), (True, False), (True, True)])


@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_numbers(fused: str, case: NormCase) -> None:
    """Torch's own, the reference, does not reach this."""
    measured(case, fused)


def test_no_worse_than_twice_eager(fused: str) -> None:
    assert_no_worse_than_twice_eager(
        (f"{name} {case.dtype}", error) for case in NORM_CASES for name, error in measured(case, fused).items()
    )


@settings(max_examples=60, deadline=None)
@given(case=ANY_NORM)
def test_numbers_of_any_shape(fused: str, case: NormCase) -> None:
    check_batch_norm(case, fused)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@FLAGS
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype, residual: bool, relu: bool) -> None:
    for shape in ((16, 64, 16, 16), (33, 40, 7, 9)):
        case = NormCase(shape, dtype, residual, relu)
        given = norms.arguments(case)
        with threads(1):
            alone = norms.outputs(given, case)
        for count in (2, 3, 7):
            with threads(count):
                assert_same_bits(norms.outputs(given, case), alone)


# ---------------------------------------------------------------- autograd


def drawn(dtype: torch.dtype = torch.float32, *, residual: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    maps: dict[str, Any] = {
        name: last(torch.randn(3, 4, 5, 5, generator=generator).to(dtype)).requires_grad_()
        for name in ("x", "residual")[: 1 + residual]
    }
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = {
        name: torch.rand(4, generator=generator, dtype=parameters).requires_grad_() for name in ("weight", "bias")
    }
    return maps | vectors


@FLAGS
def test_gradcheck_in_float64(residual: bool, relu: bool) -> None:
    given = drawn(torch.float64, residual=residual)

    def call(*values: Tensor) -> Tensor:
        named: dict[str, Any] = dict(zip(given, values, strict=True))
        return batch_norm(**named, relu=relu)

    assert torch.autograd.gradcheck(call, tuple(given.values()))


@FLAGS
def test_only_what_asks_has_a_gradient(implementation: str, residual: bool, relu: bool) -> None:
    """A frozen network: the images alone ask, and get what they get where all ask."""
    given = drawn(residual=residual)
    everything = torch.autograd.grad(batch_norm(**given, relu=relu).square().sum(), list(given.values()))
    for name, expected in zip(given, everything, strict=True):
        alone = {other: value.detach() for other, value in given.items()} | {name: given[name]}
        (found,) = torch.autograd.grad(batch_norm(**alone, relu=relu).square().sum(), given[name])
        assert torch.equal(found, expected), name
    with torch.no_grad():
        assert not batch_norm(**given, relu=relu).requires_grad


@pytest.mark.usefixtures("fused")
@FLAGS
def test_a_second_derivative_is_torchs(residual: bool, relu: bool) -> None:
    def second(implementation: str) -> tuple[Tensor, ...]:
        given = drawn(residual=residual)
        with serving("batch_norm", implementation, "cpu"):
            out = batch_norm(**given, relu=relu)
            first = torch.autograd.grad(out.pow(3).sum(), list(given.values()), create_graph=True)
            penalty = sum((value.square().sum() for value in first), torch.zeros(()))
            return torch.autograd.grad(penalty, list(given.values()))

    torch.testing.assert_close(second("native"), second("reference"), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("fused")
def test_transforms_and_forward_derivatives_are_torchs() -> None:
    given = {name: value.detach() for name, value in drawn().items()}

    def loss(x: Tensor) -> Tensor:
        return batch_norm(**given | {"x": x}, relu=True).square().sum()

    x = given["x"].requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(loss)(x), expected, rtol=1e-4, atol=1e-5)
    slope = torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(slope, expected.sum(), rtol=1e-3, atol=1e-3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert batch_norm(last(torch.empty(2, 4, 3, 3)), torch.ones(4), torch.ones(4)).shape == (2, 4, 3, 3)


def test_a_value_of_nan_reaches_its_channel_alone(implementation: str) -> None:
    given = {name: value.detach() for name, value in drawn(residual=False).items()}
    given["x"][0, 1, 0, 0] = torch.nan
    y = batch_norm(**given, relu=True)
    assert bool(y[:, 1].isnan().all())
    assert bool(y[:, (0, 2, 3)].isfinite().all())


# ---------------------------------------------------------------- registration and torch.compile


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@FLAGS
def test_opcheck(dtype: torch.dtype, residual: bool, relu: bool) -> None:
    given = {name: value.detach() for name, value in drawn(dtype).items()}
    x, weight, bias, other = (given[name] for name in ("x", "weight", "bias", "residual"))
    running = torch.zeros(4), torch.ones(4)
    numbers = (0.1, 1e-5, relu)
    opcheck(
        torch.ops.engine.batch_norm.default, (x, weight, bias, *running, other if residual else None, *numbers)
    )
    y, statistics_2C = torch.ops.engine.batch_norm(x, weight, bias, None, None, None, *numbers)
    y_or_none = y if residual and relu else None
    opcheck(
        torch.ops.engine.batch_norm_backward.default,
        (torch.randn_like(x), x, y_or_none, weight, bias, statistics_2C, relu),
    )


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fused", "fresh_compiler")
@FLAGS
def test_compiled_it_is_one_op_with_the_bits_of_the_eager_one(residual: bool, relu: bool) -> None:
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph.print_readable(print_output=False))
        boxed: Callable[..., object] = make_boxed_func(graph.forward)
        return boxed

    def results(call: Callable[..., Tensor]) -> list[Tensor]:
        given, running = drawn(residual=residual), (torch.zeros(4), torch.ones(4))
        y = call(**given, running_mean=running[0], running_var=running[1], relu=relu)
        return [y.detach(), *running, *torch.autograd.grad(y.square().sum(), list(given.values()))]

    compiled = torch.compile(batch_norm, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    for found, expected in zip(results(compiled), results(batch_norm), strict=True):
        assert torch.equal(found, expected)
    forward, backward = graphs
    assert forward.count("torch.ops.engine.batch_norm.default") == 1
    assert backward.count("torch.ops.engine.batch_norm_backward.default") == 1
    assert "aten.relu" not in forward


@pytest.mark.parametrize("relu", [False, True])
def test_autocast_leaves_it_as_it_is(implementation: str, relu: bool) -> None:
    given = drawn(torch.bfloat16)
    plain = batch_norm(**given, relu=relu)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(batch_norm(**given, relu=relu), plain)


# ---------------------------------------------------------------- what is served elsewhere, and what is refused


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(
    ("change", "fused"),
    [
        ({}, True),
        ({"x": last(torch.randn(2, 4, 3, 3)).bfloat16()}, True),
        ({"x": last(torch.randn(4, 4, 3, 3))[::2]}, False),
        ({"x": torch.randn(2, 4, 3, 3)}, False),
        ({"x": last(torch.randn(2, 4, 3, 3)).double()}, False),
        ({"x": last(torch.randn(2, 4, 3, 3)).half()}, False),
        ({"x": torch.randn(2, 4, 3)}, False),
        ({"x": torch.randn(5, 4)}, False),
        ({"x": torch.randn(0, 4, 3, 3)}, False),
        ({"residual": torch.randn(2, 4, 3, 3)}, True),  # brought into x's order
        ({"residual": last(torch.randn(2, 4, 3, 3)).bfloat16()}, False),
        ({"weight": None, "bias": None}, False),
        ({"weight": torch.ones(4).double(), "bias": torch.ones(4).double()}, False),
        ({"weight": torch.ones(8)[::2]}, False),
    ],
)
def test_it_is_fused_for_maps_in_channels_last(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], fused: bool
) -> None:
    calls: list[int] = []
    original = native.batch_norm

    def counted(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(native, "batch_norm", counted)
    given: dict[str, Any] = {
        "x": last(torch.randn(2, 4, 3, 3)),
        "weight": torch.ones(4),
        "bias": torch.ones(4),
    } | change
    try:
        found = batch_norm(**given, relu=True)
    except RuntimeError:  # torch does not know these dtypes together
        assert not fused
    else:
        assert found.shape == given["x"].shape
    assert len(calls) == fused


def test_refusals(implementation: str) -> None:
    weight, x = torch.ones(4), last(torch.randn(2, 4, 3, 3))
    with pytest.raises(
        ValueError, match=r"x: one value of each channel has no variance, got shape \(1, 4, 1, 1\)"
    ):
        batch_norm(x[:1, :, :1, :1], weight, weight)
    with pytest.raises(ValueError, match=r"residual: expected shape \(2, 4, 3, 3\), got \(1, 4, 3, 3\)"):
        batch_norm(x, weight, weight, residual=x[:1])
    with pytest.raises(ValueError, match="running_mean and running_var: one is given without the other"):
        batch_norm(x, weight, weight, torch.zeros(4))
    with pytest.raises(ValueError, match="weight is on meta, and x on cpu"):
        batch_norm(x, weight.to("meta"), weight)


def test_the_reference_is_torchs_functions() -> None:
    given = drawn()
    with serving("batch_norm", "reference", "cpu"):
        found = batch_norm(**given, relu=True)
    plain = F.batch_norm(given["x"], None, None, given["weight"], given["bias"], True)
    assert torch.equal(found, F.relu(plain + given["residual"]))
