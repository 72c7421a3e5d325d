"""Seconds of calls that take turns, so that whatever slows the machine for a while slows all of them alike."""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

MAX_CALLS = 1000
EPOCH_IMAGES = 50_000
"""Images of an epoch, to which the time of a step is scaled: those of CIFAR-10."""

Call = Callable[[], object]
Anything = TypeVar("Anything")


@dataclass(frozen=True)
class Candidate:
    """One thing to time. preference: the value of ENGINE_KERNELS meanwhile."""

    name: str
    call: Call
    preference: str = "auto"


class Clock(Protocol):
    """Seconds of one call, the mean over count calls."""

    def seconds(self, call: Call, count: int) -> float:
        """Call count times."""


class HostClock:
    """The time that passes on the host: of CPU work, which is over when a call returns."""

    def seconds(self, call: Call, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count


class SynchronisedClock:
    """Seconds on the host until the device has done all the calls."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, call: Call, count: int) -> float:
        """Seconds of one call, the mean over count calls."""
        self.wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        self.wait()
        return (time.perf_counter() - start) / count

    def wait(self) -> None:
        """Wait until the device has done all that was queued."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class QueuedClock:
    """The time that passes on the device between an event before all the calls and one after them.

    The calls are queued while the device still overwrites its cache, so that it never waits for the host.
    """

    MAX_OVERWRITES = 256

    def __init__(self, device: torch.device) -> None:
        self._other = _beyond_cache(device)
        self._overwrites = 1

    def seconds(self, call: Call, count: int) -> float:
        """Raises RuntimeError for calls that wait for the device, or that the host queues too slowly."""
        with torch.cuda.device(self._other.device):  # of a new thread it would be the first
            while self._overwrites <= self.MAX_OVERWRITES:
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                for _ in range(self._overwrites):
                    self._other.zero_()
                before.record()
                for _ in range(count):
                    call()
                after.record()
                queued_in_time = not before.query()  # the device has not begun with what is timed
                after.synchronize()
                if queued_in_time:
                    return float(before.elapsed_time(after)) * 1e-3 / count
                self._overwrites *= 2
        self._overwrites = 1
        raise RuntimeError(f"{count} calls were not queued while the device was busy: the host's time would count")


class CudaClock:
    """The time that passes on the device between an event before a call and one after it, its L2 cache cold.

    idle: the device has nothing to do when a call begins, so that the host's launches count. Otherwise the call is
    queued while the cache is still being overwritten, and the device alone counts.
    """

    def __init__(self, device: torch.device, *, idle: bool) -> None:
        self._other = _beyond_cache(device)
        self._before, self._after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._idle = idle

    def seconds(self, call: Call, count: int) -> float:
        milliseconds = 0.0
        for _ in range(count):
            self._other.zero_()
            if self._idle:
                torch.cuda.synchronize()
            self._before.record()
            call()
            self._after.record()
            torch.cuda.synchronize()
            milliseconds += self._before.elapsed_time(self._after)
        return milliseconds * 1e-3 / count


def _beyond_cache(device: torch.device) -> torch.Tensor:
    """Bytes that the device overwrites more slowly than the host queues a graph."""
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(max(4 * cache_bytes, 2**28), dtype=torch.uint8, device=device)


def captured(call: Call) -> Call:
    """The replay of a CUDA graph of the call, which has been called before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # autograd and the allocator must have seen the side stream
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def repeated(call: Call, count: int = 5) -> list[float]:
    """Seconds on the host of each of so many calls, after one that does not count."""
    call()
    clock = HostClock()
    return [clock.seconds(call, 1) for _ in range(count)]


def warm_up(candidate: Candidate, clock: Clock, seconds: float) -> int:
    """Number of calls that last about that many seconds, the clock's work included, when all is compiled."""
    with preferring(candidate.preference):
        candidate.call()
        clock.seconds(candidate.call, 3)
        start = time.perf_counter()
        clock.seconds(candidate.call, 3)
        return calls_within(seconds, (time.perf_counter() - start) / 3)


def calls_within(seconds: float, seconds_per_call: float) -> int:
    """Number of calls that last about that many seconds, at least one."""
    return max(1, min(MAX_CALLS, round(seconds / seconds_per_call)))


def interleaved(
    candidates: Sequence[Candidate], counts: Sequence[int], clock: Clock, rounds: int
) -> dict[str, list[float]]:
    """Seconds per call of each candidate in each round; a round begins with the next candidate each time."""
    samples: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    with no_garbage_collection():
        for turn in range(rounds):
            for candidate, count in rotated(list(zip(candidates, counts, strict=True)), turn):
                with preferring(candidate.preference):
                    samples[candidate.name].append(clock.seconds(candidate.call, count))
    return samples


def rotated(items: Sequence[Anything], turn: int) -> list[Anything]:
    """The items in their order, beginning with that of the turn."""
    start = turn % len(items)
    return [*items[start:], *items[:start]]


def processor_seconds() -> float:
    """Seconds of processors, of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@contextmanager
def preferring(implementation: str) -> Iterator[None]:
    """Set ENGINE_KERNELS inside."""
    before = os.environ.get("ENGINE_KERNELS")
    os.environ["ENGINE_KERNELS"] = implementation
    try:
        yield
    finally:
        if before is None:
            del os.environ["ENGINE_KERNELS"]
        else:
            os.environ["ENGINE_KERNELS"] = before


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector from running inside, at random for one candidate or another."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
