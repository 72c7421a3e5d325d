"""Pipeline of NVIDIA DALI: arrays in the host's memory, or files that it decodes, crops and resizes.

Order, crops and views come from outside, as functions of (seed, epoch, sample). So an epoch starts at any step,
and DALI's own checkpoints have nothing to save. B batch, C channels, H, W.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from engine.common import optional
from engine.pipelines.crops import Crops
from engine.pipelines.prefetching import PrefetchingPipeline, prefetched
from engine.pipelines.reading.encoded import EncodedImages
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Split

_MISSING = "pipeline: dali needs `pip install 'iad-engine[dali]'` ({reason})"
_OLDEST = (2, 2)  # older ones rotate images by their EXIF orientation in `image_slice`


class DALIPipeline(PrefetchingPipeline):
    """`PrefetchingPipeline` on a CPU or a GPU by one definition: a GPU, where there is one, decodes and resizes.

    A bad image ends the epoch up to twice batches_ahead batches early. Raises ValueError too where DALI is not
    installed.
    """

    def __init__(self, data: Split | EncodedImages, sampling: Sampling, **options: Any) -> None:
        check_installed()
        super().__init__(data, sampling, **options)
        self._source: Source
        if isinstance(data, Split):
            self._source = ArraySource(data.images)
        else:
            self._source = FileSource(data, self._crops)

    def _images(self, epoch: int, batches: list[Tensor]) -> Generator[Tensor]:
        with ThreadPoolExecutor(self._batches_ahead) as pool, ExitStack() as stack:
            pipeline = define(
                self._source,
                prefetched(pool, partial(self._source.read, epoch), batches, self._batches_ahead),
                batch_size=max(map(len, batches)),
                num_threads=self._workers,
                prefetch=self._batches_ahead,
                on_gpu=self._device.type == "cuda",
                device_id=self._device.index,
            )
            stack.callback(pipeline._shutdown)  # DALI has no public close, and a traceback may hold the pipeline
            stack.callback(pool.shutdown, cancel_futures=True)
            for sample_B in batches:
                try:
                    (images,) = pipeline.run(_stream(self._device))
                except RuntimeError as error:
                    self._name_culprit(epoch, sample_B, error)
                    raise
                yield from_dlpack(images.as_tensor())

    def _name_culprit(self, epoch: int, sample_B: Tensor, error: RuntimeError) -> None:
        """Raise ValueError for the image that DALI cannot decode, which DALI does not name."""
        if len(sample_B) == 1:
            reason = str(error).partition("encountered:")[2].partition("Current pipeline")[0]
            where = self._source.where(int(sample_B))
            raise ValueError(f"data: {where} cannot be decoded by DALI ({' '.join(reason.split())})") from None
        for _ in self._images(epoch, list(sample_B.split(1))):
            pass


class Source(Protocol):
    """Images for DALI: its inputs, and its graph from inputs to images."""

    num_inputs: int

    def read(self, epoch: int, sample_B: Tensor) -> tuple[Any, ...]:
        """DALI's inputs of a batch."""

    def graph(self, *inputs: Any, on_gpu: bool) -> Any:
        """The node of the images (uint8 HWC) from the nodes of the inputs."""

    def where(self, sample: int) -> str:
        """Name of an image in a message."""


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images in memory: uint8 NHWC."""

    images_NHWC: Tensor
    num_inputs = 1

    def read(self, epoch: int, sample_B: Tensor) -> tuple[Any, ...]:
        return (self.images_NHWC[sample_B].numpy(),)

    def graph(self, *inputs: Any, on_gpu: bool) -> Any:
        (images,) = inputs
        return images.gpu() if on_gpu else images

    def where(self, sample: int) -> str:
        return f"image {sample}"


@dataclass(frozen=True, eq=False)
class FileSource:
    """Images in files. crops: a function of epoch, samples, heights and widths."""

    images: EncodedImages
    crops: Callable[[int, Tensor, Tensor, Tensor], Crops]
    num_inputs = 4

    def read(self, epoch: int, sample_B: Tensor) -> tuple[Any, ...]:
        """Encoded images, (top, left) and (height, width) of their crops, and 1 for a mirrored one."""
        encoded, heights, widths = zip(*map(self.images.read, sample_B.tolist()), strict=True)
        crops = self.crops(epoch, sample_B, torch.tensor(heights), torch.tensor(widths))
        return (
            [np.frombuffer(data, np.uint8) for data in encoded],
            torch.stack((crops.top, crops.left), dim=1).int().numpy(),
            torch.stack((crops.height, crops.width), dim=1).int().numpy(),
            crops.flip.int().numpy(),
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
            adjust_orientation=False,  # `Listing.read` gives upright images
            jpeg_fancy_upsampling=True,  # on a GPU as on a CPU
        )
        images = fn.resize(images, size=self.images.shape)
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
    """The current stream, which then waits for DALI's outputs in place of the host; None for a CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def check_installed() -> None:
    """Raise ValueError where there is no DALI, or too old a one."""
    version = optional.load("nvidia.dali", missing=_MISSING).__version__
    if tuple(map(int, version.split(".")[:2])) < _OLDEST:
        raise ValueError(_MISSING.replace("{reason}", f"version {version} is too old"))
