"""Normalisation as the first layer of a network, so that attacks and data always live in [0,1]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

RGB = tuple[float, float, float]

CONSTANTS: dict[str, tuple[RGB, RGB]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
}
"""Mean and standard deviation of the training pixels in [0,1], red, green, blue."""


def constants(dataset: str | None) -> tuple[RGB, RGB]:
    """Mean and standard deviation of a data set; 0.5 and 0.5, which maps [0,1] to [-1,1], where none are known."""
    return CONSTANTS.get(dataset or "", ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))


class Normalize(nn.Module):
    """(x - mean) / std per channel; both are buffers, so that a checkpoint carries them."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: RGB, std: RGB) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(3, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalised images, of the same shape and memory format."""
        return (x_BCHW - self.mean) / self.std
