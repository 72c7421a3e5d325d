"""Convolutions by Winograd's algorithm, against torch's in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from engine.kernels import WeightTransforms, conv3x3, native
from tests.kernels.holding import threads

SETS = ("AVX-512", "AVX2", "generic")
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := native.missing("cpu"):
        pytest.skip(reason)
    monkeypatch.setenv("ENGINE_KERNELS", "native")


def case(shape_BCHW: tuple[int, ...], channels: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, weight, bias and a gradient of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels_in, height, width = shape_BCHW

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = normal(channels, channels_in, 3, 3) / (3 * channels_in**0.5)
    upstream = normal(batch, channels, height, width).contiguous(memory_format=LAST)
    return normal(*shape_BCHW).contiguous(memory_format=LAST), weight, normal(channels), upstream


def results(images: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor, convolve: Any) -> list[Tensor]:
    """Outputs, and gradients of images, weight and bias."""
    learned = [tensor.detach().requires_grad_() for tensor in (images, weight, bias)]
    out = convolve(*learned)
    return [out.detach(), *torch.autograd.grad(out, learned, upstream)]


def exact(*given: Tensor) -> list[Tensor]:
    images, weight, bias, upstream = (tensor.double() for tensor in given)
    return results(images, weight, bias, upstream, direct)


def direct(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(images, weight, bias, padding=1)


def error(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true).norm() / true.norm().clamp_min(1e-30))


def assert_exact(images: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor) -> None:
    """Within the rounding of numbers of the size of 1, and of sums over the pixels, which may cancel."""
    arguments = (images, weight, bias, upstream)
    sums = max(upstream.numel() / len(bias), 1) ** 0.5
    sizes = (1, 1, sums, sums)
    for got, true, size in zip(results(*arguments, conv3x3), exact(*arguments), sizes, strict=True):
        assert got.shape == true.shape
        assert float((got - true).norm()) <= 2e-6 * (float(true.norm()) + size * true.numel() ** 0.5)


def serves(images: Tensor, weight: Tensor) -> bool:
    """The native implementation, and not torch's convolution."""
    grad_fn = conv3x3(images, weight.detach().requires_grad_()).grad_fn
    assert grad_fn is not None
    return type(grad_fn).__name__ != "ConvolutionBackward0"


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        ((4, 64, 16, 16), 64),
        ((64, 48, 4, 4), 80),
        ((17, 16, 7, 5), 32),
        ((70, 32, 2, 2), 16),
        ((8, 16, 1, 19), 16),
    ],
)
def test_outputs_and_gradients_are_those_of_float64(
    instruction_set: str, shape: tuple[int, ...], channels: int
) -> None:
    library = native._library()
    best = library.engine_instruction_set()
    if library.engine_use_instruction_set(instruction_set.encode()):
        pytest.skip(f"this processor has no {instruction_set}")
    try:
        arguments = case(shape, channels)
        assert serves(*arguments[:2])
        assert_exact(*arguments)
    finally:
        assert library.engine_use_instruction_set(best) == 0


@pytest.mark.parametrize(("side", "most"), [(2, 1.5), (4, 5)])
def test_the_error_beside_that_of_a_direct_convolution(side: int, most: float) -> None:
    """Tiles of 2 x 2 serve images of 2 x 2, tiles of 4 x 4 those of 4 x 4."""
    arguments = case((128, 256, side, side), 256)
    true = exact(*arguments)
    by_torch = results(*arguments, direct)
    got = results(*arguments, conv3x3)
    for place in (0, 1):
        assert error(got[place], true[place]) <= most * error(by_torch[place], true[place])


