"""Calls that timing makes to a GPU, seen by a mock of its driver."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from bench.kernels import Bench
from bench.lib import machine
from bench.lib.calls import op_cases
from bench.lib.timing import CudaClock
from engine.kernels import dispatch, native
from tests.fake_cuda import FakeCuda
from tests.fake_cuda.journal import recorded


def time_two_calls(*, idle: bool) -> list[str]:
    """The calls to the driver, kernels by what they do."""
    values = torch.ones(5, device="cuda")
    clock = CudaClock(torch.device("cuda"), idle=idle)
    with recorded() as calls:
        clock.seconds(lambda: values.mul_(2), 2)
    return ["fill" if "FillFunctor" in call.get("name", "") else call["call"] for call in calls]


def measure() -> dict[str, Any]:
    device = torch.device("cuda")
    bench, facts = Bench(device, quick=True), machine.facts(device)
    with mock.patch.object(native, "missing", return_value="it asks for a real runtime"):
        rows = [row for case in op_cases.table(bench.cache_bytes, quick=True) for row in bench.rows(case, facts)]
    return {
        "timed": [[row.op, row.mode, row.implementation] for row in rows],
        "devices": sorted({row.device for row in rows}),
        "failures": bench.failures,
        "idle": time_two_calls(idle=True),
        "busy": time_two_calls(idle=False),
    }


@pytest.fixture(scope="module")
def measured(fake_cuda: FakeCuda) -> Any:
    return fake_cuda.run(measure)


def test_each_call_stands_alone_between_its_events_after_other_bytes_filled_the_cache(measured: Any) -> None:
    assert measured["idle"] == ["fill", "synchronize", "record", "kernel", "record", "synchronize"] * 2
    assert measured["busy"] == ["fill", "record", "kernel", "record", "synchronize"] * 2


def test_every_op_is_timed_as_called_and_as_captured(measured: Any) -> None:
    assert measured["failures"] == []
    cases = [case.op for case in op_cases.table(0, quick=True)]
    assert set(cases) == set(op_cases.OPS)
    assert measured["timed"] == [
        [op, mode, name]
        for op in cases
        for mode in ("call", "graph")
        for name in ("eager", "triton")
        if name == "eager" or name in dispatch.SERVED_BY[op].get("cuda", ())
    ]
    assert measured["devices"] == ["Fake sm_90"]
