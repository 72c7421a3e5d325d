"""Normalisation as the first layer of a network, so that attacks and data always live in [0,1]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from engine.common.lookup import look_up

RGB = tuple[float, float, float]

CONSTANTS: dict[str, tuple[RGB, RGB]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation of the training pixels in [0,1], red, green, blue."""


def constants(dataset: str | None) -> tuple[RGB, RGB]:
    """Mean and standard deviation of a data set; 0.5 and 0.5, which maps [0,1] to [-1,1], where none are known."""
    return CONSTANTS.get(dataset or "", ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))


def normalisation(given: str | tuple[Sequence[float], ...]) -> tuple[RGB, RGB]:
    """Mean and standard deviation by a data set's name, or as given: three numbers each.

    Raises ValueError for an unknown name, and for numbers that are none of images in [0, 1].
    """
    if isinstance(given, str):
        return look_up("normalize", given, CONSTANTS)
    if len(given) != 2 or any(len(numbers) != 3 for numbers in given):
        raise ValueError(f"normalize: a mean and a std of three numbers each are expected, got {given}")
    mean, std = (tuple(float(number) for number in numbers) for numbers in given)
    if not all(math.isfinite(number) for number in (*mean, *std)) or min(std) <= 0:
        raise ValueError(f"normalize: finite numbers and a std above 0 are expected, got {mean} and {std}")
    if min(mean) < 0 or max(*mean, *std) > 1:
        raise ValueError(
            f"normalize: images are in [0, 1], and so are mean and std; got {mean} and {std}: of [0, 255]?"
        )
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def from_text(name: str | None, mean: str | None, std: str | None) -> str | tuple[RGB, RGB] | None:
    """Argument of `normalisation` as a user writes it: a name, or "R,G,B" twice, which may be fractions of 255.

    Raises ValueError for numbers that are none, one without the other, and both ways at once.
    """
    if mean is None and std is None:
        return name
    if name is not None or mean is None or std is None:
        raise ValueError("--normalize-mean and --normalize-std belong together, and without --normalize")
    found = []
    for option, text in (("--normalize-mean", mean), ("--normalize-std", std)):
        try:
            found.append([float(Fraction(part.strip())) for part in text.split(",")])
        except (ValueError, ArithmeticError):
            raise ValueError(
                f"{option}: three numbers are expected, as 0.49,0.48,0.45, got {text!r:.100}"
            ) from None
    return normalisation((found[0], found[1]))


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
