"""The sums of a batch as a Triton kernel, in the interpreter: against counts sample by sample."""

from __future__ import annotations

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "it takes a process of its own: TRITON_INTERPRET=1 pytest tests/interpreter", allow_module_level=True
    )
pytest.importorskip("triton", reason="triton is not installed")

from hypothesis import given, settings

from tests.interpreter.device import imitate
from tests.kernels.sums_cases import CASES, SumsCase, any_case, check, check_first_record

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what a mask then drops


@pytest.fixture(autouse=True)
def triton_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    imitate(monkeypatch)
    monkeypatch.setenv("ENGINE_KERNELS", "triton")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_the_totals_are_the_counts(case: SumsCase, loss: float | None) -> None:
    check(case, loss)


@settings(max_examples=30, deadline=None)
@given(any_case(70, 4, (torch.float32, torch.float16, torch.bfloat16)))
def test_any_batch(case: SumsCase) -> None:
    check(case)


def test_the_first_loss_that_is_not_finite_is_kept() -> None:
    check_first_record()
