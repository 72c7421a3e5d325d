"""Convolution 3x3 of stride 1 and padding 1, on a CPU by Winograd's minimal filtering.

Shape suffixes: B batch, C channels in, O channels out, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.kernels import dispatch, reference
from engine.kernels.contract import WeightTransforms, check_device

# By the multiplications that it needs, equal ones by the smaller tile, whose rounding error is the smaller one.
_TILES = (2, 4)
_CHANNELS = 16  # the native implementation computes multiples of
_LEAST_TILES = 64  # with fewer the transformation of the weights takes longer than it saves
_LEAST_TILES_KEPT = 16  # where that is kept


def conv3x3(
    images_BCHW: Tensor,
    weight_OC33: Tensor,
    bias_O: Tensor | None = None,
    *,
    transforms: WeightTransforms | None = None,
) -> Tensor:
    """y[b, o, h, w] = bias[o] + sum over c, i, j of weight[o, c, i, j] x[b, c, h + i - 1, w + j - 1].

    x: the images, 0 outside of them. images, weight, bias: of one floating dtype. Gradients of any order; that of
    the weight is torch's own.
    Native for float32 images on a CPU in channels-last with channels in multiples of 16 and 64 tiles or more: in
    tiles of 4 x 4 outputs, 4 times fewer multiplications and 2 to 3 times the rounding error of a direct
    convolution, or of 2 x 2, 2.25 times fewer and about the same error. A pixel that is not finite makes outputs
    of its tiles NaN or infinite, among them all that depend on it. Elsewhere it is torch's convolution.
    transforms: keeps what is computed of this weight alone for the next calls; 16 tiles are enough then.
    Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016.
    """
    if images_BCHW.dim() != 4:
        raise ValueError(f"images: expected (B, C, H, W), got shape {tuple(images_BCHW.shape)}")
    if weight_OC33.dim() != 4 or weight_OC33.shape[1:] != (images_BCHW.shape[1], 3, 3):
        expected = f"(O, {images_BCHW.shape[1]}, 3, 3)"
        raise ValueError(f"weight: expected shape {expected}, got {tuple(weight_OC33.shape)}")
    if bias_O is not None and bias_O.shape != weight_OC33.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight_OC33.shape[0]},), got {tuple(bias_O.shape)}")
    given = [tensor for tensor in (images_BCHW, weight_OC33, bias_O) if tensor is not None]
    if not all(tensor.dtype == images_BCHW.dtype and tensor.dtype.is_floating_point for tensor in given):
        dtypes = ", ".join(str(tensor.dtype) for tensor in given)
        raise ValueError(f"images, weight and bias must have one floating dtype, got {dtypes}")
    check_device(images=images_BCHW, weight=weight_OC33, bias=bias_O)
    if not _is_native(images_BCHW, weight_OC33, transforms):
        return reference.conv3x3(images_BCHW, weight_OC33, bias_O)
    if torch.compiler.is_compiling():
        by_op: Tensor = _op(images_BCHW, weight_OC33, bias_O, False)
        return by_op
    result: Tensor = _Convolution.apply(images_BCHW, weight_OC33, bias_O, False, transforms)
    return result


def least_batch(height: int, width: int, transforms: WeightTransforms | None) -> int:
    """Images of that size from which on their number does not decide which implementation serves."""
    return -(-_least_tiles(transforms) // _tiles(1, height, width, _tile(height, width)))


def _least_tiles(transforms: WeightTransforms | None) -> int:
    return _LEAST_TILES if transforms is None else _LEAST_TILES_KEPT


def _is_native(images: Tensor, weight: Tensor, transforms: WeightTransforms | None) -> bool:
    batch, channels, height, width = images.shape
    fused = (
        images.dtype == torch.float32
        and channels % _CHANNELS == weight.shape[0] % _CHANNELS == 0
        and _tiles(batch, height, width, _tile(height, width)) >= _least_tiles(transforms)
        and images.is_contiguous(memory_format=torch.channels_last)
    )
    return dispatch.choose("conv3x3", images.device, fused=fused) == "native"


def _tiles(batch: int, height: int, width: int, tile: int) -> int:
    return batch * -(-height // tile) * -(-width // tile)


def _tile(height: int, width: int) -> int:
    return min(_TILES, key=lambda tile: _tiles(1, height, width, tile) * (tile + 2) ** 2)


def _compute(
    images: Tensor, weight: Tensor, bias: Tensor | None, flip: bool, transforms: WeightTransforms | None = None
) -> Tensor:
    serve = dispatch.fused("native", "conv3x3", "conv3x3")
    images = images.contiguous(memory_format=torch.channels_last)
    result: Tensor = serve(images, weight, bias, flip, _tile(*images.shape[2:]), transforms)
    return result


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, _, ctx.flip, *_ = inputs
    # Of a frozen weight no gradient is asked for, and the images need not stay in memory.
    ctx.save_for_backward(weight, images if weight.requires_grad else None)


def _gradients(ctx: Any, upstream: Tensor, convolve: Any) -> tuple[Tensor | None, ...]:
    """Those of the images, by the transposed kernel and its places in reverse, of the weight and of the bias."""
    weight, images = ctx.saved_tensors
    upstream = upstream.contiguous(memory_format=torch.channels_last)
    of_images = of_weight = of_bias = None
    if ctx.needs_input_grad[0]:
        of_images = convolve(upstream, weight, None, not ctx.flip)
    if ctx.needs_input_grad[1]:
        # A transposed convolution is the gradient of a convolution, whose images and upstream change places.
        given, out = (upstream, images) if ctx.flip else (images, upstream)
        of_weight = torch.ops.aten.convolution_backward(
            out, given, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
        )[1]
    if ctx.needs_input_grad[2]:
        of_bias = upstream.sum((0, 2, 3))
    return of_images, of_weight, of_bias, None


class _Convolution(torch.autograd.Function):
    """flip: the weight (C, O, 3, 3) is transposed, and its rows and columns are in reverse."""

    @staticmethod
    def forward(
        images: Tensor, weight: Tensor, bias: Tensor | None, flip: bool, transforms: WeightTransforms | None
    ) -> Tensor:
        return _compute(images, weight, bias, flip, transforms)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs, output)
        ctx.transforms = inputs[-1]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        def convolve(*given: Any) -> Tensor:
            result: Tensor = _Convolution.apply(*given, ctx.transforms)
            return result

        return *_gradients(ctx, upstream, convolve), None


@torch.library.custom_op("engine::conv3x3", mutates_args=())
def _op(images: Tensor, weight: Tensor, bias: Tensor | None, flip: bool) -> Tensor:
    return _compute(images, weight, bias, flip)


@_op.register_fake
def _(images: Tensor, weight: Tensor, bias: Tensor | None, flip: bool) -> Tensor:
    shape = (images.shape[0], weight.shape[1 if flip else 0], *images.shape[2:])
    return torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, upstream, _op)


_op.register_autograd(_backward, setup_context=_save)
