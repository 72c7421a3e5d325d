"""Photographs that are made, for measurements where there are none: JPEG files of 224 x 224 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

CLASSES = ("calm", "rough")
SIZE = 224
QUALITY = 90
STRENGTHS = ((3, 40.0), (12, 20.0), (48, 10.0), (SIZE, 8.0))  # of noise of so many points a side
NOTHING = np.zeros((), np.float32)


def make(folder: Path, count: int, seed: int = 0, *, test_images: int = 2 * len(CLASSES)) -> Path:
    """`train/<class>/*.jpg`, so many of them, and some in `test`: the same files for the same seed.

    Large shapes and grain, in such parts that a file is as long as a photograph's of that size.
    """
    generator = np.random.default_rng(seed)
    for part, images in (("train", count), ("test", test_images)):
        for number in range(images):
            path = folder / part / CLASSES[number % len(CLASSES)] / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(generator).save(path, "JPEG", quality=QUALITY)
    return folder


def picture(generator: np.random.Generator) -> Image.Image:
    """Waves of all sizes, the stronger the longer they are, as in photographs."""
    grey, *colours = (sum((s * _waves(generator, n) for n, s in STRENGTHS), start=NOTHING) for _ in range(4))
    pixels = 128 + grey[..., None] + 0.4 * np.stack(colours, axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _waves(generator: np.random.Generator, size: int) -> npt.NDArray[np.float32]:
    noise = Image.fromarray(generator.standard_normal((size, size), np.float32))
    return np.asarray(noise.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
