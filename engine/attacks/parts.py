"""Many large images in parts that fit into the memory, for measurements, which are of each image alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.common.numbers import check_whole

_MOST_PIXELS = 32 * 224**2
_MOST_IMAGES = {"cpu": 64}  # of more a layer's activations leave the caches: docs/performance.md has figures
_USUAL_IMAGES = 250


def most_images(height: int, width: int) -> int:
    """As many images of that size as have the pixels of 32 images of 224 x 224, at least one."""
    return max(1, _MOST_PIXELS // (height * width))


def size_of_batch(chosen: int | None, device: torch.device, height: int, width: int) -> int:
    """Images per forward: as chosen, else 250, on a CPU 64, but at most the pixels of 32 images of 224 x 224.

    Raises ValueError where less than 1 is chosen.
    """
    if chosen is not None:
        check_whole("batch_size", chosen, least=1)
        return chosen
    return min(_MOST_IMAGES.get(device.type, _USUAL_IMAGES), most_images(height, width))


def parts(x_N: Tensor, labels_N: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(images, labels, their indices) of at most `most_images` each. x_N: (N, C, H, W)."""
    sample_N = torch.arange(len(x_N), device=x_N.device)
    whole = (x_N, labels_N, sample_N)
    yield from zip(*(values.split(most_images(*x_N.shape[2:])) for values in whole), strict=True)
