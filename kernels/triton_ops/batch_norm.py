"""`batch_norm` as Triton kernels: forward and backward each one pass of sums, and one that joins and uses them.

A map is read as rows of all channels. Programs of the first pass write sums of their own rows, and each program of
the second joins all sums of its channels in one order, without atomics: the bits depend on nothing but the shape.
Shape suffixes: R rows, C channels, P parts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHANNELS = 32  # of a program, at most
_VALUES = 4096  # of a tile
_PARTS = tl.constexpr(16)  # joined at once
_SUMMING, _APPLYING = 128, 512  # programs, at most, but that all channels are needed
_WARPS = 8


class _Grid(NamedTuple):
    """Division of a map: tile (BLOCK_R, BLOCK_C), blocks of channels, and rows of a program of either pass."""

    rows: int
    block_rows: int
    block_channels: int
    blocks: int
    summed: int
    applied: int

    @property
    def parts(self) -> int:
        return -(-self.rows // self.summed)

    @property
    def sizes(self) -> dict[str, int]:
        return {"BLOCK_R": self.block_rows, "BLOCK_C": self.block_channels, "num_warps": _WARPS}


def _divide(x: Tensor) -> _Grid:
    channels = x.shape[1]
    rows = x.numel() // channels
    block_channels = min(triton.next_power_of_2(channels), _CHANNELS)
    block_rows = _VALUES // block_channels
    blocks, tiles = triton.cdiv(channels, block_channels), triton.cdiv(rows, block_rows)
    summed, applied = (
        block_rows * triton.cdiv(tiles, max(programs // blocks, 1)) for programs in (_SUMMING, _APPLYING)
    )
    return _Grid(rows, block_rows, block_channels, blocks, summed, applied)


# many parameters: those of the op, in one order for all implementations
def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.batch_norm` of maps in channels_last, and (2, C) mean and 1 / sqrt(var + eps)."""
    grid, channels = _divide(x), x.shape[1]
    y, statistics_2C = torch.empty_like(x), weight.new_empty(2, channels)
    parts_P2C = weight.new_empty(grid.parts, 2, channels)
    with torch.cuda.device_of(x):
        _statistics[(grid.parts, grid.blocks)](
            x, parts_P2C, grid.rows, grid.summed, CHANNELS=channels, **grid.sizes
        )
        _apply[(triton.cdiv(grid.rows, grid.applied), grid.blocks)](
            x, residual, y, weight, bias, running_mean, running_var, parts_P2C, statistics_2C,
            grid.rows, grid.parts, grid.summed, grid.applied, momentum, eps,
            CHANNELS=channels, RELU=relu, **grid.sizes,
        )  # fmt: skip
    return y, statistics_2C


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics_2C: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of `batch_norm`: of x, of the residual where y is given, and (2, C) of weight and bias."""
    grid, channels = _divide(x), x.shape[1]
    grad_x, grad_residual = torch.empty_like(x), None if y is None else torch.empty_like(x)
    grad_parameters_2C = torch.empty_like(statistics_2C)
    parts_P2C = weight.new_empty(grid.parts, 2, channels)
    with torch.cuda.device_of(x):
        _sums[(grid.parts, grid.blocks)](
            grad, x, y, weight, bias, statistics_2C, grad_residual, parts_P2C, grid.rows, grid.summed,
            CHANNELS=channels, RELU=relu, **grid.sizes,
        )  # fmt: skip
        # Where y tells the mask, what the ReLU lets through has been written.
        through, computes_mask = (grad, relu) if grad_residual is None else (grad_residual, False)
        _gradient[(triton.cdiv(grid.rows, grid.applied), grid.blocks)](
            through, x, weight, bias, statistics_2C, parts_P2C, grad_x, grad_parameters_2C,
            grid.rows, grid.parts, grid.applied, CHANNELS=channels, RELU=computes_mask, **grid.sizes,
        )  # fmt: skip
    return grad_x, grad_residual, grad_parameters_2C


# ---------------------------------------------------------------- what the kernels share


@triton.jit
def _channels(CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The channels of a program, and which of them are there."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, c < CHANNELS


@triton.jit
def _tile(row, last, c, CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of a tile that starts at a row, and which of its values are there."""
    r = row + tl.arange(0, BLOCK_R)
    inside = tl.broadcast_to((r < last)[:, None], (BLOCK_R, BLOCK_C))
    if CHANNELS % BLOCK_C:  # else the compiler is not to see a mask across channels: it would narrow the accesses
        inside = inside & (c < CHANNELS)[None, :]
    return r[:, None] * CHANNELS + c[None, :], inside


