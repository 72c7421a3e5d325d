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
from hypothesis import strategies as st

from engine.kernels import batch_sums
from tests.interpreter.device import imitate
from tests.kernels.sums_cases import CASES, SumsCase, check, make, zero_sums

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
@given(
    st.builds(
        SumsCase,
        batch=st.integers(0, 40),
        classes=st.integers(1, 70),
        dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
        given=st.tuples(*[st.booleans()] * 4),
        terms=st.just(3),
        sources=st.lists(st.integers(-1, 2), min_size=1, max_size=4).map(tuple),
        with_alpha=st.booleans(),
        strided=st.booleans(),
        ties=st.booleans(),
        nans=st.booleans(),
        seed=st.integers(0, 2**31),
    )
)
def test_any_batch(case: SumsCase) -> None:
    check(case)


def test_the_first_loss_that_is_not_finite_is_kept() -> None:
    sums = zero_sums(4)
    for step, loss in enumerate((1.0, math.nan, math.inf)):
        batch = make(SumsCase())._replace(loss=torch.tensor(loss), step=torch.tensor(step))
        batch.terms[1] = loss
        batch_sums(sums, batch)
    assert sums.record.tolist() == [1, 1, 0, 0, 0]
