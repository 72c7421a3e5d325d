"""The pipeline that NVIDIA DALI loads: arrays in the host's memory, or files that it decodes, cuts and resizes.

Order, windows and views come from outside, as functions of (seed, epoch, sample). So an epoch starts at any step,
and DALI's own checkpoints have nothing to save. B batch, C channels, H, W.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from engine.pipelines.ahead import make_ahead
from engine.pipelines.encoded import EncodedImages
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Split
from engine.pipelines.streamed import StreamedPipeline
from engine.pipelines.windows import Windows

_OLDEST = (2, 2)  # before it, decoders of windows turned images by their EXIF orientation


class DALIPipeline(StreamedPipeline):
    """`StreamedPipeline` on a CPU or a GPU by one definition: a GPU, where there is one, decodes and resizes.

    A bad image ends the epoch up to twice batches_ahead batches early. Raises ValueError too where DALI is not
    installed.
    """

    def __init__(self, data: Split | EncodedImages, sampling: Sampling, **options: Any) -> None:
        check_installed()
        super().__init__(data, sampling, **options)
        self._source: Source = Arrays(data.images) if isinstance(data, Split) else Files(data, self._windows)

    def _images(self, epoch: int, batches: list[Tensor]) -> Generator[Tensor]:
        with ThreadPoolExecutor(self._batches_ahead) as pool:
            pipeline = define(
                self._source,
                make_ahead(pool, partial(self._source.read, epoch), batches, self._batches_ahead),
                batch_size=max(map(len, batches)),
                num_threads=self._workers,
                prefetch=self._batches_ahead,
                on_gpu=self._device.type == "cuda",
                device_id=self._device.index,
            )
            try:
                for sample_B in batches:
                    try:
                        (images,) = pipeline.run(_stream(self._device))
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

    def read(self, epoch: int, sample_B: Tensor) -> tuple[Any, ...]:
        return (self.images_NHWC[sample_B].numpy(),)

    def graph(self, *inputs: Any, on_gpu: bool) -> Any:
        (images,) = inputs
        return images.gpu() if on_gpu else images

    def where(self, sample: int) -> str:
        return f"image {sample}"


@dataclass(frozen=True, eq=False)
class Files:
    """Images in files. windows: of them, by epoch, samples, heights and widths."""

    images: EncodedImages
    windows: Callable[[int, Tensor, Tensor, Tensor], Windows]
    num_inputs = 4

    def read(self, epoch: int, sample_B: Tensor) -> tuple[Any, ...]:
        """Encoded images, (top, left) and (height, width) of their windows, and 1 where these are mirrored."""
        encoded, heights, widths = zip(*map(self.images.read, sample_B.tolist()), strict=True)
        windows = self.windows(epoch, sample_B, torch.tensor(heights), torch.tensor(widths))
        return (
            [np.frombuffer(data, np.uint8) for data in encoded],
            torch.stack((windows.top, windows.left), dim=1).int().numpy(),
            torch.stack((windows.height, windows.width), dim=1).int().numpy(),
            windows.flip.int().numpy(),
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
    """The one that what follows runs on; DALI's outputs are then waited for there, and not by the host."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


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
