"""The pipeline that NVIDIA DALI loads: arrays in the host's memory, or files that it decodes, crops and resizes.

The order is `Sampling`'s, windows and flips are those of `windows`, views of arrays those of `crop_flip`: all of
them functions of (seed, epoch, sample). So an epoch starts at any step, and DALI's own checkpoints have nothing to
save. B batch, C channels, H, W.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from engine.kernels import crop_flip
from engine.pipelines.base import Batch
from engine.pipelines.encoded import EncodedImages
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Split
from engine.pipelines.windows import centre_windows, random_windows

_OLDEST = (2, 2)  # before it, decoders of windows turned images by their EXIF orientation


class DALIPipeline:
    """Batches of a `Split` or of `EncodedImages`, on a CPU or a GPU by one definition.

    Images of a split are cropped and flipped as by `TensorPipeline`, to the bit. Encoded images, decoded by a GPU
    where there is one, are cut to `random_windows`, or without `augment` to `centre_windows`, and resized to
    image_size by a triangular filter. `flip` allows mirroring. Values stay in [0,1]: networks normalise.

    num_threads: DALI's; by default this process's share of the processors. prefetch: batches that are read ahead,
    and as many that are decoded ahead. Threads live as long as an epoch.
    Raises ValueError where DALI is not installed or an argument does not fit; an epoch raises it, with the file's
    name, where an image cannot be read, up to 2 prefetch batches early.
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
        image_size: int | None = None,
        num_threads: int | None = None,
        prefetch: int = 2,
    ) -> None:
        check_installed()
        assert len(data) == sampling.num_samples, (len(data), sampling.num_samples)
        for name, value in (("image_size", image_size), ("num_threads", num_threads), ("prefetch", prefetch)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if isinstance(data, Split):
            self._source: Source = Arrays(data.images)
        elif image_size is None:
            raise ValueError("image_size: images in files are resized to a size that must be given, got none")
        else:
            self._source = Photographs(data, sampling.seed, image_size, augment, flip)
        self._sampling = sampling
        self._labels_N = data.labels.to(device)
        self._augment = augment and isinstance(data, Split)
        self._flip = flip
        self._dtype = dtype
        self._num_threads = num_threads or max(1, len(os.sched_getaffinity(0)) // sampling.shard.world)
        self._prefetch = prefetch
        self._running: WeakSet[Generator[Batch]] = WeakSet()

    @property
    def num_samples(self) -> int:
        """Images of one epoch, of all ranks together."""
        return self._sampling.num_samples

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        return self._sampling.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from start_step on, of this rank; one without samples is empty."""
        running = self._batches(epoch, self._sampling.batches(epoch, start_step))
        self._running.add(running)
        return running

    def close(self) -> None:
        """End the epochs that were left before their end, and their threads."""
        for running in list(self._running):
            running.close()

    def _batches(self, epoch: int, batches: list[Tensor]) -> Generator[Batch]:
        if not batches:
            return
        device = self._labels_N.device
        on_device = torch.cat(batches).to(device).split([len(sample_B) for sample_B in batches])
        nothing = torch.empty((0, *self._source.image_shape), dtype=torch.uint8, device=device)
        with closing(self._images(epoch, [sample_B for sample_B in batches if len(sample_B)])) as images:
            for sample_B in on_device:
                images_BHWC = next(images) if len(sample_B) else nothing
                x_nat, labels_B = crop_flip(
                    images_BHWC,
                    self._labels_N[sample_B],
                    sample_B,
                    index_B=torch.arange(len(sample_B), device=device),
                    seed=self._sampling.seed,
                    epoch=epoch,
                    flip=self._flip,
                    augment=self._augment,
                    dtype=self._dtype,
                )
                yield Batch(x_nat, labels_B, sample_B)

    def _images(self, epoch: int, batches: list[Tensor]) -> Generator[Tensor]:
        """uint8 BHWC of each batch, on the device."""
        device = self._labels_N.device
        with ThreadPoolExecutor(self._prefetch) as pool:
            pipeline = define(
                self._source,
                read_ahead(pool, partial(self._source.read, epoch), batches, self._prefetch),
                batch_size=max(map(len, batches)),
                num_threads=self._num_threads,
                prefetch=self._prefetch,
                on_gpu=device.type == "cuda",
                device_id=device.index,
            )
            try:
                for sample_B in batches:
                    try:
                        (images,) = pipeline.run(_stream(device))
                    except RuntimeError as error:
                        self._name_culprit(epoch, sample_B, error)
                        raise
                    yield from_dlpack(images.as_tensor())
            finally:
                pool.shutdown(cancel_futures=True)
                pipeline.__del__()  # now: a traceback may hold the pipeline, and that its threads

    def _name_culprit(self, epoch: int, sample_B: Tensor, error: RuntimeError) -> None:
        """Raise ValueError for the image that DALI cannot decode, which DALI does not name."""
        if len(sample_B) == 1:
            reason = str(error).partition("encountered:")[2].partition("Current pipeline")[0]
            where = self._source.where(int(sample_B))
            raise ValueError(f"data: {where} cannot be decoded by DALI ({' '.join(reason.split())})") from None
        for _ in self._images(epoch, list(sample_B.split(1))):
            pass


class Source(Protocol):
    """What DALI is given, and what it makes of that."""

    num_inputs: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """H, W and C of the images."""

    def read(self, epoch: int, sample_B: Tensor) -> tuple[Any, ...]:
        """DALI's inputs of a batch."""

    def graph(self, *inputs: Any, on_gpu: bool) -> Any:
        """The node of the images (uint8 HWC) from the nodes of the inputs."""

    def where(self, sample: int) -> str:
        """How a message calls an image."""


@dataclass(frozen=True, eq=False)
class Arrays:
    """Images in memory: uint8 NHWC."""

    images_NHWC: Tensor
    num_inputs = 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.images_NHWC.shape[1:]
        return height, width, channels

    def read(self, epoch: int, sample_B: Tensor) -> tuple[Any, ...]:
        return (self.images_NHWC[sample_B].numpy(),)

    def graph(self, *inputs: Any, on_gpu: bool) -> Any:
        (images,) = inputs
        return images.gpu() if on_gpu else images

    def where(self, sample: int) -> str:
        return f"image {sample}"


@dataclass(frozen=True, eq=False)
class Photographs:
    """Images in files, of any size."""

    images: EncodedImages
    seed: int
    image_size: int
    augment: bool
    flip: bool
    num_inputs = 4

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.image_size, self.image_size, 3

    def read(self, epoch: int, sample_B: Tensor) -> tuple[Any, ...]:
        """Encoded images, (top, left) and (height, width) of their windows, and 1 where these are mirrored."""
        encoded, heights, widths = zip(*map(self.images.read, sample_B.tolist()), strict=True)
        sizes = torch.tensor(heights), torch.tensor(widths)
        if self.augment:
            windows = random_windows(self.seed, epoch, sample_B, *sizes)
        else:
            windows = centre_windows(*sizes)
        return (
            [np.frombuffer(data, np.uint8) for data in encoded],
            torch.stack((windows.top, windows.left), dim=1).int().numpy(),
            torch.stack((windows.height, windows.width), dim=1).int().numpy(),
            (windows.flip * self.flip).int().numpy(),
        )

    def graph(self, *inputs: Any, on_gpu: bool) -> Any:
        from nvidia.dali import fn

        encoded, start, shape, mirrored = inputs
        images = fn.decoders.image_slice(
            encoded,
            device="mixed" if on_gpu else "cpu",
            start=start,
            shape=shape,
            axis_names="HW",
            adjust_orientation=False,  # as Pillow and the other pipelines read it
            jpeg_fancy_upsampling=True,  # on a GPU as on a CPU
        )
        images = fn.resize(images, size=(self.image_size, self.image_size))
        return fn.flip(images, horizontal=mirrored)

    def where(self, sample: int) -> str:
        return self.images.where(sample)


def define(
    source: Source,
    batches: Iterable[tuple[Any, ...]],
    *,
    batch_size: int,
    num_threads: int,
    prefetch: int,
    on_gpu: bool,
    device_id: int | None,
) -> Any:
    """DALI's pipeline of the source's images over those batches of inputs, at most batch_size large."""
    from nvidia.dali import Pipeline, fn

    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,  # whose outputs are tensors of their own, not buffers that are used again
    )
    with pipeline:
        inputs = fn.external_source(batches, num_outputs=source.num_inputs, batch=True)
        pipeline.set_outputs(source.graph(*inputs, on_gpu=on_gpu))
    return pipeline


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """The one that what follows runs on; DALI's outputs are then waited for there, and not by the host."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def read_ahead(
    pool: Executor, read: Callable[[Tensor], tuple[Any, ...]], batches: list[Tensor], ahead: int
) -> Iterator[tuple[Any, ...]]:
    """What `read` gives for each batch, in their order, with so many more of them under way."""
    waiting: deque[Future[tuple[Any, ...]]] = deque()
    for sample_B in batches:
        waiting.append(pool.submit(read, sample_B))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def check_installed() -> None:
    """Raise ValueError where there is no DALI, or too old a one."""
    try:
        import nvidia.dali

        version = nvidia.dali.__version__
    except ImportError as error:
        reason = " ".join(str(error).split())
    else:
        if tuple(map(int, version.split(".")[:2])) >= _OLDEST:
            return
        reason = f"version {version} is too old"
    raise ValueError(f"pipeline: dali needs `pip install 'iad-engine[dali]'` ({reason})")
