"""`image_conv3x3` and the attack's step by it: numbers, autograd, registration, torch.compile, refusals."""

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

from engine import models
from engine.kernels import image_conv3x3, image_conv3x3_update, native
from tests.kernels import exact, stem_cases
from tests.kernels.holding import assert_no_worse_than_twice_eager, assert_same_bits, numpy, serving, threads
from tests.kernels.stem_cases import (
    ANY_STEM,
    STEM_CASES,
    StemCase,
    check_image_conv3x3,
    check_image_conv3x3_update,
    last,
)


def convolved(given: dict[str, Any], call: Callable[..., Tensor] = image_conv3x3, **rest: Any) -> Tensor:
    return call(*(given.get(name) for name in ("images", "weight", "bias", "mean", "std")), **rest)


measured = functools.cache(check_image_conv3x3)
GIVEN = pytest.mark.parametrize(
    ("bias", "normalised"), [(True, True), (False, True), (True, False), (False, False)]
)


@pytest.mark.parametrize("case", STEM_CASES, ids=str)
def test_numbers(implementation: str, case: StemCase) -> None:
    measured(case, implementation)


@pytest.mark.parametrize("case", STEM_CASES, ids=str)
def test_numbers_of_a_step(implementation: str, case: StemCase) -> None:
    check_image_conv3x3_update(case, implementation)


def test_no_worse_than_twice_eager(fused: str) -> None:
    assert_no_worse_than_twice_eager(
        (f"{name} {case.dtype}", error) for case in STEM_CASES for name, error in measured(case, fused).items()
    )


@settings(max_examples=60, deadline=None)
@given(case=ANY_STEM)
def test_numbers_of_any_shape(fused: str, case: StemCase) -> None:
    check_image_conv3x3(case, fused)
    check_image_conv3x3_update(case, fused)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_depend_neither_on_the_number_of_threads_nor_on_the_rest_of_the_batch(dtype: torch.dtype) -> None:
    for shape in ((16, 64, 16, 16), (5, 40, 37, 9)):
        given = stem_cases.arguments(StemCase(shape, dtype))
        step = stem_cases.update_arguments(StemCase(shape, dtype))

        def results(given: dict[str, Tensor], step: dict[str, Tensor], shape: Any = shape) -> dict[str, Tensor]:
            found = stem_cases.outputs(given, StemCase(shape, dtype)) | stem_cases.updated(step)
            return {name: found[name] for name in ("y", "grad_images", "x_adv", "counts")}

        with threads(1):
            alone = results(given, step)
            part = results(few(given), few(step))
        for count in (2, 3, 7):
            with threads(count):
                assert_same_bits(results(given, step), alone)
        assert_same_bits(
            {name: part[name] for name in part if name != "counts"}, {name: alone[name][2:4] for name in alone}
        )


