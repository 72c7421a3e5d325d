"""Batches of images in [0,1], and the protocol of every pipeline. B batch, C channels, H, W."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Images and labels of one training step, on the device of the training.

    x_nat: float BCHW in [0,1], channels_last. labels: int64 B. sample: int64 B, each image's index in the split;
    with (seed, epoch) it decides the image's randomness, whichever batch it stands in. All are the batch's own: no
    later one is written over them.
    """

    x_nat: Tensor
    labels: Tensor
    sample: Tensor


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