@triton.jit
def _load(pointer, offset, inside):
    return tl.load(pointer + offset, mask=inside, other=0).to(tl.float32)


@triton.jit
def _normalised(x, mean, scale, bias):
    # Forward and backward must round alike: so fma by name, and not where the compiler sees fit.
    return tl.fma(
        x - mean[None, :], tl.broadcast_to(scale[None, :], x.shape), tl.broadcast_to(bias[None, :], x.shape)
    )


@triton.jit
def _through(grad, output):
    """The part of a gradient that the ReLU lets through; where its output is NaN, all, as in torch."""
    return tl.where(output <= 0, 0.0, grad)


@triton.jit
def _store_part(parts_ptr, first, second, c, there, CHANNELS: tl.constexpr):
    place = parts_ptr + tl.program_id(0) * (2 * CHANNELS) + c
    tl.store(place, first, mask=there)
    tl.store(place + CHANNELS, second, mask=there)


@triton.jit
def _load_parts(parts_ptr, p, parts, which, c, there, CHANNELS: tl.constexpr):
    """(P, C), 0 where there is none."""
    offset = (2 * p + which)[:, None] * CHANNELS + c[None, :]
    return tl.load(parts_ptr + offset, mask=(p < parts)[:, None] & there[None, :], other=0)


# ---------------------------------------------------------------- forward