def few(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The third and the fourth sample alone."""
    return {
        name: last(value[2:4]) if len(value) != 3 and name not in PARAMETERS else value
        for name, value in given.items()
    }


PARAMETERS = ("weight", "bias", "mean", "std")


# ---------------------------------------------------------------- what is not finite, and counts


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_pixel_that_is_not_finite_reaches_its_neighbours_alone(implementation: str, value: float) -> None:
    given = stem_cases.arguments(StemCase((2, 16, 9, 20)))
    given["images"][1, 2, 4, 16] = value
    y = convolved(given)
    reached = torch.zeros(2, 1, 9, 20, dtype=torch.bool)
    reached[1, :, 3:6, 15:18] = True
    assert torch.equal(~y.isfinite(), reached.expand_as(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_by_gradients_of_zero_and_of_nothing_finite(implementation: str, dtype: torch.dtype) -> None:
    """A positive and a negative infinity beside each other are no number, which moves nothing, as zero does."""
    x_nat = last(torch.full((1, 3, 8, 8), 0.5))
    weight = last(torch.ones(2, 3, 3, 3))
    grad = last(torch.zeros(1, 2, 8, 8).to(dtype))
    grad[0, 0, 1, 1], grad[0, 1, 1, 2] = torch.inf, -torch.inf
    grad[0, 0, 6, 6] = torch.nan
    x_adv, counts = x_nat.clone(), torch.tensor([1, 2])
    image_conv3x3_update(x_adv, grad, x_nat, weight, epsilon=0.25, step_size=0.125, counts=counts)
    sign = torch.zeros(8, 8)
    sign[:3, 0], sign[:3, 3] = 1, -1
    assert torch.equal(x_adv, last((0.5 + 0.125 * sign).expand(1, 3, 8, 8)))
    assert counts.tolist() == [1 + 3 * (64 - 12 - 9), 2 + 3 * (12 + 9)]


def test_a_step_from_the_border_of_the_ball_stays_in_it_and_in_the_range_of_images(implementation: str) -> None:
    x_nat = last(torch.linspace(0, 1, 2 * 3 * 5 * 7).view(2, 3, 5, 7))
    weight, grad = last(torch.ones(4, 3, 3, 3)), last(torch.ones(2, 4, 5, 7))
    for sign in (-1.0, 1.0):
        x_adv = last((x_nat + sign * torch.tensor(8 / 255)).clamp(0, 1))
        expected = exact.pgd_linf(
            x_adv.clone().numpy(), numpy(sign * torch.ones_like(x_adv)), x_nat.numpy(), 8 / 255, 2 / 255
        )
        image_conv3x3_update(x_adv, sign * grad, x_nat, weight, epsilon=8 / 255, step_size=2 / 255)
        assert (x_adv.numpy() == expected).all()


# ---------------------------------------------------------------- autograd


def drawn(dtype: torch.dtype = torch.float32, *, bias: bool = True, normalised: bool = True) -> dict[str, Any]:
    given = stem_cases.arguments(StemCase((2, 5, 4, 5), bias=bias, normalised=normalised))
    del given["grad"]
    asking = ("images", "weight", "bias")
    return {name: value.to(dtype).requires_grad_(name in asking) for name, value in given.items()}


def asking(given: dict[str, Any]) -> list[Tensor]:
    return [value for value in given.values() if value.requires_grad]


@GIVEN
def test_gradcheck_and_gradgradcheck_in_float64(bias: bool, normalised: bool) -> None:
    given = drawn(torch.float64, bias=bias, normalised=normalised)

    def call(*values: Tensor) -> Tensor:
        return convolved(dict(zip(given, values, strict=True)))

    assert torch.autograd.gradcheck(call, tuple(given.values()))
    assert torch.autograd.gradgradcheck(call, tuple(given.values()))


@GIVEN
def test_only_what_asks_has_a_gradient(implementation: str, bias: bool, normalised: bool) -> None:
    """A frozen network: the images alone ask, and get what they get where all ask."""
    given = drawn(bias=bias, normalised=normalised)
    everything = torch.autograd.grad(convolved(given).square().sum(), asking(given))
    names = [name for name, value in given.items() if value.requires_grad]
    for name, expected in zip(names, everything, strict=True):
        alone = {other: value.detach() for other, value in given.items()} | {name: given[name]}
        (found,) = torch.autograd.grad(convolved(alone).square().sum(), given[name])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not convolved(given).requires_grad


@pytest.mark.usefixtures("fused")
@GIVEN
def test_a_second_derivative_is_torchs(bias: bool, normalised: bool) -> None:
    def second(implementation: str) -> tuple[Tensor, ...]:
        given = drawn(bias=bias, normalised=normalised)
        with serving("image_conv3x3", implementation, "cpu"):
            out = convolved(given)
            first = torch.autograd.grad(out.pow(3).sum(), asking(given), create_graph=True)
            penalty = sum((value.square().sum() for value in first), torch.zeros(()))
            return torch.autograd.grad(penalty, asking(given))

    torch.testing.assert_close(second("native"), second("reference"), rtol=1e-4, atol=1e-2)


@pytest.mark.usefixtures("fused")
def test_transforms_and_forward_derivatives_are_torchs() -> None:
    given = {name: value.detach() for name, value in drawn().items()}

    def loss(images: Tensor) -> Tensor:
        return convolved(given | {"images": images}).square().sum()

    images = given["images"].requires_grad_()
    (expected,) = torch.autograd.grad(loss(images), images)
    images = images.detach()
    torch.testing.assert_close(torch.func.grad(loss)(images), expected, rtol=1e-4, atol=1e-4)
    slope = torch.func.jvp(loss, (images,), (torch.ones_like(images),))[1]
    torch.testing.assert_close(slope, expected.sum(), rtol=1e-3, atol=1e-3)
    several = torch.func.vmap(loss)(torch.stack((images, 2 * images)))
    torch.testing.assert_close(several, torch.stack((loss(images), loss(2 * images))))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert image_conv3x3(last(torch.empty(2, 3, 6, 7)), given["weight"]).shape == (2, 5, 6, 7)


# ---------------------------------------------------------------- registration and torch.compile


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@GIVEN
def test_opcheck(dtype: torch.dtype, bias: bool, normalised: bool) -> None:
    given = {name: value.detach() for name, value in drawn(bias=bias, normalised=normalised).items()}
    images, weight, std = given["images"], given["weight"], given.get("std")
    opcheck(
        torch.ops.engine.image_conv3x3.default, (images, weight, given.get("bias"), given.get("mean"), std, dtype)
    )
    grad = last(torch.randn(2, 5, 4, 5).to(dtype))
    opcheck(torch.ops.engine.image_conv3x3_backward.default, (grad, weight, std))
    counts = torch.zeros(2, dtype=torch.int64) if bias else None
    opcheck(
        torch.ops.engine.image_conv3x3_update.default,
        (images.clone(), grad, images.clone(), weight, std, 0.1, 0.05, counts),
    )


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def keeping(graphs: list[str]) -> Any:
    """A compiler that keeps the text of its graphs, and runs them as they are."""

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph.print_readable(print_output=False))
        boxed: Callable[..., object] = make_boxed_func(graph.forward)
        return boxed

    return aot_autograd(fw_compiler=keep, bw_compiler=keep)


@pytest.mark.usefixtures("fused", "fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@GIVEN
def test_compiled_it_is_one_op_with_the_bits_of_the_eager_one(
    dtype: torch.dtype, bias: bool, normalised: bool
) -> None:
    graphs: list[str] = []

    def results(call: Callable[..., Tensor]) -> list[Tensor]:
        given = drawn(bias=bias, normalised=normalised)
        y = convolved(given, call, dtype=dtype)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), asking(given))]

    compiled = torch.compile(image_conv3x3, fullgraph=True, backend=keeping(graphs))
    for found, expected in zip(results(compiled), results(image_conv3x3), strict=True):
        assert torch.equal(found, expected)
    forward, backward = graphs
    assert forward.count("torch.ops.engine.image_conv3x3.default") == 1
    assert "aten.div" not in forward
    assert backward.count("torch.ops.engine.image_conv3x3_backward.default") == 1


@pytest.mark.usefixtures("fused", "fresh_compiler")
def test_a_compiled_step_is_one_op_with_the_bits_of_the_eager_one() -> None:
    graphs: list[str] = []
    given = stem_cases.update_arguments(StemCase((2, 16, 9, 8)))

    def step(x_adv: Tensor, counts: Tensor) -> Tensor:
        rest = (given["grad"], given["x_nat"], given["weight"], given["std"])
        return image_conv3x3_update(x_adv, *rest, epsilon=0.1, step_size=0.05, counts=counts) + 1

    outcomes = []
    for call in (step, torch.compile(step, fullgraph=True, backend=keeping(graphs))):
        x_adv, counts = given["x_adv"].clone(), torch.zeros(2, dtype=torch.int64)
        outcomes.append((call(x_adv, counts), x_adv, counts))
    assert all(map(torch.equal, *outcomes))
    assert graphs[0].count("torch.ops.engine.image_conv3x3_update.default") == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*")
@pytest.mark.usefixtures("fused", "fresh_compiler")
def test_a_network_that_is_exported_or_traced_has_no_op_of_ours() -> None:
    network = (
        models.build("resnet8", 4, normalize=True, dataset="cifar10").eval().to(memory_format=torch.channels_last)
    )
    images = last(torch.rand(2, 3, 8, 8))
    expected = network(images)
    exported = torch.export.export(network, (images,))
    assert not any("engine" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(images), expected)
    script = torch.jit.trace(network, images)
    assert not any("Python" in node.kind() for node in script.inlined_graph.nodes())
    torch.testing.assert_close(script(images), expected)


def test_autocast_leaves_it_as_it_is(implementation: str) -> None:
    given = drawn()
    plain = convolved(given)
    with torch.autocast("cpu", torch.bfloat16):
        if implementation != "reference":  # whose convolution is torch's
            assert torch.equal(convolved(given), plain)


def test_autograd_notices_a_step_in_place(implementation: str) -> None:
    given = stem_cases.update_arguments(StemCase((2, 16, 9, 8)))
    factor = torch.ones((), requires_grad=True)
    product = (factor * given["x_adv"]).sum()
    rest = (given["grad"], given["x_nat"], given["weight"], given["std"])
    image_conv3x3_update(given["x_adv"], *rest, epsilon=0.1, step_size=0.05)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(product)


# ---------------------------------------------------------------- what is served elsewhere, and what is refused


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(
    ("change", "fused"),
    [
        ({}, True),
        ({"dtype": torch.bfloat16}, True),
        ({"dtype": torch.float16}, False),
        ({"dtype": torch.float64}, False),
        ({"weight": torch.randn(4, 3, 3, 3)}, True),  # brought into the order
        ({"images": torch.rand(2, 3, 5, 5)}, False),
        ({"images": last(torch.rand(4, 3, 5, 5))[::2]}, False),
        ({"images": torch.rand(0, 3, 5, 5)}, False),
        ({"images": last(torch.rand(2, 3, 5, 5)).double(), "weight": torch.randn(4, 3, 3, 3).double()}, False),
        ({"bias": torch.randn(8)[::2]}, False),
        ({"mean": torch.zeros(6, 1, 1)[::2], "std": torch.ones(3, 1, 1)}, False),
    ],
)
def test_it_is_fused_for_images_in_channels_last(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], fused: bool
) -> None:
    calls: list[int] = []
    original = native.image_conv3x3

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(native, "image_conv3x3", counted)
    given: dict[str, Any] = {
        "images": last(torch.rand(2, 3, 5, 5)),
        "weight": last(torch.randn(4, 3, 3, 3)),
    } | change
    found = convolved(given, dtype=change.get("dtype"))
    assert found.shape == (len(given["images"]), len(given["weight"]), 5, 5)
    assert found.dtype == change.get("dtype", given["images"].dtype)
    assert len(calls) == fused


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_step_by_another_format_is_the_references(dtype: torch.dtype) -> None:
    given = stem_cases.update_arguments(StemCase((2, 16, 9, 8)))
    given["grad"] = last(given["grad"].to(dtype))
    found = stem_cases.updated(given)
    with serving("image_conv3x3", "reference", "cpu"):
        assert_same_bits(found, stem_cases.updated(given))


def test_refusals_of_the_convolution(implementation: str) -> None:
    images, weight, one = last(torch.rand(2, 3, 5, 5)), torch.randn(4, 3, 3, 3), torch.ones(3, 1, 1)
    with pytest.raises(ValueError, match=r"weight: expected shape \(O, 3, 3, 3\), got \(4, 3, 3, 1\)"):
        image_conv3x3(images, weight[..., :1])
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, H, W\), got shape \(2, 1, 5, 5\)"):
        image_conv3x3(images[:, :1], weight)
    with pytest.raises(ValueError, match=r"bias: expected shape \(4,\), got \(3,\)"):
        image_conv3x3(images, weight, torch.ones(3))
    with pytest.raises(ValueError, match="mean and std: one is given without the other"):
        image_conv3x3(images, weight, None, one)
    with pytest.raises(ValueError, match=r"std: expected shape \(3, 1, 1\), got \(3,\)"):
        image_conv3x3(images, weight, None, one, one.view(3))
    with pytest.raises(
        ValueError, match=r"must have one floating dtype, got images torch\.float32, weight torch\.f"
    ):
        image_conv3x3(images, weight.double())
    with pytest.raises(ValueError, match="weight is on meta, and images on cpu"):
        image_conv3x3(images, weight.to("meta"))


def test_refusals_of_the_step(implementation: str) -> None:
    x, grad, weight = last(torch.rand(2, 3, 5, 5)), last(torch.randn(2, 4, 5, 5)), torch.randn(4, 3, 3, 3)
    lengths: dict[str, Any] = {"epsilon": 0.1, "step_size": 0.05}
    shapes = (
        r"expected \(B, 3, H, W\), \(B, 4, H, W\) and x_adv's, got \(2, 3, 5, 5\), \(2, 3, 5, 5\), \(2, 3, 5, 5\)"
    )
    with pytest.raises(ValueError, match=f"x_adv, grad and x_nat: {shapes}"):
        image_conv3x3_update(x, x, x, weight, **lengths)
    with pytest.raises(ValueError, match="counts: expected int64 of shape"):
        image_conv3x3_update(x, grad, x, weight, counts=torch.zeros(2), **lengths)
    with pytest.raises(ValueError, match="grad is on meta, and x_adv on cpu"):
        image_conv3x3_update(x, grad.to("meta"), x, weight, **lengths)
    asking = x.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"torch.no_grad"):
        image_conv3x3_update(asking, grad, x, weight, **lengths)
    with torch.no_grad():
        assert image_conv3x3_update(asking, grad, x, weight, **lengths) is asking


def test_the_reference_is_torchs_functions() -> None:
    given = drawn()
    with serving("image_conv3x3", "reference", "cpu"):
        found = convolved(given)
    normalised = (given["images"] - given["mean"]) / given["std"]
    assert torch.equal(found, F.conv2d(normalised, given["weight"], given["bias"], padding=1))
