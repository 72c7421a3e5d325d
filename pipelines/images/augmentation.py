"""Augmentation of single images beside crop and flip, drawn by (seed, epoch, sample) alone. B batch.

Pixels are those of torchvision's functions of Pillow's images: in sum less than half the time of those of tensors,
and no threads of torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from engine.config import ColourJitterConfig
from engine.kernels.philox import Stream, random_words

_BINS = 31
Change = Callable[[Image.Image], Image.Image]
"""From an RGB image to another of its size."""


class Augmentation(NamedTuple):
    """names: of `AUGMENTATIONS`, in the order in which they are applied. colour_jitter: strengths."""

    names: tuple[str, ...]
    colour_jitter: ColourJitterConfig

    def draw(self, seed: int, epoch: int, sample_B: Tensor) -> list[tuple[Change, ...]]:
        """The changes of each sample's image, in order."""
        drawn = [AUGMENTATIONS[name](self, seed, epoch, sample_B) for name in self.names]
        return list(zip(*drawn, strict=True)) if drawn else [()] * len(sample_B)


class Operation(NamedTuple):
    """An operation of TrivialAugment. magnitudes: it takes one of them; signed: or its negative."""

    apply: Callable[[Image.Image, float], Image.Image]
    magnitudes: tuple[float, ...] = (0.0,)
    signed: bool = False


def _evenly(start: float, end: float) -> tuple[float, ...]:
    return tuple(torch.linspace(start, end, _BINS).tolist())


def _sheared(image: Image.Image, x: float, y: float) -> Image.Image:
    """The image with its upper left corner in place. x, y: tangents."""
    degrees = [math.degrees(math.atan(tangent)) for tangent in (x, y)]
    sheared: Image.Image = F.affine(image, 0.0, [0, 0], 1.0, degrees, center=[0.0, 0.0])
    return sheared


def _translated(image: Image.Image, x: float, y: float) -> Image.Image:
    translated: Image.Image = F.affine(image, 0.0, [int(x), int(y)], 1.0, [0.0, 0.0])
    return translated


# The wide space of Müller & Hutter (2021), in the operations and magnitudes of torchvision's TrivialAugmentWide.
OPERATIONS = {
    "Identity": Operation(lambda image, _: image),
    "ShearX": Operation(lambda image, m: _sheared(image, m, 0), _evenly(0, 0.99), True),
    "ShearY": Operation(lambda image, m: _sheared(image, 0, m), _evenly(0, 0.99), True),
    "TranslateX": Operation(lambda image, m: _translated(image, m, 0), _evenly(0, 32), True),
    "TranslateY": Operation(lambda image, m: _translated(image, 0, m), _evenly(0, 32), True),
    "Rotate": Operation(F.rotate, _evenly(0, 135), True),
    "Brightness": Operation(lambda image, m: F.adjust_brightness(image, 1 + m), _evenly(0, 0.99), True),
    "Color": Operation(lambda image, m: F.adjust_saturation(image, 1 + m), _evenly(0, 0.99), True),
    "Contrast": Operation(lambda image, m: F.adjust_contrast(image, 1 + m), _evenly(0, 0.99), True),
    "Sharpness": Operation(lambda image, m: F.adjust_sharpness(image, 1 + m), _evenly(0, 0.99), True),
    "Posterize": Operation(
        lambda image, m: F.posterize(image, int(m)), tuple(float(round(8 - step / 5)) for step in range(_BINS))
    ),
    "Solarize": Operation(lambda image, m: F.solarize(image, 255 * m), _evenly(1, 0)),
    "AutoContrast": Operation(lambda image, _: F.autocontrast(image)),
    "Equalize": Operation(lambda image, _: F.equalize(image)),
}


def _trivial_augment(chosen: Augmentation, seed: int, epoch: int, sample_B: Tensor) -> list[Change]:
    """One operation for each sample. Its words: operation, magnitude, and in the top bit the sign."""
    operations = tuple(OPERATIONS.values())

    def change(which: int, magnitude: int, sign: int) -> Change:
        apply, magnitudes, signed = operations[which * len(operations) >> 32]
        value = magnitudes[magnitude * len(magnitudes) >> 32]
        return lambda image: apply(image, -value if signed and sign >> 31 else value)

    return [change(*words) for words in random_words(seed, Stream.TRIVIAL_AUGMENT, epoch, sample_B, 3).tolist()]


_JITTERS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def _colour_jitter(chosen: Augmentation, seed: int, epoch: int, sample_B: Tensor) -> list[Change]:
    """Four adjustments for each sample, as torchvision's ColorJitter. Its words: factors, and their order."""
    jitter = chosen.colour_jitter
    strength_4 = torch.tensor(
        [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue], dtype=torch.float64
    )
    middle_4 = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    low_4, high_4 = (middle_4 - strength_4).clamp_min(middle_4 - 1), middle_4 + strength_4
    words_B8 = random_words(seed, Stream.COLOUR_JITTER, epoch, sample_B, 8)
    factors_B4 = low_4 + (high_4 - low_4) * (words_B8[:, :4].double() * 2.0**-32)
    order_B4 = words_B8[:, 4:].argsort(dim=1, stable=True)
    return [
        partial(_jittered, factors=factors, order=[i for i in order if strength_4[i] > 0])
        for factors, order in zip(factors_B4.tolist(), order_B4.tolist(), strict=True)
    ]


def _jittered(image: Image.Image, factors: list[float], order: list[int]) -> Image.Image:
    for i in order:
        image = _JITTERS[i](image, factors[i])
    return image


AUGMENTATIONS = {"trivial-augment": _trivial_augment, "colour-jitter": _colour_jitter}
"""Changes of the samples' images after their crops: (what was chosen, seed, epoch, int64 B) -> one for each."""
