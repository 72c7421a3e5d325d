"""Calls that are captured as CUDA graphs and replayed: one launch in place of hundreds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class CapturedCall:
    """A call captured as a CUDA graph, with the tensors that it is given, which `replay` overwrites.

    call: takes tensors of the shapes, formats and dtypes of `like`. Nothing of it is run by the capture.
    Raises what the call raises, and torch.OutOfMemoryError where the graph's own memory is not there.
    """

    def __init__(self, call: Callable[..., object], *like: Tensor) -> None:
        self._tensors = [torch.empty_like(tensor) for tensor in like]
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: the threads that load images may allocate meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            call(*self._tensors)

    def fits(self, like: Tensor) -> bool:
        """True if it was captured for a first tensor of that shape."""
        return self._tensors[0].shape == like.shape

    def replay(self, *tensors: Tensor) -> list[Tensor]:
        """Run it on these values; its own tensors, as they are then."""
        for own, value in zip(self._tensors, tensors, strict=True):
            own.copy_(value)
        self._graph.replay()
        return self._tensors


@contextmanager
def waits_noted() -> Iterator[list[str]]:
    """A list that holds, once the block is left, the places inside where the host waited for a GPU.

    What waits cannot be captured. Other warnings that are given inside go on to be shown.
    """
    noted: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            yield noted
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for warning in given:
        if "synchronizing CUDA operation" in str(warning.message):
            noted.append(f"{warning.filename}:{warning.lineno}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
