"""Repairs of FFCV 1.0.2, for today's packages and in general, in one place.

`tests/pipelines/ffcv/test_repairs.py` says of each repair when it is no longer needed. Importing this module
imports FFCV.
"""

from __future__ import annotations

import atexit
import errno
import importlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty
from types import ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakSet

import numba
import numpy as np
import numpy.typing as npt
import torch


@contextmanager
def _importable() -> Iterator[None]:
    """Provide distutils, which Python 3.12 lacks and from which FFCV imports a function that it never calls."""
    before = torch.get_num_threads()
    names = ("distutils", "distutils.log")
    stand_ins = {}
    try:
        importlib.import_module("distutils.log")  # setuptools, where it is there, brings one
    except ImportError:
        stand_ins = {name: ModuleType(name) for name in names}
        vars(stand_ins["distutils.log"])["warn"] = logging.warning
        sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]
        torch.set_num_threads(before)  # FFCV sets it to 1


if len(os.sched_getaffinity(0)) == 1 and "NUMBA_THREADING_LAYER" not in os.environ:
    # A process with one processor hangs at its end in TBB where another thread than the main one was first there,
    # as one that imports FFCV may be; and the last layer is not for several threads.
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

with _importable():
    from ffcv.fields import BytesField, IntField, RGBImageField
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder, encode_jpeg, resizer
    from ffcv.libffcv import imdecode, memcpy, resize_crop
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.loader.loader import Loader, OrderOption
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.memory_managers import OSCacheManager
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.transforms import ToDevice
    from ffcv.writer import DatasetWriter, handle_sample

__all__ = [
    "AllocationQuery",
    "BytesField",
    "Compiler",
    "IntField",
    "Loader",
    "Operation",
    "OrderOption",
    "RGBImageField",
    "RepairedEpochIterator",
    "SimpleRGBImageDecoder",
    "ToDevice",
    "encode_jpeg",
    "imdecode",
    "memcpy",
    "resize_crop",
    "resizer",
    "write",
]


def _set_num_threads(number: int) -> None:
    """Set the threads of FFCV's loops alone. FFCV sets torch's too, which changes a run's bits."""
    Compiler.num_threads = number
    numba.set_num_threads(number)


def _compile_reader(manager: Any) -> Any:
    """Function that reads the bytes at an address of a mapped file, compiled at its first call.

    FFCV compiles it at once, for types of numba's that it alters although all share them: what was compiled for
    them before is then not found any more. At its first call the types are known.
    """

    def read(address, state):  # type: ignore[no-untyped-def]
        data, starts, sizes = state
        return data[address : address + sizes[np.searchsorted(starts, address)]]

    return Compiler.compile(read)


_compile = Compiler.compile


def _compile_once(code: Any, signature: Any = None) -> Any:
    """Compile what is not compiled yet. FFCV compiles a function anew for each loader, and fails if it is."""
    return code if numba.extending.is_jitted(code) else _compile(code, signature)


Compiler.compile = _compile_once
Compiler.set_num_threads = _set_num_threads
OSCacheManager.compile_reader = _compile_reader


class RepairedEpochIterator(EpochIterator):  # type: ignore[misc]
    """One epoch of a loader. Its images are valid until the next ones are asked for.

    FFCV's thread dies of an exception, and who waits for its batches waits for ever; here the exception is raised
    there. FFCV lets the threads of an epoch that was left go on; `close` ends and awaits them, and so does the end
    of the process, which would abort. FFCV fills a pinned buffer again though its last copy to a GPU may still be
    under way; here its thread waits for that.
    """

    closed: bool

    def __init__(self, loader: Any, order: npt.NDArray[np.int64]) -> None:
        self._failure: BaseException | None = None
        self._copied: dict[int, torch.cuda.Event] = {}
        super().__init__(loader, order)
        _running.add(self)

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:
            self._failure = error
            self.output_queue.put(None)

    def run_pipeline(self, b_ix: int, batch_indices: Any, batch_slot: int, cuda_event: Any) -> Any:
        if self.terminate_event.is_set():
            raise StopIteration  # FFCV looks at the event only where it finds no room, and at this always
        if batch_slot in self._copied:
            self._copied[batch_slot].synchronize()
        result = super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)
        if (stream := self.cuda_streams[batch_slot]) is not None:
            self._copied[batch_slot] = stream.record_event()
        return result

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except StopIteration:
            if self._failure is not None:
                raise self._failure from None
            raise

    def close(self) -> None:
        self.terminate_event.set()
        while self.is_alive():
            with suppress(Empty):  # it may be waiting for room
                self.output_queue.get_nowait()
            self.join(0.01)
        if not self.closed:
            self.closed = True
            self.memory_context.__exit__(None, None, None)
            for reader in getattr(getattr(self.memory_context, "executor", None), "threads", ()):
                reader.join()


_running: WeakSet[RepairedEpochIterator] = WeakSet()


@atexit.register
def _close_running() -> None:
    for epoch in list(_running):
        epoch.close()


def write(path: Path, fields: Mapping[str, Any], count: int, samples: Iterable[tuple[Any, ...]]) -> None:
    """Write a .beton file of so many samples, in their order.

    FFCV writes by processes of its own: an exception in one of them, a full disk for instance, leaves it waiting
    for ever, and the order of samples on the disk differs from run to run. Raises OSError where the disk is full.
    """
    writer = DatasetWriter(str(path), fields, num_workers=1)
    writer.num_samples = count
    writer.prepare()
    writer.metadata_sm.close()  # memory that processes share: there is one here
    writer.metadata_sm.unlink()
    rows = np.zeros(count, writer.metadata_type)
    allocator = MemoryAllocator(str(path), writer.data_region_start, writer.page_size)
    with allocator:
        for number, sample in enumerate(samples):
            handle_sample(sample, number, rows.dtype.names, rows, allocator, fields)
    pages = allocator.next_page_allocated.value
    if path.stat().st_size != allocator.offset + pages * writer.page_size:  # it does not look at short writes
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    writer.metadata_sm = SimpleNamespace(buf=rows.tobytes())
    writer.finalize([allocator.allocations])
