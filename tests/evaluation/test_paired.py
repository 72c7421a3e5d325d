"""Comparisons of networks on the same images, against scipy, closed forms and simulation."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from engine.evaluation.statistics import paired
from engine.evaluation.statistics.paired import PairedComparison, compare

Shape = tuple[int, int, int]


def counted(only_a: int, only_b: int, both: int, neither: int) -> tuple[paired.Bools, paired.Bools]:
    """Verdicts of two networks with those counts."""
    a = [True] * only_a + [False] * only_b + [True] * both + [False] * neither
    b = [False] * only_a + [True] * only_b + [True] * both + [False] * neither
    return np.array(a), np.array(b)


def drawn(seed: int, seeds: int, n: int, share: float) -> paired.Bools:
    """Verdicts of seeds that agree on most images, as networks do."""
    generator = np.random.default_rng(seed)
    hardness_N = np.random.default_rng(99).random(n)
    return (hardness_N + 0.15 * generator.standard_normal((seeds, n))) < share


def turned(found: PairedComparison) -> tuple[Any, ...]:
    """Numbers of compare(b, a), as those of compare(a, b) say they are."""
    low, high = found.bootstrap
    of_t = None if found.interval is None else (-found.interval[1], -found.interval[0])
    return -found.difference, of_t, (-high, -low), found.p_value, found.resolvable, found.only_b, found.only_a


def numbers(found: PairedComparison) -> tuple[Any, ...]:
    return (
        found.difference, found.interval, found.bootstrap, found.p_value, found.resolvable, found.only_a,
        found.only_b,
    )  # fmt: skip


# ---------------------------------------------------------------- two networks


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_mcnemar_s_test_counts_the_ways(only_a: int, only_b: int) -> None:
    trials, least = only_a + only_b, min(only_a, only_b)
    ways = sum(math.comb(trials, k) for k in range(least + 1))
    assert paired.mcnemar(only_a, only_b) == pytest.approx(min(1.0, 2 * ways / 2**trials), rel=1e-10)


def test_mcnemar_s_test_by_hand_and_of_many_images() -> None:
    assert paired.mcnemar(0, 6) == pytest.approx(2 / 64, rel=1e-12)
    assert paired.mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    expected = stats.binomtest(2450, 5000, 0.5).pvalue
    assert paired.mcnemar(2450, 2550) == pytest.approx(expected, rel=1e-9)
    assert 0 <= paired.mcnemar(0, 40_000) < 1e-300
    assert paired.mcnemar(0, 0) == 1


def test_the_difference_and_its_interval() -> None:
    """The bootstrap's interval is scipy's, and z times the closed form of the standard error."""
    b, c, n = 130, 90, 1000
    verdicts_a, verdicts_b = counted(b, c, 500, n - 500 - b - c)
    found = compare(verdicts_a, verdicts_b)
    assert (found.only_a, found.only_b, found.n, found.test) == (b, c, n, "mcnemar")
    assert found.difference == pytest.approx((b - c) / n) == found.accuracy_a - found.accuracy_b
    assert found.interval == found.bootstrap
    error = math.sqrt((b + c) / n - ((b - c) / n) ** 2) / math.sqrt(n)
    half = 1.959964 * error
    assert found.bootstrap == pytest.approx((0.04 - half, 0.04 + half), abs=0.0015)  # the lattice is of 1 / n
    theirs = stats.bootstrap(
        (verdicts_a.astype(float) - verdicts_b,), np.mean, n_resamples=9999, method="percentile",
        rng=np.random.default_rng(5), vectorized=True, batch=500,
    )  # fmt: skip
    assert found.bootstrap == pytest.approx(tuple(theirs.confidence_interval), abs=0.0021)
    again = compare(verdicts_a, verdicts_b)
    assert numbers(again) == numbers(found)


def test_resamples_have_the_closed_form_s_standard_error() -> None:
    b, c, n = 40, 10, 400
    patterns_PS, counts_P = paired._patterns(*(each[None] for each in counted(b, c, 300, n - 300 - b - c)))
    found_R = paired._resampled(patterns_PS, counts_P, 1, paired_seeds=False, seed=0)
    error = math.sqrt((b + c) / n - ((b - c) / n) ** 2) / math.sqrt(n)
    assert len(found_R) == paired.RESAMPLES >= 10_000
    assert found_R.std() == pytest.approx(error, rel=4 / math.sqrt(2 * len(found_R)))
    assert found_R.mean() == pytest.approx((b - c) / n, abs=4 * error / math.sqrt(len(found_R)))


def test_resamples_are_drawn_in_parts_where_there_are_many_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "_NUMBERS_AT_ONCE", 4 * 999)
    patterns_PS, counts_P = paired._patterns(*(each[None] for each in counted(4, 1, 30, 5)))
    assert len(paired._resampled(patterns_PS, counts_P, 1, paired_seeds=False, seed=0)) == paired.RESAMPLES


@pytest.mark.parametrize(("discordant", "n"), [(60, 1000), (300, 2000), (0, 500), (3, 10_000), (1000, 10_000)])
def test_a_resolvable_difference_is_found_as_often_as_it_says(discordant: int, n: int) -> None:
    """Simulated: networks with so many discordant images, and that difference."""
    found = paired.resolvable(discordant, n)
    assert found is not None
    share = max(discordant / n, found)
    counts = np.random.default_rng(0).multinomial(
        n, [(share + found) / 2, (share - found) / 2, 1 - share], size=3000
    )
    pairs, times = np.unique(np.sort(counts[:, :2], axis=1), axis=0, return_counts=True)
    p_values = np.array([stats.binomtest(int(low), int(low + high)).pvalue if high else 1 for low, high in pairs])
    power = times[p_values < 0.05].sum() / 3000
    assert power == pytest.approx(paired.POWER, abs=0.06)  # the exact test is discrete, the formula is not


def test_too_few_images_resolve_nothing() -> None:
    assert paired.resolvable(2, 5) is None  # 2 / 2^5 > 0.05
    assert paired.resolvable(0, 6) is not None
    assert paired.resolvable(100, 1000, 0.05 / 4) > paired.resolvable(100, 1000, 0.05)  # type: ignore[operator]


# ---------------------------------------------------------------- groups of seeds


def test_groups_of_the_same_seeds_are_paired() -> None:
    a_SN, b_SN = drawn(1, 5, 400, 0.6), drawn(2, 5, 400, 0.55)
    found = compare(a_SN, b_SN, paired_seeds=True)
    theirs = stats.ttest_rel(a_SN.mean(1), b_SN.mean(1))
    assert found.test == "paired t"
    assert found.p_value == pytest.approx(theirs.pvalue, rel=1e-8)
    assert found.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-8)
    assert found.difference == pytest.approx(a_SN.mean() - b_SN.mean())
    assert found.only_a is None
    error = stats.sem(a_SN.mean(1) - b_SN.mean(1))
    assert found.resolvable == pytest.approx(error * (stats.t.ppf(0.975, 4) + stats.t.ppf(0.8, 4)))


@pytest.mark.parametrize("sizes", [(3, 5), (2, 2), (8, 3)])
def test_other_groups_are_compared_by_welch_s_test(sizes: tuple[int, int]) -> None:
    a_SN, b_SN = drawn(3, sizes[0], 300, 0.6), drawn(4, sizes[1], 300, 0.58)
    found = compare(a_SN, b_SN)
    theirs = stats.ttest_ind(a_SN.mean(1), b_SN.mean(1), equal_var=False)
    assert (found.test, found.seeds_a, found.seeds_b) == ("welch", *sizes)
    assert found.p_value == pytest.approx(theirs.pvalue, rel=1e-8)
    assert found.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-8)


@pytest.mark.parametrize("turn", [False, True])
def test_a_group_is_compared_with_one_network_as_given(turn: bool) -> None:
    a_SN, b_SN = drawn(5, 4, 300, 0.6), drawn(6, 1, 300, 0.58)
    found = compare(b_SN, a_SN) if turn else compare(a_SN, b_SN[0])
    theirs = stats.ttest_1samp(a_SN.mean(1), b_SN.mean())
    low, high = (bound - b_SN.mean() for bound in theirs.confidence_interval(0.95))
    assert found.test == "one-sample t"
    assert found.p_value == pytest.approx(theirs.pvalue, rel=1e-8)
    assert found.interval == pytest.approx((-high, -low) if turn else (low, high), rel=1e-8)


@pytest.mark.parametrize("paired_seeds", [True, False])
def test_the_bootstrap_of_groups_resamples_seeds_and_images(paired_seeds: bool) -> None:
    """Beside a plain loop that takes indices of images and of seeds."""
    a_SN, b_SN = drawn(7, 4, 120, 0.6), drawn(8, 4, 120, 0.5)
    low, high = paired.bootstrap_interval(a_SN, b_SN, paired_seeds=paired_seeds)
    generator, differences = np.random.default_rng(11), []
    for _ in range(4000):
        images = generator.integers(0, 120, 120)
        rows_a = generator.integers(0, 4, 4)
        rows_b = rows_a if paired_seeds else generator.integers(0, 4, 4)
        differences.append(a_SN[rows_a][:, images].mean() - b_SN[rows_b][:, images].mean())
    assert (low, high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])), abs=0.009)


def test_seeds_that_do_not_vary_have_no_interval() -> None:
    a_SN = np.array([[1, 1, 0, 1], [1, 0, 1, 1]], bool)
    b_SN = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool)
    found = compare(a_SN, b_SN, paired_seeds=True)
    assert (found.difference, found.interval, found.p_value, found.resolvable) == (0.25, None, None, None)
    same = compare(a_SN, a_SN[::-1], paired_seeds=True)
    assert (same.difference, same.interval, same.p_value) == (0, None, 1)


# ---------------------------------------------------------------- properties

shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 12))


def verdicts(shape: Shape, data: st.DataObject) -> tuple[paired.Bools, paired.Bools]:
    rows = [
        data.draw(st.lists(st.booleans(), min_size=size * shape[2], max_size=size * shape[2]))
        for size in shape[:2]
    ]
    return np.array(rows[0]).reshape(shape[0], -1), np.array(rows[1]).reshape(shape[1], -1)


@given(shapes, st.data(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_turned_round_every_difference_has_the_other_sign(shape: Shape, data: st.DataObject, pair: bool) -> None:
    a_SN, b_SN = verdicts(shape, data)
    pair = pair and shape[0] == shape[1]
    assert numbers(compare(b_SN, a_SN, paired_seeds=pair)) == turned(compare(a_SN, b_SN, paired_seeds=pair))


@given(shapes, st.data(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_order_of_the_images_does_not_matter(shape: Shape, data: st.DataObject, random: Any) -> None:
    a_SN, b_SN = verdicts(shape, data)
    order = list(range(shape[2]))
    random.shuffle(order)
    assert numbers(compare(a_SN[:, order], b_SN[:, order])) == numbers(compare(a_SN, b_SN))


@given(st.integers(1, 3), st.integers(1, 12), st.data())
@settings(max_examples=30, deadline=None)
def test_the_same_networks_do_not_differ(seeds: int, n: int, data: st.DataObject) -> None:
    a_SN, _ = verdicts((seeds, 1, n), data)
    found = compare(a_SN, a_SN, paired_seeds=True)
    assert (found.difference, found.p_value) == (0, 1)
    assert found.interval == ((0, 0) if seeds == 1 else None)
    assert found.bootstrap == (0, 0)


# ---------------------------------------------------------------- arguments


def test_tensors_and_lists_are_taken() -> None:
    of_lists = compare([True, False, True], [False, False, True])
    assert of_lists == compare(torch.tensor([True, False, True]), torch.tensor([[False, False, True]]))


@pytest.mark.parametrize(
    ("a", "b", "keys", "complaint"),
    [
        ([True], [True, False], {}, "verdicts_b: of 2 images, and verdicts_a of 1"),
        ([1, 0], [True, False], {}, "verdicts_a: bool of shape (N,) or (S, N) is expected, got int64 (2,)"),
        ([True], "1", {}, "verdicts_b: bool of shape"),
        ([[True], [True, False]], [True], {}, "verdicts_a: rows of the same length"),
        ([], [], {}, "verdicts_a: bool"),
        (np.zeros((2, 0), bool), [True], {}, "verdicts_a: there is nothing to compare"),
        ([[True], [False]], [True], {"paired_seeds": True}, "paired_seeds: 2 seeds of A, and 1 of B"),
        ([True], [True], {"comparisons": 0}, "comparisons: at least 1 is expected, got 0"),
    ],
)
def test_what_cannot_be_compared(a: Any, b: Any, keys: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        compare(a, b, **keys)
