"""`image_conv3x3` as Triton kernels: products of matrices whose left side is gathered from the maps.

A program has some pixels of the batch, in the order of memory. Products are of float32, each of three numbers in
bfloat16 on tensor cores ("bf16x6"), with about the rounding error of float32.
Shape suffixes: P pixels, C channels of the maps, K 27 numbers of images that a pixel depends on, in 32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton_ops.pgd_update import count, moved

_FORWARD, _BACKWARD = (32, 64), (64, 32)  # pixels of a program, and channels at once, at most
_WARPS = 4
_LEAST = 16  # rows and columns of a product
_RGB = tl.constexpr(3)
_TAPS = tl.constexpr(9)


def image_conv3x3(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.image_conv3x3` of float32 in channels_last."""
    batch, _, height, width = images.shape
    channels = len(weight)
    shape = (batch, channels, height, width)
    y = torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    sizes = _sizes(y, _FORWARD)
    grid = (triton.cdiv(batch * height * width, sizes["BLOCK_P"]), triton.cdiv(channels, sizes["BLOCK_C"]))
    with torch.cuda.device_of(images):
        _image_conv[grid](images, weight, bias, mean, std, y, batch * height * width, **sizes)
    return y


def image_conv3x3_backward(grad: Tensor, weight: Tensor, std: Tensor | None) -> Tensor:
    """Gradient of the images, float32 in channels_last. grad: in channels_last."""
    batch, _, height, width = grad.shape
    shape = (batch, _RGB.value, height, width)
    images = torch.empty(shape, dtype=torch.float32, device=grad.device, memory_format=torch.channels_last)
    pixels, sizes = batch * height * width, _sizes(grad, _BACKWARD)
    with torch.cuda.device_of(grad):
        _image_gradient[(triton.cdiv(pixels, sizes["BLOCK_P"]),)](grad, weight, std, images, pixels, **sizes)
    return images


def image_conv3x3_update(
    x_adv: Tensor,
    grad: Tensor,
    x_nat: Tensor,
    weight: Tensor,
    std: Tensor | None,
    epsilon: float,
    step_size: float,
    counts: Tensor | None,
) -> None:
    """`reference.pgd_update` in L-inf by the gradient of `image_conv3x3_backward`, which is not written."""
    pixels, sizes = grad[:, 0].numel(), _sizes(grad, _BACKWARD)
    with torch.cuda.device_of(grad):
        _image_update[(triton.cdiv(pixels, sizes["BLOCK_P"]),)](
            grad, weight, std, x_adv, x_nat, counts, epsilon, step_size, pixels, **sizes
        )


def _sizes(map_: Tensor, most: tuple[int, int]) -> dict[str, int]:
    """Sizes of a map (B, C, H, W), and pixels and channels of a block of it."""
    channels, height, width = map_.shape[1:]
    block = min(max(triton.next_power_of_2(channels), _LEAST), most[1])
    sizes = {"CHANNELS": channels, "HEIGHT": height, "WIDTH": width}
    return sizes | {"BLOCK_P": most[0], "BLOCK_C": block, "num_warps": _WARPS}


