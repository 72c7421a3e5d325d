"""Intervals and paired tests, against scipy and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from engine.evaluation.candidates import mean
from engine.evaluation.statistics import intervals


@pytest.mark.parametrize(("count", "n"), [(0, 10), (1, 3), (7, 10), (500, 1000), (999, 1000), (10, 10)])
def test_wilson_s_interval_is_scipy_s(count: int, n: int) -> None:
    expected = stats.binomtest(count, n).proportion_ci(0.95, method="wilson")
    assert intervals.wilson(count, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_interval_of_a_mean() -> None:
    values_N = torch.tensor([0.0, 0.5, 1.0, 0.5, 0.25], dtype=torch.float64)
    mean_of, half = 0.45, 1.959963984540054 * math.sqrt(0.1375 / 5)  # s^2 = 0.55 / 4
    assert intervals.of_mean(values_N) == pytest.approx((mean_of - half, mean_of + half), abs=1e-12)


@pytest.mark.parametrize(("only_left", "only_right"), [(9, 1), (4, 0), (12, 10), (30, 8)])
def test_for_shares_the_paired_test_is_mcnemar_s(only_left: int, only_right: int) -> None:
    left = torch.tensor([1] * only_left + [0] * only_right + [1] * 20 + [0] * 20, dtype=torch.bool)
    right = torch.tensor([0] * only_left + [1] * only_right + [1] * 20 + [0] * 20, dtype=torch.bool)
    exact = stats.binomtest(only_left, only_left + only_right, 0.5).pvalue
    found = intervals.permutation_test(left, right, mean, seed=1)
    error = 4 * math.sqrt(exact * (1 - exact) / intervals.ASSIGNMENTS) + 1 / intervals.ASSIGNMENTS
    assert found == pytest.approx(exact, abs=error)


def test_the_same_numbers_cannot_be_told_apart_and_the_seed_decides_the_rest() -> None:
    some = torch.rand(50, generator=torch.Generator().manual_seed(0))
    other = some + torch.rand(50, generator=torch.Generator().manual_seed(1)) - 0.4
    assert intervals.permutation_test(some, some, mean) == 1.0
    assert intervals.permutation_test(some[:0], some[:0], mean) == 1.0
    first, again, third = (intervals.permutation_test(some, other, mean, seed) for seed in (3, 3, 4))
    assert first == again != third


def test_many_images_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All assignments are drawn, however few fit into the memory at once."""
    some, other = torch.zeros(40), torch.ones(40)
    monkeypatch.setattr(intervals, "_NUMBERS_AT_ONCE", 40 * 7)
    assert intervals.permutation_test(some, other, mean) == 1 / (1 + intervals.ASSIGNMENTS)


def test_holm_s_adjustment_by_hand() -> None:
    # Sorted 0.01, 0.03, 0.04: times 3, 2, 1, none smaller than one before it.
    assert intervals.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert intervals.holm([0.9, 0.8]) == [1.0, 1.0]
    assert intervals.holm([]) == []
