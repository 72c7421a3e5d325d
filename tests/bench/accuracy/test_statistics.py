"""Rows of a table beside its baseline: by least squares, by scipy, by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy import stats

from bench.lib.accuracy.cells import AttackAccuracy
from bench.lib.accuracy.protocol import ProtocolTable
from bench.lib.accuracy.statistics import (
    AGREES,
    DISAGREES,
    NO_DIFFERENCE,
    NOT_IN_PAPER,
    NOT_RESOLVED,
    ComparedTable,
    Difference,
    beside_paper,
    compare_rows,
    compared,
)
from engine.config import recipes
from engine.evaluation.statistics import paired
from tests.bench.accuracy.made_cells import accuracy

N = 200
ROWS = ("a", "b", "c", "d")


def table(
    rows: Sequence[str] = ROWS, baseline: str = "b", chosen: Mapping[str, str] | None = None
) -> ProtocolTable:
    return ProtocolTable(
        title="T", baseline=baseline, attacks={"pgd20": N}, rows=dict.fromkeys(rows), recipes=dict(chosen or {})
    )


def cells(
    rows: Sequence[str] = ROWS, seeds: Sequence[int] = (0, 1, 2), n: int = N
) -> dict[str, dict[int, AttackAccuracy]]:
    """Verdicts by chance, another share of right ones for each row."""
    generator = np.random.default_rng(5)
    return {
        row: {seed: accuracy(generator.random(n) < 0.3 + 0.05 * place) for seed in seeds}
        for place, row in enumerate(rows)
    }


def difference(found: ComparedTable, row: str) -> Difference:
    (against,) = (each.against for each in found.rows if each.row == row)
    assert against is not None
    return against


# ---------------------------------------------------------------- other seeds


@pytest.mark.parametrize("seeds", [(0, 1), (0, 1, 2), (3, 5, 8, 9, 20)])
def test_differences_and_intervals_are_those_of_least_squares(seeds: tuple[int, ...]) -> None:
    """Accuracy = row + seed + error, fitted with indicator columns in float64."""
    made = cells(seeds=seeds)
    found = compare_rows(table(), "pgd20", made)
    y, design = [], []
    for place, row in enumerate(ROWS):
        for number, seed in enumerate(seeds):
            y.append(made[row][seed].share)
            design.append(
                [1.0 * (place == k) for k in range(4)] + [1.0 * (number == k) for k in range(1, len(seeds))]
            )
    x = np.array(design)
    fitted, _, rank, _ = np.linalg.lstsq(x, np.array(y), rcond=None)
    left = np.array(y) - x @ fitted
    df = len(y) - rank
    variance = left @ left / df
    covariance = variance * np.linalg.inv(x.T @ x)
    assert found.df == df
    assert found.residual == pytest.approx(math.sqrt(variance))
    for place, row in enumerate(ROWS):
        if row == "b":
            continue
        contrast = np.zeros(x.shape[1])
        contrast[[place, 1]] = 1, -1
        value, error = contrast @ fitted, math.sqrt(contrast @ covariance @ contrast)
        against = difference(found, row)
        assert against.difference == pytest.approx(value)
        assert against.interval == pytest.approx(stats.t(df, value, error).interval(0.95))
        assert against.p_value == pytest.approx(2 * stats.t.sf(abs(value) / error, df))
        assert found.resolvable == pytest.approx(error * (stats.t.ppf(0.975, df) + stats.t.ppf(0.8, df)))
        assert found.resolvable_together == pytest.approx(
            error * (stats.t.ppf(1 - 0.05 / 3 / 2, df) + stats.t.ppf(0.8, df))
        )


def test_two_rows_are_the_paired_t_test() -> None:
    made = cells(("a", "b"), (0, 1, 2))
    against = difference(compare_rows(table(("a", "b")), "pgd20", made), "a")
    values = [[made[row][seed].share for seed in (0, 1, 2)] for row in ("a", "b")]
    expected = stats.ttest_rel(*values)
    assert against.p_value == pytest.approx(expected.pvalue)
    assert against.adjusted == against.p_value
    assert against.interval == pytest.approx(tuple(expected.confidence_interval()))
    verdicts = [[made[row][seed].bits() for seed in (0, 1, 2)] for row in ("a", "b")]
    same = paired.compare(*map(np.array, verdicts), paired_seeds=True)
    assert against.interval == pytest.approx(same.interval)
    assert against.difference == pytest.approx(same.difference)


def test_p_values_are_adjusted_over_the_rows_by_holm() -> None:
    """The smallest of three is tripled, the next doubled, and none becomes smaller than the one before it."""
    found = compare_rows(table(), "pgd20", cells())
    known = sorted((against.p_value or 0, against.adjusted) for row in found.rows if (against := row.against))
    first, second, third = (p_value for p_value, _ in known)
    by_hand = [3 * first, max(3 * first, 2 * second), max(3 * first, 2 * second, third)]
    assert [adjusted for _, adjusted in known] == pytest.approx([min(1, value) for value in by_hand])


def test_means_and_spreads_are_those_of_numpy() -> None:
    made = cells()
    for row in compare_rows(table(), "pgd20", made).rows:
        shares = np.array([made[row.row][seed].bits().mean() for seed in (0, 1, 2)])
        assert row.mean == pytest.approx(shares.mean())
        assert row.deviation == pytest.approx(shares.std(ddof=1))
        expected = stats.t(2, shares.mean(), stats.sem(shares)).interval(0.95)
        assert row.interval == pytest.approx(expected)


def test_seeds_that_do_not_vary_tell_nothing() -> None:
    right, wrong = accuracy(np.arange(N) < 60), accuracy(np.arange(N) < 50)
    made = {
        "a": dict.fromkeys((0, 1), right),
        "b": dict.fromkeys((0, 1), wrong),
        "c": dict.fromkeys((0, 1), wrong),
    }
    found = compare_rows(table(("a", "b", "c")), "pgd20", made)
    a, c = difference(found, "a"), difference(found, "c")
    assert (found.residual, found.resolvable) == (0, None)
    assert (a.difference, a.interval, a.p_value, a.adjusted) == (0.05, None, None, None)
    assert (c.difference, c.interval, c.p_value, c.adjusted) == (0, None, 1, 1)


# ---------------------------------------------------------------- other test images


def test_other_test_images_are_those_of_the_differences_by_image() -> None:
    made = cells()
    against = difference(compare_rows(table(), "pgd20", made), "d")
    by_image = np.mean([made["d"][s].bits() * 1.0 - made["b"][s].bits() for s in (0, 1, 2)], axis=0)
    expected = stats.norm(by_image.mean(), by_image.std(ddof=1) / math.sqrt(N)).interval(0.95)
    assert against.images_interval == pytest.approx(expected, rel=1e-6)


def test_rows_of_other_images_are_refused() -> None:
    made = cells()
    made["c"][1] = accuracy(made["c"][1].bits(), "bbbbbbbbbbbb")
    with pytest.raises(ValueError, match=r"pgd20: .* different test images: 200 \(aaa.*200 \(bbb"):
        compare_rows(table(), "pgd20", made)


# ---------------------------------------------------------------- seeds that are missing


@pytest.mark.parametrize(("seeds", "rows", "common"), [
    ({"a": {0, 1}, "b": {0, 1, 2}, "c": {1, 2}}, ["a", "b", "c"], (1,)),
    ({"a": {2}, "b": {0, 1}, "c": {0, 1}}, ["b", "c"], (0, 1)),
    ({"a": {0}, "b": {0, 1, 2}, "c": {1, 2}, "d": {1}}, ["b", "c", "d"], (1,)),
    ({"a": {0}, "b": set(), "c": {0, 1}}, ["a", "c"], (0,)),
    ({"a": set(), "b": set()}, [], ()),
])  # fmt: skip
def test_compared_are_seeds_that_all_rows_have(
    seeds: dict[str, set[int]], rows: list[str], common: tuple[int, ...]
) -> None:
    assert compared("b", seeds) == (rows, common)


def test_numbers_are_of_the_seeds_in_common_and_the_rest_is_not_measured() -> None:
    made = cells()
    made["a"].pop(2)
    made["d"] = {}
    found = compare_rows(table(), "pgd20", made)
    whole = compare_rows(
        table(("a", "b", "c")), "pgd20", {row: {s: made[row][s] for s in (0, 1)} for row in "abc"}
    )
    assert found.seeds == (0, 1)
    for row in ("a", "c"):
        assert difference(found, row) == difference(whole, row)
    last = found.rows[-1]
    assert (last.row, last.mean, last.against) == ("d", None, None)


def test_one_seed_has_an_interval_of_other_images_alone() -> None:
    found = compare_rows(table(), "pgd20", cells(seeds=(1,)))
    against = difference(found, "a")
    assert (found.df, found.residual, found.resolvable) == (0, None, None)
    assert (against.interval, against.p_value, against.adjusted) == (None, None, None)
    assert against.images_interval[0] < against.difference < against.images_interval[1]
    assert [row.deviation for row in found.rows] == [None] * 4


def test_without_the_baseline_there_are_means_alone() -> None:
    made = cells()
    made["b"] = {}
    found = compare_rows(table(), "pgd20", made)
    assert [row.mean is None for row in found.rows] == [False, True, False, False]
    assert not any(row.against for row in found.rows)
    assert not compare_rows(table(), "pgd20", {}).is_measured


# ---------------------------------------------------------------- the paper


@pytest.mark.parametrize(("row", "attack", "interval", "paper", "verdict"), [
    ("iad1", "pgd20", (0.01, 0.02), 0.0078, AGREES),
    ("iad1", "pgd20", (-0.02, -0.01), 0.0078, DISAGREES),
    ("iad1", "natural", (-0.02, -0.01), -0.0104, AGREES),
    ("iad1", "natural", (0.01, 0.02), -0.0104, DISAGREES),
    ("iad1", "pgd20", (-0.01, 0.02), 0.0078, NOT_RESOLVED),
    ("iad1", "pgd20", (0.0, 0.02), 0.0078, NOT_RESOLVED),
    ("iad1", "pgd20", None, 0.0078, NOT_RESOLVED),
    ("akd2", "pgd20", (0.01, 0.02), 0.0, NO_DIFFERENCE),
    ("rslad", "pgd20", (0.01, 0.02), None, NOT_IN_PAPER),
    ("iad1", "pgd7", (0.01, 0.02), None, NOT_IN_PAPER),
])  # fmt: skip
def test_a_direction_beside_the_paper_s(
    row: str, attack: str, interval: tuple[float, float] | None, paper: float | None, verdict: str
) -> None:
    """The paper's Table 2: ARD 83.13 and 51.36, IAD-I 82.09 and 52.14, AKD2 51.36 under PGD-20."""
    chosen = {name: f"table2-cifar10-at-{name}" for name in ("ard", "iad1", "akd2")}
    assert recipes.paper_row(chosen["ard"]).paper["pgd20"] == 51.36
    found = beside_paper(table(("ard", "iad1", "akd2", "rslad"), "ard", chosen), row, attack, interval)
    assert found == (paper if paper is None else pytest.approx(paper), verdict)
