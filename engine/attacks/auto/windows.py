"""Windows of Square Attack: how large each is, where it lies, and its random signs.

A sample's windows are a function of the seed and the sample alone, and are drawn for all steps at once.

Shape suffixes: B images, K steps, N columns, C channels, H rows, W columns, L levels of the schedule.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.philox import Stream, random_words

_P_INIT = 0.8  # share of the image that the first windows cover
_LAST_STEPS = (11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)  # with a share; it halves after each
_SQUARES, _START = 0, 1  # epochs of the random numbers
_IMAGES_AT_ONCE = 64  # whose numbers are drawn together: the words take 8 bytes each
MAX_CHANNELS = 15  # signs that a column of int16 holds


class Window(NamedTuple):
    """Windows of one step, each of shape (B,). left, top: its first pixel; second_*: of the second, as large.

    signs: bit c is set where channel c gets +1. turned: columns and rows of the pattern change places.
    """

    size_B: Tensor
    level_B: Tensor
    signs_B: Tensor
    turned_B: Tensor
    top_B: Tensor
    left_B: Tensor
    second_top_B: Tensor
    second_left_B: Tensor


def level(step: int) -> int:
    """Number of times that the share of the image has halved before a step. step: from 1 on."""
    return sum(step > last for last in _LAST_STEPS)


def linf_size(level: int, height: int, width: int) -> int:
    """Side of a window: round(sqrt(p H W)), at least 1, within the image."""
    return min(max(_side(level, height, width), 1), height, width)


def l2_size(level: int, height: int, width: int) -> int:
    """Side of a window of the L2 attack: odd and at least 3, unless the image is smaller."""
    return min(max(_side(level, height, width), 3) | 1, height, width)


def _side(level: int, height: int, width: int) -> int:
    return round(math.sqrt(_P_INIT / 2**level * height * width))


def draw(seed: int, sample_B: Tensor, sizes_L: list[int], shape: torch.Size, num_steps: int) -> Tensor:
    """Columns of `Window` of steps 1 to num_steps, and an empty window for step 0; int16, (B, K, N).

    A window's first row is floor(u (H - size)), u uniform in [0, 1): as published, the last row is in no window.
    sizes_L: of each level. shape: of an image, CHW.
    """
    parts = sample_B.split(_IMAGES_AT_ONCE)
    return torch.cat([_draw(seed, part, sizes_L, shape, num_steps) for part in parts])


def _draw(seed: int, sample_B: Tensor, sizes_L: list[int], shape: torch.Size, num_steps: int) -> Tensor:
    height, width = shape[-2:]
    level_K, size_K = _schedule(tuple(sizes_L), num_steps, sample_B.device)
    words_BK4 = random_words(seed, Stream.SQUARE, _SQUARES, sample_B, 4 * num_steps).unflatten(1, (num_steps, 4))
    # A place needs the upper 24 bits of a word, and the signs what is left of the words.
    row_BK, column_BK, second_row_BK, second_column_BK = (words_BK4 >> 8).unbind(2)
    rest_BK4 = words_BK4 & 0xFF
    columns = Window(
        size_K.expand_as(row_BK),
        level_K.expand_as(row_BK),
        ((rest_BK4[..., 0] << 8) | rest_BK4[..., 1]) & (2**MAX_CHANNELS - 1),
        rest_BK4[..., 2] & 1,
        row_BK * (height - size_K) >> 24,
        column_BK * (width - size_K) >> 24,
        second_row_BK * (height - size_K) >> 24,
        second_column_BK * (width - size_K) >> 24,
    )
    windows = torch.stack([column.to(torch.int16) for column in columns], dim=2)
    return torch.cat((torch.zeros_like(windows[:, :1]), windows), dim=1)


@lru_cache(maxsize=16)
def _schedule(sizes_L: tuple[int, ...], num_steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Level and size of steps 1 to num_steps, int64."""
    levels = [level(step) for step in range(1, num_steps + 1)]
    return torch.tensor(levels, device=device), torch.tensor([sizes_L[level] for level in levels], device=device)


def at_step(windows_BKN: Tensor, step_B: Tensor) -> Window:
    """Windows of each image at its step; beyond the last step, those of the last."""
    step_B = step_B.clamp(max=windows_BKN.shape[1] - 1)
    index = step_B[:, None, None].expand(-1, 1, windows_BKN.shape[2])
    return Window(*windows_BKN.gather(1, index).squeeze(1).long().unbind(1))


def inside(first_B: Tensor, size_B: Tensor, length: int) -> Tensor:
    """Mask of those of `length` rows that a window covers, (B, length)."""
    offset_BH = torch.arange(length, device=first_B.device) - first_B[:, None]
    return (offset_BH >= 0) & (offset_BH < size_B[:, None])


def channel_signs(signs_B: Tensor, channels: int) -> Tensor:
    """+1 or -1 of each channel, int64 of shape (B, C)."""
    bit_C = torch.arange(channels, device=signs_B.device)
    return 2 * ((signs_B[:, None] >> bit_C) & 1) - 1


def start_signs(seed: int, sample_B: Tensor, count: int) -> Tensor:
    """+1 or -1, `count` of each image for where it starts, int64."""
    return 2 * (random_words(seed, Stream.SQUARE, _START, sample_B, count) >> 31) - 1


def pattern(size: int) -> Tensor:
    """Two bumps, one above the other and of opposite sign, of L2 norm 1: float64, (size, size)."""
    upper = size // 2
    both = torch.cat((_bump(upper, size), -_bump(size - upper, size)))
    unit: Tensor = both / both.norm()
    return unit


def _bump(height: int, width: int) -> Tensor:
    """Sum over k of 1 / k^2 on boxes that grow by a pixel on each side, of L2 norm 1; empty if height is 0."""
    bump = torch.zeros(height, width, dtype=torch.float64)
    row, column = height // 2, width // 2
    for k in range(max(row, column) + 1):
        bump[max(row - k, 0) : row + k + 1, max(column - k, 0) : column + k + 1] += 1 / (k + 1) ** 2
    return bump / bump.norm() if height else bump


@lru_cache(maxsize=16)
def patterns(sizes_L: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`pattern` of each size and, turned, its transpose: (L, 2, S, S), S the largest size, zero beyond a size."""
    largest = max(sizes_L)
    table = torch.zeros(len(sizes_L), 2, largest, largest, dtype=torch.float64)
    for level, size in enumerate(sizes_L):
        table[level, 0, :size, :size] = pattern(size)
        table[level, 1, :size, :size] = pattern(size).T
    return table.to(device, dtype)
