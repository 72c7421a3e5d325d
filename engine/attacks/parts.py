"""Many large images in parts that fit into the memory, for measurements, which are of each image alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_MOST_PIXELS = 32 * 224**2


def most_images(height: int, width: int) -> int:
    """As many images of that size as have the pixels of 32 images of 224 x 224, at least one."""
    return max(1, _MOST_PIXELS // (height * width))


def parts(x_N: Tensor, labels_N: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(images, labels, their indices) of at most `most_images` each. x_N: (N, C, H, W)."""
    sample_N = torch.arange(len(x_N), device=x_N.device)
    whole = (x_N, labels_N, sample_N)
    yield from zip(*(values.split(most_images(*x_N.shape[2:])) for values in whole), strict=True)
