"""The CUDA streams of a step, as lanes. On a CPU there is one lane, and the same code runs in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

from engine.pipelines.base import Batch


class Lanes:
    """Three lanes: the main one, which is the current stream, one of the teachers, and one of the next batch.

    device: of the run. wanted: False for one lane, which gives the same bits.

    A lane that begins waits for all earlier work of the main lane, and so for all use of memory that it may reuse.
    Tensors that the main lane gives to a lane must be held until `join`.
    """

    def __init__(self, device: torch.device, *, wanted: bool = True) -> None:
        several = wanted and device.type == "cuda"
        self._teachers = torch.cuda.Stream(device) if several else None
        self._data = torch.cuda.Stream(device) if several else None

    @contextmanager
    def teachers(self) -> Iterator[None]:
        """Put the work inside on the teachers' lane."""
        with record_function("teachers"), _on(self._teachers):
            yield

    def join(self) -> None:
        """Make the main lane wait for the teachers' lane."""
        _wait(self._teachers)

    def prefetched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, each copied and augmented on the data's lane while the one before is trained on."""
        following = None if self._data is None else self._next(batches)
        while batch := following or self._next(batches):
            _wait(self._data)
            following = None if self._data is None else self._next(batches)
            yield batch

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        with record_function("data"), _on(self._data):
            return next(batches, None)


@contextmanager
def _on(lane: torch.cuda.Stream | None) -> Iterator[None]:
    if lane is None:
        yield
        return
    lane.wait_stream(torch.cuda.current_stream(lane.device))
    with torch.cuda.stream(lane):
        yield


def _wait(lane: torch.cuda.Stream | None) -> None:
    if lane is not None:
        torch.cuda.current_stream(lane.device).wait_stream(lane)
