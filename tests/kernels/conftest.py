"""The implementations that run in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.kernels import dispatch


def _serve(implementation: str) -> Iterator[None]:
    if reason := dispatch.missing(implementation, "cpu"):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINE_KERNELS", implementation)
        yield


@pytest.fixture
def device() -> str:
    """The device of the tensors; `tests/gpu` has another."""
    return "cpu"


@pytest.fixture(scope="module", params=["reference", "native"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the implementation that serves."""
    for _ in _serve(request.param):
        yield request.param


@pytest.fixture(scope="module", params=["native"])
def fused(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same without the reference."""
    for _ in _serve(request.param):
        yield request.param


@pytest.fixture(
    scope="module",
    params=[("reference", torch.float64), ("reference", torch.float32), ("native", torch.float32)],
    ids=lambda param: f"{param[0]}-{str(param[1]).removeprefix('torch.')}",
)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """A dtype that the implementation that serves computes in; float64 is the reference's alone."""
    implementation, dtype = request.param
    for _ in _serve(implementation):
        yield dtype
