"""The sums of a batch by the reference against counts sample by sample, and what the op refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from engine.kernels import batch_sums, dispatch
from tests.kernels.sums_cases import CASES, SumsCase, any_case, check, check_first_record, make, zero_sums

EVERY_FLOAT = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_the_totals_are_the_counts(case: SumsCase, loss: float | None) -> None:
    check(case, loss)


@settings(max_examples=100, deadline=None)
@given(any_case(40, 6, EVERY_FLOAT))
def test_any_batch(case: SumsCase) -> None:
    check(case)


def test_the_first_loss_that_is_not_finite_is_kept() -> None:
    check_first_record()


def changed(**fields: Any) -> Any:
    return make(SumsCase())._replace(**fields)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (changed(labels=torch.zeros(33)), "labels: expected int64"),
        (changed(loss=torch.zeros(1)), "loss and terms: expected shapes"),
        (changed(step=torch.tensor(1.0)), "step: expected int64"),
        (changed(sources=(0, 1, 2, 3)), "sources: expected places among 3 terms"),
        (changed(sources=(0, 1)), r"totals: expected float64 of shape \(20,\)"),
        (changed(alpha=torch.zeros(2)), r"alpha: expected \(33,\)"),
        (changed(logits=(None, None)), "logits: expected s_nat, s_adv"),
        (changed(logits=(None, torch.zeros(3, 4), None, None)), r"logits: s_adv: expected \(33, C\)"),
        (changed(loss=torch.zeros((), device="meta")), "one device is needed"),
    ],
)
def test_what_does_not_fit_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_sums(zero_sums(4), batch)


def test_there_is_one_for_a_cpu_and_triton_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGINE_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "missing", lambda *_: "")
    assert dispatch.choose("batch_sums", torch.device("cpu")) == "reference"
    assert dispatch.choose("batch_sums", torch.device("cuda")) == "triton"