@triton.jit
def _statistics(
    x_ptr, parts_ptr, rows, summed,
    CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of a part's rows, by deviations from the mean of its first tile."""
    c, there = _channels(CHANNELS, BLOCK_C)
    first = tl.program_id(0).to(tl.int64) * summed
    last = tl.minimum(first + summed, rows)
    offset, inside = _tile(first, last, c, CHANNELS, BLOCK_R, BLOCK_C)
    pivot = tl.sum(_load(x_ptr, offset, inside), 0) / tl.minimum(last - first, BLOCK_R).to(tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for row in range(first, last, BLOCK_R):
        offset, inside = _tile(row, last, c, CHANNELS, BLOCK_R, BLOCK_C)
        apart = tl.where(inside, _load(x_ptr, offset, inside) - pivot[None, :], 0.0)
        total += apart
        squares += apart * apart
    count = (last - first).to(tl.float32)
    sums = tl.sum(total, 0)
    _store_part(parts_ptr, pivot + sums / count, tl.sum(squares, 0) - sums * (sums / count), c, there, CHANNELS)


@triton.jit
def _joined(parts_ptr, rows, parts, summed, c, there, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squared deviations of all rows, by Chan's way to join those of parts."""
    mean = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, parts, _PARTS):
        p = start + tl.arange(0, _PARTS)
        share = tl.maximum(tl.minimum(rows - p * summed, summed), 0).to(tl.float32) / rows
        mean += tl.sum(share[:, None] * _load_parts(parts_ptr, p, parts, 0, c, there, CHANNELS), 0)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, parts, _PARTS):
        p = start + tl.arange(0, _PARTS)
        count = tl.maximum(tl.minimum(rows - p * summed, summed), 0).to(tl.float32)
        apart = _load_parts(parts_ptr, p, parts, 0, c, there, CHANNELS) - mean[None, :]
        inner = _load_parts(parts_ptr, p, parts, 1, c, there, CHANNELS)
        squares += tl.sum(inner + count[:, None] * (apart * apart), 0)
    return mean, squares


# many parameters: a kernel takes each tensor and number by itself
@triton.jit(do_not_specialize=["parts"])
def _apply(
    x_ptr, residual_ptr, y_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, parts_ptr, statistics_ptr,
    rows, parts, summed, applied, momentum, eps,
    CHANNELS: tl.constexpr, RELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c, there = _channels(CHANNELS, BLOCK_C)
    mean, squares = _joined(parts_ptr, rows, parts, summed, c, there, CHANNELS, BLOCK_C)
    rstd = 1 / tl.sqrt_rn(squares / rows + eps)
    if tl.program_id(0) == 0:
        tl.store(statistics_ptr + c, mean, mask=there)
        tl.store(statistics_ptr + CHANNELS + c, rstd, mask=there)
        if running_mean_ptr is not None:
            _move(running_mean_ptr + c, mean, momentum, there)
            _move(running_var_ptr + c, squares / (rows - 1), momentum, there)
    scale, bias = rstd * _load(weight_ptr, c, there), _load(bias_ptr, c, there)
    first = tl.program_id(0).to(tl.int64) * applied
    last = tl.minimum(first + applied, rows)
    for row in range(first, last, BLOCK_R):
        offset, inside = _tile(row, last, c, CHANNELS, BLOCK_R, BLOCK_C)
        y = _normalised(_load(x_ptr, offset, inside), mean, scale, bias)
        if residual_ptr is not None:
            y += _load(residual_ptr, offset, inside)
        if RELU:
            y = tl.where(y < 0, 0.0, y)  # NaN stays
        tl.store(y_ptr + offset, y, mask=inside)


@triton.jit
def _move(running_ptr, value, momentum, there):
    tl.store(running_ptr, momentum * value + (1 - momentum) * tl.load(running_ptr, mask=there), mask=there)


# ---------------------------------------------------------------- backward


# many parameters: a kernel takes each tensor and number by itself
@triton.jit
def _sums(
    grad_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr, statistics_ptr, grad_residual_ptr, parts_ptr, rows, summed,
    CHANNELS: tl.constexpr, RELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of g and g (x - mean) over a part's rows, g what the ReLU lets through; written where y tells it."""
    c, there = _channels(CHANNELS, BLOCK_C)
    mean = _load(statistics_ptr, c, there)
    scale = _load(statistics_ptr + CHANNELS, c, there) * _load(weight_ptr, c, there)
    bias = _load(bias_ptr, c, there)
    first = tl.program_id(0).to(tl.int64) * summed
    last = tl.minimum(first + summed, rows)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for row in range(first, last, BLOCK_R):
        offset, inside = _tile(row, last, c, CHANNELS, BLOCK_R, BLOCK_C)
        x, g = _load(x_ptr, offset, inside), _load(grad_ptr, offset, inside)
        if y_ptr is not None:
            g = _through(g, _load(y_ptr, offset, inside))
            tl.store(grad_residual_ptr + offset, g, mask=inside)
        elif RELU:
            g = _through(g, _normalised(x, mean, scale, bias))
        total += g
        products += g * (x - mean[None, :])
    _store_part(parts_ptr, tl.sum(total, 0), tl.sum(products, 0), c, there, CHANNELS)


# many parameters: a kernel takes each tensor and number by itself
@triton.jit(do_not_specialize=["parts"])
def _gradient(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, statistics_ptr, parts_ptr, grad_x_ptr, grad_parameters_ptr,
    rows, parts, applied,
    CHANNELS: tl.constexpr, RELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_x = scale (g - mean(g) - (x - mean) rstd^2 mean(g (x - mean)))."""
    c, there = _channels(CHANNELS, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    products = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, parts, _PARTS):
        p = start + tl.arange(0, _PARTS)
        total += tl.sum(_load_parts(parts_ptr, p, parts, 0, c, there, CHANNELS), 0)
        products += tl.sum(_load_parts(parts_ptr, p, parts, 1, c, there, CHANNELS), 0)
    mean, rstd = _load(statistics_ptr, c, there), _load(statistics_ptr + CHANNELS, c, there)
    if tl.program_id(0) == 0:
        tl.store(grad_parameters_ptr + c, rstd * products, mask=there)
        tl.store(grad_parameters_ptr + CHANNELS + c, total, mask=there)
    scale, bias = rstd * _load(weight_ptr, c, there), _load(bias_ptr, c, there)
    along_mean, along_var = scale * (total / rows), scale * rstd * rstd * (products / rows)
    first = tl.program_id(0).to(tl.int64) * applied
    last = tl.minimum(first + applied, rows)
    for row in range(first, last, BLOCK_R):
        offset, inside = _tile(row, last, c, CHANNELS, BLOCK_R, BLOCK_C)
        x, g = _load(x_ptr, offset, inside), _load(grad_ptr, offset, inside)
        if RELU:
            g = _through(g, _normalised(x, mean, scale, bias))
        grad_x = scale[None, :] * g - along_mean[None, :] - along_var[None, :] * (x - mean[None, :])
        tl.store(grad_x_ptr + offset, grad_x, mask=inside)
