"""The device, and the implementations that serve on it, one after the other."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.kernels import dispatch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = pytest.mark.skip(reason="there is no CUDA device")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(absent)


@pytest.fixture
def device() -> str:
    return "cuda"


@pytest.fixture(scope="module", params=["triton", "native", "reference"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the implementation that serves where it has the op."""
    if reason := dispatch.missing(request.param, "cuda"):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINE_KERNELS", request.param)
        yield request.param


@pytest.fixture(scope="module")
def fused() -> Iterator[str]:
    """The one fused implementation of `distill_loss` for CUDA."""
    if reason := dispatch.missing("triton", "cuda"):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINE_KERNELS", "triton")
        yield "triton"


@pytest.fixture
def memory() -> Iterator[Callable[[float], None]]:
    """Skips where so many GB of the device are not free.

    Of several processes that test at the same time one holds much memory, until its test has ended.
    """

    def need(gigabytes: float) -> None:
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < gigabytes:
            pytest.skip(f"it needs {gigabytes:g} GB of the device's memory, {free:.1f} are free")

    with Path(__file__).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield need
        torch.cuda.empty_cache()
