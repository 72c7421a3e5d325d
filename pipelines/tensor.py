"""Pipeline of uint8 images in the device's memory: nothing is loaded, a batch is one pass over memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.profiler import record_function

from engine.kernels import crop_flip
from engine.pipelines.base import Batch
from engine.pipelines.sampling import SampledPipeline, Sampling, to_device
from engine.pipelines.splits import Split


class TensorPipeline(SampledPipeline):
    """Batches of a split, cropped and flipped on the device.

    augment: random crop, and random flip where `flip` allows it. dtype: of the images in the batches.
    """

    def __init__(
        self,
        data: Split,
        sampling: Sampling,
        *,
        augment: bool,
        flip: bool,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert len(data) == sampling.num_images, (len(data), sampling.num_images)
        super().__init__(sampling)
        self._images_NHWC = data.images.to(device)
        self._labels_N = data.labels.to(device)
        self._augment = augment
        self._flip = flip
        self._dtype = dtype

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from start_step on, of this rank; one without samples is empty."""
        for sample_B in to_device(self._sampling.batches(epoch, start_step), self._labels_N.device):
            with record_function("crop_flip"):
                x_nat, labels_B = crop_flip(
                    self._images_NHWC,
                    self._labels_N,
                    sample_B,
                    seed=self._sampling.seed,
                    epoch=epoch,
                    flip=self._flip,
                    augment=self._augment,
                    dtype=self._dtype,
                )
            yield Batch(x_nat, labels_B, sample_B)

    def close(self) -> None:
        """Do nothing: no thread runs between batches."""
