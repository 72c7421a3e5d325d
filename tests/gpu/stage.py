"""Helpers of tests on a device: no waits, streams, graphs, processes that may die."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from engine.kernels import dispatch

Result = TypeVar("Result")

needs_two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device at most")


def by_implementation(op: str) -> pytest.MarkDecorator:
    """One after the other, what serves the op on CUDA."""
    return pytest.mark.parametrize("implementation", dispatch.SERVED_BY[op]["cuda"], indirect=True, scope="module")


@contextmanager
def no_wait() -> Iterator[None]:
    """Whatever makes the host wait for the device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def captured(work: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of the work, and the result that its replay writes; the work is done once before, to be compiled."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


def on_a_busy_stream(work: Callable[[], Result]) -> Result:
    """The work on a stream of its own, behind some 50 ms of idling there: on another stream it would be early."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        result = work()
    side.synchronize()
    return result


def assert_the_device_refuses(program: str, implementation: str) -> None:
    """Run the code in a process of its own: no process can use the device after an assertion on it."""
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\ntorch.cuda.synchronize()"],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "ENGINE_KERNELS": implementation},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "device-side assert" in done.stderr
