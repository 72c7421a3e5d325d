"""`crop_flip` as one Triton kernel. A program writes a block of a view; the first one of a view its label, too."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.philox import Stream
from engine.kernels.triton_ops import CHECKED, two_floats

_BLOCK = 1024
_STREAM = tl.constexpr(int(Stream.AUGMENT))
_PER_255 = tl.constexpr(two_floats(1 / 255))


# many parameters: those of the op, in one order for all implementations
def crop_flip(
    x_BCHW: Tensor,
    labels_B: Tensor,
    images_NHWC: Tensor,
    labels_N: Tensor,
    sample_B: Tensor,
    seed: int,
    epoch: int,
    padding: int,
    flip: bool,
    augment: bool,
    index_B: Tensor | None = None,
) -> None:
    """`reference.crop_flip` of contiguous images into float32."""
    count, height, width, channels = images_NHWC.shape
    if not len(sample_B):
        return
    grid = (len(sample_B), triton.cdiv(height * width * channels, _BLOCK))
    with torch.cuda.device_of(x_BCHW):
        _crop_flip[grid](
            x_BCHW,
            labels_B,
            images_NHWC,
            labels_N,
            sample_B,
            index_B,
            count,
            seed,
            epoch,
            HEIGHT=height,
            WIDTH=width,
            CHANNELS=channels,
            PADDING=padding,
            FLIP=flip,
            AUGMENT=augment,
            BLOCK=_BLOCK,
            num_warps=4,
            **CHECKED,
        )


# many parameters: pointers, numbers and constants of a kernel
@triton.jit(do_not_specialize=["count", "seed", "epoch"])
def _crop_flip(
    x_ptr,
    labels_B_ptr,
    images_ptr,
    labels_N_ptr,
    sample_ptr,
    index_ptr,
    count: tl.int64,
    seed: tl.uint64,
    epoch: tl.uint32,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDING: tl.constexpr,
    FLIP: tl.constexpr,
    AUGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SIZE: tl.constexpr = HEIGHT * WIDTH * CHANNELS
    view = tl.program_id(0).to(tl.int64)
    sample = tl.load(sample_ptr + view)
    index = sample if index_ptr is None else tl.load(index_ptr + view)
    known = (index >= 0) & (index < count)
    tl.device_assert(known, "crop_flip: an image is out of range")

    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, column, channel = value // (WIDTH * CHANNELS), value // CHANNELS % WIDTH, value % CHANNELS
    if AUGMENT:
        words = tl.philox(seed, 0, sample.to(tl.uint32), epoch.to(tl.uint32), _STREAM)
        if FLIP:
            column = tl.where(words[2] >> 31 == 1, WIDTH - 1 - column, column)
        row += tl.umulhi(words[0], 2 * PADDING + 1).to(tl.int32) - PADDING
        column += tl.umulhi(words[1], 2 * PADDING + 1).to(tl.int32) - PADDING
    inside = known & (value < SIZE) & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    source = images_ptr + index * SIZE + ((row * WIDTH + column) * CHANNELS + channel)
    pixel = tl.load(source, mask=inside, other=0).to(tl.float32)
    quotient = tl.fma(pixel, _PER_255[0], pixel * _PER_255[1])  # equals the division for all 256 values
    tl.store(x_ptr + view * SIZE + value, quotient, mask=value < SIZE)
    if tl.program_id(1) == 0:
        tl.store(labels_B_ptr + view, tl.load(labels_N_ptr + index, mask=known, other=-1))
