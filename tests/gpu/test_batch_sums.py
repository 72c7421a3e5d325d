"""`batch_sums` on a CUDA device: against counts sample by sample, and without a wait."""

from __future__ import annotations

import math

import pytest

from engine.kernels import batch_sums
from tests.gpu.stage import by_implementation, no_wait
from tests.kernels.sums_cases import CASES, SumsCase, check, check_first_record, make, on, zero_sums

pytestmark = [by_implementation("batch_sums"), pytest.mark.usefixtures("implementation")]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_the_totals_are_the_counts(device: str, case: SumsCase, loss: float | None) -> None:
    check(case, loss, device)


def test_the_first_loss_that_is_not_finite_is_kept(device: str) -> None:
    check_first_record(device)


def test_the_host_does_not_wait(device: str) -> None:
    case = SumsCase()
    batch, sums = on(device, make(case)), zero_sums(len(case.sources), device)
    batch_sums(sums, batch)
    with no_wait():
        batch_sums(sums, batch)