@triton.jit
def _pixels(pixels, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr):
    """Numbers of a program's pixels, which of them are there, and their rows and columns."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    return p, p < pixels, p // WIDTH % HEIGHT, p % WIDTH


# many parameters: a kernel takes each tensor and number by itself
@triton.jit
def _image_conv(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, std_ptr, y_ptr, pixels,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    p, there, row, column = _pixels(pixels, HEIGHT, WIDTH, BLOCK_P)
    k = tl.arange(0, 32)
    down, right, rgb = k // 9 - 1, k // 3 % 3 - 1, k % 3
    row, column = row[:, None] + down[None, :], column[:, None] + right[None, :]
    inside = there[:, None] & (k < _TAPS * _RGB)[None, :]
    inside = inside & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    offset = (p[:, None] + down[None, :] * WIDTH + right[None, :]) * _RGB + rgb[None, :]
    x_PK = tl.load(x_ptr + offset, mask=inside, other=0)
    if mean_ptr is not None:
        mean, std = tl.load(mean_ptr + rgb), tl.load(std_ptr + rgb)
        normalised = tl.div_rn(x_PK - mean[None, :], tl.broadcast_to(std[None, :], x_PK.shape))
        x_PK = tl.where(inside, normalised, 0.0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = (k < _TAPS * _RGB)[:, None] & (c < CHANNELS)[None, :]
    weight_KC = tl.load(weight_ptr + c[None, :] * (_TAPS * _RGB) + k[:, None], mask=exists, other=0)
    y_PC = tl.dot(x_PK, weight_KC, input_precision="bf16x6")
    if bias_ptr is not None:
        y_PC += tl.load(bias_ptr + c, mask=c < CHANNELS, other=0)[None, :]
    place, written = _places(p, there, c, CHANNELS, BLOCK_P, BLOCK_C)
    tl.store(y_ptr + place, y_PC, mask=written)


@triton.jit
def _places(p, there, c, CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of pixels and channels in a map, and which are there."""
    inside = tl.broadcast_to(there[:, None], (BLOCK_P, BLOCK_C))
    if CHANNELS % BLOCK_C:  # else the compiler is not to see a mask across channels: it would narrow the accesses
        inside = inside & (c < CHANNELS)[None, :]
    return p[:, None].to(tl.int64) * CHANNELS + c[None, :], inside


# many parameters: a kernel takes each tensor and number by itself
@triton.jit
def _gradient(
    grad_ptr, weight_ptr, std_ptr, pixels,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of a program's pixels (P, 16), 3 columns of it red, green and blue; places, and which."""
    p, there, row, column = _pixels(pixels, HEIGHT, WIDTH, BLOCK_P)
    rgb = tl.arange(0, 16)
    sum_P16 = tl.zeros((BLOCK_P, 16), tl.float32)
    for tap in range(_TAPS):
        down, right = tap // 3 - 1, tap % 3 - 1
        inside = there & (row >= down) & (row - down < HEIGHT) & (column >= right) & (column - right < WIDTH)
        for first in range(0, CHANNELS, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            place, read = _places(p - down * WIDTH - right, inside, c, CHANNELS, BLOCK_P, BLOCK_C)
            grad_PC = tl.load(grad_ptr + place, mask=read, other=0).to(tl.float32)
            exists = (c < CHANNELS)[:, None] & (rgb < _RGB)[None, :]
            offset = c[:, None] * (_TAPS * _RGB) + tap * _RGB + rgb[None, :]
            weight_C16 = tl.load(weight_ptr + offset, mask=exists, other=0)
            sum_P16 = tl.dot(grad_PC, weight_C16, sum_P16, input_precision="bf16x6")
    if std_ptr is not None:
        std = tl.load(std_ptr + rgb, mask=rgb < _RGB, other=1)
        sum_P16 = tl.div_rn(sum_P16, tl.broadcast_to(std[None, :], sum_P16.shape))
    return sum_P16, p[:, None] * _RGB + rgb[None, :], there[:, None] & (rgb < _RGB)[None, :]


# many parameters: a kernel takes each tensor and number by itself
@triton.jit
def _image_gradient(
    grad_ptr, weight_ptr, std_ptr, images_ptr, pixels,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    gradient, place, inside = _gradient(
        grad_ptr, weight_ptr, std_ptr, pixels, CHANNELS, HEIGHT, WIDTH, BLOCK_P, BLOCK_C
    )
    tl.store(images_ptr + place, gradient, mask=inside)


# many parameters: a kernel takes each tensor and number by itself
@triton.jit
def _image_update(
    grad_ptr, weight_ptr, std_ptr, x_ptr, nat_ptr, counts_ptr, epsilon, step_size, pixels,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    gradient, place, inside = _gradient(
        grad_ptr, weight_ptr, std_ptr, pixels, CHANNELS, HEIGHT, WIDTH, BLOCK_P, BLOCK_C
    )
    x, nat = tl.load(x_ptr + place, mask=inside, other=0), tl.load(nat_ptr + place, mask=inside, other=0)
    tl.store(x_ptr + place, moved(x, gradient, nat, epsilon, step_size), mask=inside)
    if counts_ptr is not None:
        # An infinite gradient times the 0 beside the three columns is NaN.
        count(counts_ptr, tl.where(inside, gradient, 0.0), inside)
