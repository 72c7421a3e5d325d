"""Batches of images in [0,1], and the protocol of every pipeline. B batch, C channels or classes, H, W."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def check_images(argument: str, images_N: Tensor) -> None:
    """Raise ValueError, naming the argument, where images are not as `unit_images` takes them, or none."""
    if images_N.dim() != 4 or not (images_N.dtype == torch.uint8 or images_N.dtype.is_floating_point):
        raise ValueError(
            f"{argument}: expected uint8 (N, H, W, C) or float (N, C, H, W), got {images_N.dtype} "
            f"{tuple(images_N.shape)}"
        )
    if not images_N.numel():
        raise ValueError(f"{argument}: there is nothing in images of shape {tuple(images_N.shape)}")
    if images_N.dtype != torch.uint8:
        low, high = (float(bound) for bound in images_N.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"{argument}: floats must lie in [0, 1], got {low:g}..{high:g}")


def unit_images(images_N: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Images as evaluation gives them to a network: v / 255, NCHW and channels-last, on the device.

    images_N: uint8 NHWC, or float NCHW in [0, 1].
    """
    x_N = images_N.to(device)
    if x_N.dtype == torch.uint8:
        x_N = x_N.permute(0, 3, 1, 2).to(dtype) / 255
    return x_N.to(dtype, memory_format=torch.channels_last)


@dataclass(frozen=True, eq=False)
class Mixture:
    """Other images that are mixed into those of a batch.

    labels: int64 B, of the others. share: float B in [0,1], of each own image in the mixed one.
    """

    labels: Tensor
    share: Tensor
    num_classes: int


@dataclass(frozen=True, eq=False)
class Batch:
    """Images and labels of one training step, on the device of the training.

    x_nat: float BCHW in [0,1], channels_last. labels: int64 B. sample: int64 B, each image's index in the split;
    with (seed, epoch) it decides the image's randomness, whichever batch it stands in. mixture: of mixed images.
    All are the batch's own: no later one is written over them.
    """

    x_nat: Tensor
    labels: Tensor
    sample: Tensor
    mixture: Mixture | None = None

    @property
    def targets(self) -> Tensor:
        """Labels that an attack leads away from; of mixed images the share of each class, float BC."""
        if self.mixture is None:
            return self.labels
        classes_C = torch.arange(self.mixture.num_classes, device=self.labels.device)
        share_B1 = self.mixture.share[:, None]
        own_BC, other_BC = (labels[:, None] == classes_C for labels in (self.labels, self.mixture.labels))
        return share_B1 * own_BC + (1 - share_B1) * other_BC

    @property
    def main_labels(self) -> Tensor:
        """The label of the larger share of each image, int64 B."""
        if self.mixture is None:
            return self.labels
        return torch.where(self.mixture.share >= 0.5, self.labels, self.mixture.labels)

    def split(self, where: int | list[int]) -> list[Batch]:
        """The batch in so many parts, as even as possible, or cut at these indices."""
        images, labels, samples = (tensor.tensor_split(where) for tensor in (self.x_nat, self.labels, self.sample))
        if self.mixture is None:
            return [Batch(*part) for part in zip(images, labels, samples, strict=True)]
        others, shares = (tensor.tensor_split(where) for tensor in (self.mixture.labels, self.mixture.share))
        parts = zip(others, shares, strict=True)
        mixtures = [Mixture(labels_B, share_B, self.mixture.num_classes) for labels_B, share_B in parts]
        return [Batch(*part) for part in zip(images, labels, samples, mixtures, strict=True)]


class Pipeline(Protocol):
    """Batches that are a pure function of (seed, epoch, step)."""

    @property
    def num_samples(self) -> int:
        """Images of one epoch, of all ranks together."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from start_step on, without producing the earlier ones; of this rank."""

    def close(self) -> None:
        """End the epochs that were left before their end, and their threads."""