@given(
    batch=st.integers(0, 3),
    sizes=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    channels=st.tuples(*[st.sampled_from((1, 3, 16, 20, 32, 48))] * 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(batch: int, sizes: tuple[int, int], channels: tuple[int, int], seed: int) -> None:
    arguments = case((batch, channels[0], *sizes), channels[1], seed)
    assert_exact(*arguments)


@given(batch=st.integers(1, 2), height=st.integers(29, 45), width=st.integers(29, 45))
@settings(max_examples=20, deadline=None)
def test_any_height_and_width_by_the_native_implementation(batch: int, height: int, width: int) -> None:
    arguments = case((batch, 16, height, width), 32)
    assert serves(*arguments[:2])
    assert_exact(*arguments)


def test_the_bits_do_not_depend_on_the_number_of_threads_nor_on_the_rest_of_the_batch() -> None:
    images, weight, bias, _ = case((37, 32, 12, 9), 48)
    with threads(1):
        alone = conv3x3(images, weight, bias)
        part = conv3x3(images[5:20].contiguous(memory_format=LAST), weight, bias)
    with threads(3):
        assert torch.equal(conv3x3(images, weight, bias), alone)
    assert torch.equal(part, alone[5:20])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", [2, 16])
def test_what_is_not_finite_does_not_vanish(value: float, side: int) -> None:
    images, weight, bias, _ = case((70, 16, side, side), 16)
    images[3, 5, 1, 1] = value
    out = conv3x3(images, weight, bias)
    depends = direct(images, weight, bias).isfinite().logical_not()
    assert depends.any()
    assert not out[depends].isfinite().any()
    others = [number for number in range(70) if number != 3]
    assert out[others].isfinite().all()


def test_the_second_derivative() -> None:
    images, weight, _, upstream = case((64, 16, 4, 4), 32)

    def squared_gradient(dtype: torch.dtype, convolve: Any) -> Tensor:
        x, w = (tensor.to(dtype).requires_grad_() for tensor in (images, weight))
        (gradient,) = torch.autograd.grad(convolve(x, w), x, upstream.to(dtype), create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), w)[0]

    true = squared_gradient(torch.float64, direct)
    assert error(squared_gradient(torch.float32, conv3x3), true) < 2e-6


def test_a_frozen_weight_keeps_no_images() -> None:
    images, weight, _, _ = case((64, 16, 4, 4), 16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda _: weight):
        conv3x3(images.requires_grad_(), weight)
        assert [tensor.shape for tensor in kept] == [weight.shape]
        conv3x3(images, weight.requires_grad_())
    assert images.shape in [tensor.shape for tensor in kept]


@pytest.mark.parametrize("side", [2, 4])  # tiles of 2 x 2, and of 4 x 4
def test_transforms_that_are_kept_change_no_bit_and_follow_the_weight(side: int) -> None:
    images, weight, bias, upstream = case((64, 32, side, side), 32)
    transforms = WeightTransforms()

    def keeping(*given: Tensor) -> Tensor:
        return conv3x3(*given, transforms=transforms)

    x = images.detach().requires_grad_()
    fresh = gradient_of(x, weight, bias, upstream, conv3x3)
    for _ in range(2):  # computed, then found
        for got, true in zip(gradient_of(x, weight, bias, upstream, keeping), fresh, strict=True):
            assert torch.equal(got, true)
    forward, backward = (transforms.get(weight, flip, side) for flip in (False, True))
    assert forward is not None
    assert backward is not None
    keeping(images, weight)
    assert transforms.get(weight, False, side) is forward
    assert forward.nbytes + backward.nbytes == WeightTransforms.most_bytes(weight) * (side + 2) ** 2 // 36
    assert transforms.get(weight.clone(), False, side) is None  # another weight's memory
    with torch.inference_mode():
        unversioned = weight.clone()
    assert torch.equal(keeping(images, unversioned), conv3x3(images, unversioned))
    assert transforms.get(unversioned, False, side) is None
    assert transforms.get(weight, False, side) is forward
    weight.mul_(2)
    assert transforms.get(weight, False, side) is None
    assert torch.equal(keeping(images, weight), conv3x3(images, weight))


def gradient_of(x: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor, convolve: Any) -> list[Tensor]:
    """Outputs, and the gradient of the images."""
    out = convolve(x, weight, bias)
    return [out.detach(), *torch.autograd.grad(out, x, upstream)]


def test_with_kept_transforms_sixteen_tiles_are_enough() -> None:
    images, weight, bias, upstream = case((16, 32, 4, 4), 32)
    x = images.detach().requires_grad_()
    transforms = WeightTransforms()
    out = conv3x3(x, weight, bias, transforms=transforms)
    assert transforms.get(weight, False, 4) is not None
    true = exact(images, weight, bias, upstream)
    assert error(out.detach(), true[0]) < 2e-6
    assert error(torch.autograd.grad(out, x, upstream)[0], true[1]) < 2e-6
    conv3x3(images[:15].contiguous(memory_format=LAST), weight, bias, transforms=(few := WeightTransforms()))
    assert few.get(weight, False, 4) is None


def test_the_op_is_registered_as_torch_wants_it() -> None:
    for flip in (False, True):
        images, weight, _, _ = case((16, 32, 8, 8), 32)
        learned = (images.requires_grad_(), weight.requires_grad_(), None, flip)
        opcheck(
            torch.ops.engine.conv3x3.default, learned, rtol=1e-3, atol=1e-3
        )  # in whatever layout, sums of 1024


def test_compiled_it_has_the_same_bits() -> None:
    arguments = case((16, 16, 8, 8), 32)
    compiled = torch.compile(conv3x3, fullgraph=True, backend="aot_eager")
    for got, eager in zip(results(*arguments, compiled), results(*arguments, conv3x3), strict=True):
        assert torch.equal(got, eager)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": torch.zeros(2, 3, 4)}, r"images: expected \(B, C, H, W\), got shape \(2, 3, 4\)"),
        ({"weight": torch.zeros(2, 3, 5, 5)}, r"weight: expected shape \(O, 3, 3, 3\), got \(2, 3, 5, 5\)"),
        ({"bias": torch.zeros(3)}, r"bias: expected shape \(2,\), got \(3,\)"),
        ({"weight": torch.zeros(2, 3, 3, 3).double()}, "must have one floating dtype, got torch.float32, "),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Tensor], said: str) -> None:
    call = {"images": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(2, 3, 3, 3), "bias": torch.zeros(2)} | changes
    with pytest.raises(ValueError, match=said):
        conv3x3(*call.values())
