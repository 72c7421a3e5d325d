"""The update of weights as a Triton kernel, in the interpreter: against float64."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "it takes a process of its own: TRITON_INTERPRET=1 pytest tests/interpreter", allow_module_level=True
    )
pytest.importorskip("triton", reason="triton is not installed")

from hypothesis import given, settings

from engine.kernels import sgd_update
from tests.interpreter.device import imitate
from tests.kernels.sgd_cases import CASES, SgdCase, any_case, check, make

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what a mask then drops


@pytest.fixture(autouse=True)
def triton_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    imitate(monkeypatch)
    monkeypatch.setenv("ENGINE_KERNELS", "triton")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_update_written_out(case: SgdCase) -> None:
    check(case)


@settings(max_examples=50, deadline=None)
@given(any_case((torch.float32,)))
def test_any_weights(case: SgdCase) -> None:
    check(case)


def test_the_table_of_an_earlier_call_may_be_used_again() -> None:
    tensors, numbers = make(SgdCase())
    table = sgd_update(tensors, numbers)
    assert table is not None
    other, _ = make(SgdCase())
    assert sgd_update(other, numbers, table) is table
    again, _ = make(SgdCase())
    sgd_update(again, numbers)
    for left, right in zip(other.weights, again.weights, strict=True):
        assert torch.equal(left, right)
    fewer, _ = make(SgdCase(shapes=((3,),)))
    assert sgd_update(fewer, numbers, table) is not table
