"""The pipeline of a data set that lives in memory, on the device, as uint8."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.kernels import crop_flip
from engine.kernels.philox import Stream, random_words
from engine.pipelines.base import Batch


class TensorPipeline:
    """Batches of resident images, cropped and flipped on the device; the last batch of an epoch may be smaller.

    images: uint8 NHWC; labels: int64 N. augment: random crop, and random flip where `flip` allows it.
    Raises ValueError where batch_size is below 1 or there is no image.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        seed: int,
        augment: bool,
        flip: bool,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        shuffle: bool = True,
    ) -> None:
        assert images.dtype == torch.uint8, images.dtype
        assert images.dim() == 4, images.shape
        assert len(images) == len(labels), (len(images), len(labels))
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        if not len(images):
            raise ValueError("images: a pipeline needs at least one image, got none")
        self._images_NHWC = images.to(device)
        self._labels_N = labels.to(device)
        self._batch_size = batch_size
        self._seed = seed
        self._augment = augment
        self._flip = flip
        self._dtype = dtype
        self._shuffle = shuffle

    @property
    def num_samples(self) -> int:
        """Images of one epoch: all."""
        return len(self._labels_N)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch, the last partial one included."""
        return -(-self.num_samples // self._batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from start_step on; every sample exactly once from start_step = 0."""
        order_N = self._order(epoch)
        for start in range(start_step * self._batch_size, self.num_samples, self._batch_size):
            sample_B = order_N[start : start + self._batch_size]
            x_nat, labels_B = crop_flip(
                self._images_NHWC,
                self._labels_N,
                sample_B,
                seed=self._seed,
                epoch=epoch,
                flip=self._flip,
                augment=self._augment,
                dtype=self._dtype,
            )
            yield Batch(x_nat, labels_B, sample_B)

    def _order(self, epoch: int) -> Tensor:
        """A permutation by sorted random words; equal words keep the order of the samples."""
        sample_N = torch.arange(self.num_samples, device=self._labels_N.device)
        if not self._shuffle:
            return sample_N
        return random_words(self._seed, Stream.SHUFFLE, epoch, sample_N, 1)[:, 0].argsort(stable=True)
