"""FFCV's loader with crops from outside: its reading, decoding and resizing, as `FFCVPipeline` uses them.

FFCV draws its crops from a generator of each thread, so that no seed repeats them, and does not see that a JPEG
decoder failed. Importing this module imports FFCV. B batch, H, W.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange

from engine.pipelines.ffcv.repairs import (
    AllocationQuery,
    Loader,
    Operation,
    OrderOption,
    RepairedEpochIterator,
    SimpleRGBImageDecoder,
    ToDevice,
    imdecode,
    memcpy,
    resize_crop,
)
from engine.pipelines.reading import beton
from engine.pipelines.reading.beton import Beton
from engine.pipelines.reading.decoding import Pixels

Integers = npt.NDArray[np.int64]

_JPEG = beton.JPEG
_imdecode, _memcpy, _resize_crop = (njit(nogil=True)(each) for each in (imdecode, memcpy, resize_crop))


class BetonLoader:
    """Reader of the images of a .beton file as uint8 BHWC onto a device.

    any_size: crops of the images are resized to the shape; else images have it. paged: pages of the file are read
    into a cache of FFCV's own; else the system maps the file. Compiles when it is made.
    """

    def __init__(
        self,
        source: Beton,
        shape: tuple[int, int],
        *,
        any_size: bool,
        paged: bool,
        batch_size: int,
        workers: int,
        batches_ahead: int,
        device: torch.device,
    ) -> None:
        workers = min(workers, numba.config.NUMBA_NUM_THREADS)
        operations = [Decode((*shape, 3), any_size, paged, workers > 1), Check()]
        if device.type == "cuda":
            operations.append(ToDevice(device))
        self._loader = Loader(
            str(source.path),
            batch_size=batch_size,
            num_workers=workers,
            os_cache=not paged,
            order=OrderOption.SEQUENTIAL,  # unused: each `BetonEpoch` has its own
            seed=0,
            pipelines={name: operations if name == beton.IMAGE else None for name in source.fields},
            drop_last=False,
            batches_ahead=batches_ahead,
        )
        rows = source.images
        self._field = f"f{list(source.fields).index(beton.IMAGE)}"
        self._images = (
            np.ascontiguousarray(rows["mode"]),
            *(rows[key].astype(np.int64) for key in ("height", "width", "at")),
            source.sizes,
            source.page_size.bit_length() - 1,
        )

    def read(
        self, batches: list[Integers], crops: Callable[[int], Integers], fallback: Callable[[int, int], Pixels]
    ) -> BetonEpoch:
        """The images at those positions of the file, batch by batch; close it at the end.

        crops: top, left, height, width and flip of the images of a batch, by its number: (B, 5). fallback: view of
        an image that FFCV cannot decode, by the number of its batch and its own number in that.
        """
        return BetonEpoch(
            self._loader, np.concatenate(batches), lambda b: {self._field: (*self._images, crops(b))}, fallback
        )


class BetonEpoch(RepairedEpochIterator):
    """An epoch whose operations know the batch that they work on."""

    def __init__(
        self,
        loader: Any,
        order: Integers,
        describe: Callable[[int], dict[str, Any]],
        fallback: Callable[[int, int], Pixels],
    ) -> None:
        self._describe, self._fallback = describe, fallback
        self._batch = 0
        super().__init__(loader, order)

    def run_pipeline(self, b_ix: int, *arguments: Any) -> Any:
        self._batch = b_ix
        self.metadata = self._describe(b_ix)  # of the fields, which operations are given
        return super().run_pipeline(b_ix, *arguments)

    def fallback(self, i: int) -> Pixels:
        """View of an image of the current batch that FFCV cannot decode."""
        return self._fallback(self._batch, i)


class Decode(SimpleRGBImageDecoder):  # type: ignore[misc]
    """Images, and for each the error code of its decoder, 0 for none."""

    def __init__(self, shape: tuple[int, int, int], any_size: bool, paged: bool, parallel: bool) -> None:
        super().__init__()
        self._shape = shape
        self._code = _compiled(any_size, paged, parallel)

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        pixel = np.dtype("u1")
        state = replace(previous_state, jit_mode=True, shape=self._shape, dtype=pixel)
        return state, (AllocationQuery(self._shape, pixel), AllocationQuery((), np.dtype("i4")))

    def generate_code(self) -> Any:
        return self._code


class Check(Operation):  # type: ignore[misc]
    """Images as a tensor. Pillow decodes those that the decoder failed at; ValueError where it fails too."""

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        return replace(previous_state, jit_mode=False, dtype=torch.uint8), None

    def generate_code(self) -> Any:
        def check(decoded: tuple[Pixels, npt.NDArray[np.int32]], _: None) -> torch.Tensor:
            views_BHWC, failed_B = decoded
            for i in failed_B.nonzero()[0].tolist():
                reading = threading.current_thread()
                assert isinstance(reading, BetonEpoch)
                views_BHWC[i] = reading.fallback(i)
            return torch.from_numpy(views_BHWC)

        return check


@lru_cache
def _compiled(any_size: bool, paged: bool, parallel: bool) -> Any:
    """Loop over a batch, compiled once in a process."""
    span = prange if parallel else range

    @njit(nogil=True)
    def content(state, at, size, page_bits):  # type: ignore[no-untyped-def]
        if paged:
            page = at >> page_bits
            start = at - (page << page_bits)
            return state[0][state[3][page], start : start + size]
        return state[0][at : at + size]

    @njit(nogil=True, parallel=parallel, error_model="numpy")
    def decode(positions_B, memory, images, state):  # type: ignore[no-untyped-def]
        views_BHWC, failed_B = memory
        modes, heights, widths, starts, sizes, page_bits, crops_B5 = images
        for i in span(len(positions_B)):
            image = positions_B[i]
            height, width = heights[image], widths[image]
            data = content(state, starts[image], sizes[image], page_bits)
            failed_B[i] = 0
            if not any_size:
                if (height, width) != views_BHWC.shape[1:3]:
                    failed_B[i] = -1  # it would be written beyond its place
                elif modes[image] == _JPEG:
                    failed_B[i] = _imdecode(
                        data, views_BHWC[i], height, width, height, width, 0, 0, 1, 1, False, False
                    )
                else:
                    _memcpy(data, views_BHWC[i])
                continue
            if modes[image] == _JPEG:
                pixels_HWC = np.empty((height, width, 3), np.uint8)
                failed_B[i] = _imdecode(data, pixels_HWC, height, width, height, width, 0, 0, 1, 1, False, False)
            else:
                pixels_HWC = data.reshape((height, width, 3))
            top, left, rows, columns, flip = crops_B5[i]
            _resize_crop(pixels_HWC, top, top + rows, left, left + columns, views_BHWC[i])
            if flip:
                views_BHWC[i] = views_BHWC[i, :, ::-1].copy()
        return views_BHWC, failed_B

    return decode
