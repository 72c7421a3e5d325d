"""A thousand steps hold no more memory than a few."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from bench.lib import memory
from bench.lib.steps import variants
from engine.training.telemetry import Telemetry
from tests.fake_cuda import FakeCuda

STEPS, FEW = 1000, 52  # both end an epoch of four batches


def stepping(method: str, device: str, **keys: Any) -> Callable[[], object]:
    workload = variants.Workload(
        method, "resnet8", 2, variants.images_of(variants.RANDOM, 2), torch.device(device)
    )
    variant = variants.Variant("", {"compile": "off", "attack": {"num_steps": 1}} | keys)
    return workload.step(variant)


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())  # some are dead proxies


@pytest.mark.parametrize("method", ["iad1", "iad2"])
def test_on_a_cpu(method: str, bf16: None) -> None:
    step = stepping(method, "cpu", amp=True)
    for _ in range(FEW):
        step()
    count, resident = tensors(), memory.mebibytes("VmRSS")
    for _ in range(STEPS - FEW):
        step()
    assert tensors() <= count
    assert memory.mebibytes("VmRSS") - resident < 20  # a float of a 2x3x32x32 batch each step were 23 MiB


def held(method: str, graphs: str) -> list[int]:
    """Bytes that a GPU's allocator has given out, after a few steps and after a thousand."""
    step = stepping(method, "cuda:0", amp=True, graphs=graphs)
    found = []
    with mock.patch.object(Telemetry, "read"):  # where kernels compute nothing, losses need not be finite
        for count in (FEW, STEPS - FEW):
            for _ in range(count):
                step()
            found.append(torch.cuda.memory_allocated())
    return found


@pytest.mark.parametrize("graphs", ["step", "attack", "off"])
def test_on_a_gpu(graphs: str, fake_cuda: FakeCuda) -> None:
    few, many = fake_cuda.run(held, "iad1", graphs)
    assert many == few
