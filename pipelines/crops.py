"""Crops of images of any size, mirrored or not. B batch.

A crop is a function of (seed, epoch, sample) and of the image's size alone. Only operations that IEEE 754 rounds
correctly make it, so it is the same to the bit in every batch, in every pipeline and on every machine.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.philox import Stream, random_words

RANDOM_RESIZED_CROP = "random-resized-crop"
"""Name of `random_crops` in a configuration, for images of one size."""

_TRIES = 10
_MIN_AREA = 0.08  # of the image's
_MAX_LOG_RATIO = 0.28768207245178096  # log(4/3)


class Crops(NamedTuple):
    """int64 B each: rows top..top + height and columns left..left + width of an image; flip: 1 where mirrored."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor


def random_crops(seed: int, epoch: int, sample_B: Tensor, heights_B: Tensor, widths_B: Tensor) -> Crops:
    """Crops of random area, shape and place, for training (Szegedy et al., 2015, "Inception").

    A try draws area ~ U(0.08, 1) H W and ratio ~ exp U(log 3/4, log 4/3), and rounds (area / ratio)**0.5 and
    (area ratio)**0.5 to a height and a width; its place is uniform. The first of ten tries that fits the image
    counts, and failing all, the largest crop in the centre with a ratio from 3/4 to 4/3. As RandomResizedCrop of
    torchvision does, in distribution.

    Try t has the sample's words 4 t to 4 t + 3 of `Stream.AUGMENT`: area, ratio, top, left. The top bit of word 40
    is the flip. sample_B, heights_B, widths_B: int64; sizes from 1 to 2**31 - 1.
    """
    words = random_words(seed, Stream.AUGMENT, epoch, sample_B, 4 * _TRIES + 1)
    area_BT, ratio_BT, top_BT, left_BT = words[:, :-1].unflatten(1, (_TRIES, 4)).unbind(2)
    heights_B1, widths_B1 = heights_B[:, None], widths_B[:, None]

    scale_BT = _MIN_AREA + (1 - _MIN_AREA) * _unit(area_BT)
    side_BT = (scale_BT * (heights_B1 * widths_B1)).sqrt()
    stretch_BT = _exp(_MAX_LOG_RATIO * (_unit(ratio_BT) - 0.5))  # the root of the ratio
    height_BT, width_BT = (side_BT / stretch_BT).round().long(), (side_BT * stretch_BT).round().long()
    fits_BT = (height_BT > 0) & (height_BT <= heights_B1) & (width_BT > 0) & (width_BT <= widths_B1)
    found_B, try_B1 = fits_BT.any(1), fits_BT.int().argmax(1, keepdim=True)

    def chosen(of_tries_BT: Tensor, otherwise_B: Tensor) -> Tensor:
        return torch.where(found_B, of_tries_BT.gather(1, try_B1)[:, 0], otherwise_B)

    # Of each side and of what the ratio's bound makes of the other one, the shorter fits.
    height_B = chosen(height_BT, torch.minimum(heights_B, (4 * widths_B + 1) // 3))
    width_B = chosen(width_BT, torch.minimum(widths_B, (4 * heights_B + 1) // 3))
    room_B, aside_B = heights_B - height_B, widths_B - width_B
    top_B = chosen(top_BT * (room_B + 1)[:, None] >> 32, room_B // 2)
    left_B = chosen(left_BT * (aside_B + 1)[:, None] >> 32, aside_B // 2)
    return Crops(top_B, left_B, height_B, width_B, words[:, -1] >> 31)


def centre_crops(heights_B: Tensor, widths_B: Tensor) -> Crops:
    """The central square of 224/256 of the shorter side, unmirrored, for evaluation.

    Resized to S, it shows what the centre S x S does of an image whose shorter side was resized to 256/224 S, but
    for rounding. heights_B, widths_B: int64, 1 or more.
    """
    side_B = (7 * torch.minimum(heights_B, widths_B) + 4) // 8
    return Crops((heights_B - side_B) // 2, (widths_B - side_B) // 2, side_B, side_B, torch.zeros_like(side_B))


def _unit(word: Tensor) -> Tensor:
    """Word / 2**32: numbers in [0,1), exactly."""
    return word.double() * 2.0**-32


def _exp(x: Tensor) -> Tensor:
    """e**x for |x| < 0.15, to the last bit or two of float64, by its series: libraries and vector units differ."""
    result = torch.ones_like(x)
    for n in range(12, 0, -1):
        result = 1 + x / n * result
    return result
