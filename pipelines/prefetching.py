"""Images loaded batch by batch, in advance: the base of all pipelines but `tensor`. B batch, C, H, W."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import closing
from typing import TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.profiler import record_function

from engine.kernels import crop_flip
from engine.pipelines.base import Batch
from engine.pipelines.crops import Crops, centre_crops, random_crops
from engine.pipelines.reading.encoded import EncodedImages
from engine.pipelines.sampling import SampledPipeline, Sampling, to_device
from engine.pipelines.splits import Split

Item = TypeVar("Item")
Made = TypeVar("Made")


def prefetched(pool: Executor, make: Callable[[Item], Made], items: Iterable[Item], depth: int) -> Iterator[Made]:
    """`map(make, items)` by threads of the pool, with `depth` more of the results under way."""
    waiting: deque[Future[Made]] = deque()
    for item in items:
        waiting.append(pool.submit(make, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class PrefetchingPipeline(SampledPipeline, ABC):
    """Batches of a `Split` or of `EncodedImages` by a loader that prefetches.

    The order is `Sampling`'s. Images of one size are cropped and flipped as by `TensorPipeline`, to the bit. Of
    images of any size `random_crops`, or without `augment` the `centre_crops`, are resized; `flip` allows
    mirroring. All that is a function of (seed, epoch, sample): an epoch starts at any
    step, and a loader has no state to save. Values stay in [0,1]: networks normalise.

    workers: threads of the loader; by default this process's share of the processors. batches_ahead: batches that
    are prefetched. Threads live as long as an epoch.
    Raises ValueError where an argument does not fit; an epoch raises it, with the image's name, where an image
    cannot be read.
    """

    def __init__(
        self,
        data: Split | EncodedImages,
        sampling: Sampling,
        *,
        augment: bool,
        flip: bool,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        workers: int | None = None,
        batches_ahead: int = 2,
    ) -> None:
        assert len(data) == sampling.num_images, (len(data), sampling.num_images)
        super().__init__(sampling)
        for name, value in (("workers", workers), ("batches_ahead", batches_ahead)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self._data = data
        self._labels_N = data.labels.to(device)
        self._device = self._labels_N.device
        self._augment = augment
        self._cuts = data.any_size  # views are crops, resized
        self._flip = flip
        self._dtype = dtype
        sharing = sampling.shard.here or sampling.shard.world
        self._workers = workers or max(1, len(os.sched_getaffinity(0)) // sharing)
        self._batches_ahead = batches_ahead
        self._running: WeakSet[Generator[Batch]] = WeakSet()

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from start_step on, of this rank; one without samples is empty."""
        running = self._batches(epoch, self._sampling.batches(epoch, start_step))
        self._running.add(running)
        return running

    def close(self) -> None:
        """End the epochs that were left before their end, and their threads."""
        for running in list(self._running):
            running.close()

    @abstractmethod
    def _images(self, epoch: int, batches: list[Tensor]) -> Generator[Tensor]:
        """uint8 BHWC of each batch, none of them empty, on the device; valid until the next one is asked for."""

    def _batches(self, epoch: int, batches: list[Tensor]) -> Generator[Batch]:
        if not batches:
            return
        nothing = torch.empty((0, *self._data.shape, 3), dtype=torch.uint8, device=self._device)
        with closing(self._images(epoch, [sample_B for sample_B in batches if len(sample_B)])) as images:
            for sample_B in to_device(batches, self._device):
                images_BHWC = next(images) if len(sample_B) else nothing
                with record_function("crop_flip"):
                    x_nat, labels_B = crop_flip(
                        images_BHWC,
                        self._labels_N[sample_B],
                        sample_B,
                        index_B=torch.arange(len(sample_B), device=self._device),
                        seed=self._sampling.seed,
                        epoch=epoch,
                        flip=self._flip,
                        augment=self._augment and not self._cuts,
                        dtype=self._dtype,
                    )
                yield Batch(x_nat, labels_B, sample_B)

    def _crops(self, epoch: int, sample_B: Tensor, heights_B: Tensor, widths_B: Tensor) -> Crops:
        """Crops of images of those sizes, before `crop_flip`."""
        if not self._cuts:
            zero_B = torch.zeros_like(sample_B)
            return Crops(zero_B, zero_B, heights_B, widths_B, zero_B)
        if not self._augment:
            return centre_crops(heights_B, widths_B)
        crops = random_crops(self._sampling.seed, epoch, sample_B, heights_B, widths_B)
        return crops._replace(flip=crops.flip * self._flip)
