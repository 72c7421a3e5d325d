"""Comparison of the rows of a table with its baseline, over seeds and over test images.

Two questions, each with an answer of its own:

- Would other seeds say the same on these test images? The rows are the treatments and the seeds the blocks of a
  randomised complete block design: accuracy = row + seed + error. A row's difference to the baseline is
  mean_s (y_rs - y_bs) +- t s sqrt(2 / S), where s^2 is the mean square of what row and seed leave over, pooled
  over all R rows, with (R - 1)(S - 1) degrees of freedom, where three seeds of two rows alone have 2. It is
  assumed that the errors of all rows have the same variance; of two rows it is the paired t-test, which needs no
  such thing.
- Would other test images say the same of these networks? d_i = mean_s (a_is - b_is) of an image i has a standard
  error over images, std(d_i) / sqrt(N).

Shape suffixes: R rows, S seeds, N images.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from bench.lib.accuracy.cells import AttackAccuracy
from bench.lib.accuracy.protocol import ProtocolTable
from engine.config import recipes
from engine.evaluation.statistics.intervals import CONFIDENCE, holm, of_mean
from engine.evaluation.statistics.paired import Interval, StudentTest, by_student

AGREES, DISAGREES, NOT_RESOLVED = "agrees", "disagrees", "not resolved"
NO_DIFFERENCE, NOT_IN_PAPER, NOT_MEASURED = "paper: no difference", "not in the paper", "not measured"

Accuracies = Mapping[str, Mapping[int, AttackAccuracy]]
"""Of one attack, by row and seed."""


@dataclass(frozen=True)
class Difference:
    """Accuracy of a row minus that of the baseline, in [-1, 1]: the mean over the seeds of the table.

    by_seed: in their order. interval, p_value: by the block design, for other seeds; None where one seed, or seeds
    that do not vary, tell nothing. adjusted: p-value by Holm's method, over the rows of the table under this
    attack. images_interval: for other test images, these networks given. paper: the paper's difference, None where
    it has none. verdict: our direction beside the paper's.
    """

    difference: float
    by_seed: tuple[float, ...]
    interval: Interval | None
    p_value: float | None
    adjusted: float | None
    images_interval: Interval
    paper: float | None
    verdict: str


@dataclass(frozen=True)
class ComparedRow:
    """A row under one attack. by_seed: all that is measured. mean, deviation, interval: over the seeds compared.

    deviation: with S - 1; None of one seed. interval: by Student's t of these seeds alone. against: None of the
    baseline, and of a row with which it shares no seed.
    """

    row: str
    by_seed: Mapping[int, float]
    mean: float | None = None
    deviation: float | None = None
    interval: Interval | None = None
    against: Difference | None = None


@dataclass(frozen=True)
class ComparedTable:
    """All rows of a table under one attack.

    seeds: those that all compared rows have. n: images. residual: s of the block design, None without degrees of
    freedom (df). resolvable: the smallest true difference that is told from 0 with the probability `POWER`, by an
    interval of its own; resolvable_together: after Holm's adjustment at its hardest.
    """

    attack: str
    baseline: str
    seeds: tuple[int, ...]
    n: int
    df: int
    residual: float | None
    resolvable: float | None
    resolvable_together: float | None
    rows: tuple[ComparedRow, ...]

    @property
    def is_measured(self) -> bool:
        """True if some row has a number."""
        return any(row.mean is not None for row in self.rows)


def compare_rows(table: ProtocolTable, attack: str, accuracies: Accuracies) -> ComparedTable:
    """Rows of a table under an attack. Raises ValueError where they were measured on other test images."""
    known = {row: accuracies.get(row, {}) for row in table.rows}
    names, seeds = compared(table.baseline, {row: set(found) for row, found in known.items()})
    _check_images(attack, [known[row][seed] for row in names for seed in seeds])
    rows = {
        row: ComparedRow(row, {seed: found[seed].share for seed in sorted(found)}) for row, found in known.items()
    }
    if not names:
        return ComparedTable(attack, table.baseline, (), 0, 0, None, None, None, tuple(rows.values()))
    n = known[names[0]][seeds[0]].n
    residual, df = block_residual(np.array([[known[row][seed].correct for seed in seeds] for row in names]))
    residual, error = residual / n, residual / n * math.sqrt(2 / len(seeds))
    rows |= {row: _summary(rows[row], seeds) for row in names}
    against = [row for row in names if row != table.baseline] if table.baseline in names else []
    for row in against:
        pairs = [(known[row][seed], known[table.baseline][seed]) for seed in seeds]
        rows[row] = replace(rows[row], against=_difference(table, attack, row, pairs, error, df))
    level = (1 - CONFIDENCE) / max(1, len(names) - 1)  # the hardest that Holm's adjustment asks for
    return ComparedTable(
        attack, table.baseline, seeds, n, df, residual if df else None, by_student(0.0, error, df).resolvable,
        by_student(0.0, error, df, level).resolvable, _adjusted(rows.values()),
    )  # fmt: skip


def compared(baseline: str, seeds: Mapping[str, AbstractSet[int]]) -> tuple[list[str], tuple[int, ...]]:
    """Rows that are compared, in their order, and the seeds that all of them have.

    seeds: those measured, by row. The baseline comes first, then rows with the most seeds; a row that has none of
    the seeds that are left is not compared.
    """
    ordered = sorted(seeds, key=lambda row: (row != baseline, -len(seeds[row])))
    chosen: set[str] = set()
    common: AbstractSet[int] = set().union(*seeds.values())
    for row in ordered:
        if left := common & seeds[row]:
            chosen.add(row)
            common = left
    return [row for row in seeds if row in chosen], tuple(sorted(common)) if chosen else ()


def block_residual(counts_RS: NDArray[np.int64]) -> tuple[float, int]:
    """Standard deviation of what rows and seeds leave over of (R, S) numbers, and its degrees of freedom.

    e_rs = y_rs - mean_s y_rs - mean_r y_rs + mean y; s^2 = sum e^2 / ((R - 1)(S - 1)). The sum is of whole
    numbers, so that one of 0 is exact; without degrees of freedom s is 0.
    """
    rows, seeds = counts_RS.shape
    df = (rows - 1) * (seeds - 1)
    if not df:
        return 0.0, 0
    of_row_R1, of_seed_1S = counts_RS.sum(1, keepdims=True), counts_RS.sum(0, keepdims=True)
    scaled_RS = rows * seeds * counts_RS - rows * of_row_R1 - seeds * of_seed_1S + counts_RS.sum()
    return math.sqrt(int((scaled_RS**2).sum()) / df) / (rows * seeds), df


def _adjusted(rows: Iterable[ComparedRow]) -> tuple[ComparedRow, ...]:
    """The rows with p-values by Holm's method over those that have one."""
    rows = list(rows)
    known = [row.against.p_value for row in rows if row.against and row.against.p_value is not None]
    adjusted = iter(holm(known))
    return tuple(
        replace(row, against=replace(row.against, adjusted=next(adjusted)))
        if row.against and row.against.p_value is not None
        else row
        for row in rows
    )


def beside_paper(
    table: ProtocolTable, row: str, attack: str, interval: Interval | None
) -> tuple[float | None, str]:
    """The paper's difference of a row to the baseline, None where it has none, and our interval beside it."""
    if row not in table.recipes:
        return None, NOT_IN_PAPER
    ours, baseline = (_printed(table.recipes[name]) for name in (row, table.baseline))
    if attack not in ours or attack not in baseline:
        return None, NOT_IN_PAPER
    paper = round(ours[attack] - baseline[attack], 6) / 100  # as printed, with two decimals
    if not paper:
        return 0.0, NO_DIFFERENCE
    if interval is None or interval[0] <= 0 <= interval[1]:
        return paper, NOT_RESOLVED
    return paper, AGREES if (interval[0] > 0) == (paper > 0) else DISAGREES


def _check_images(attack: str, found: Sequence[AttackAccuracy]) -> None:
    if len({(each.n, each.images) for each in found}) > 1:
        told = ", ".join(sorted({f"{each.n:,} ({each.images})" for each in found}))
        raise ValueError(f"{attack}: rows of a table were measured on different test images: {told}")


def _summary(row: ComparedRow, seeds: Sequence[int]) -> ComparedRow:
    """The row with its mean, spread and interval."""
    values = [row.by_seed[seed] for seed in seeds]
    mean = statistics.fmean(values)
    if len(values) == 1:
        return replace(row, mean=mean)
    deviation = statistics.stdev(values)
    interval = by_student(mean, deviation / math.sqrt(len(values)), len(values) - 1).interval
    return replace(row, mean=mean, deviation=deviation, interval=interval)


def _difference(
    table: ProtocolTable,
    attack: str,
    row: str,
    pairs: Sequence[tuple[AttackAccuracy, AttackAccuracy]],
    error: float,
    df: int,
) -> Difference:
    """A row beside the baseline, not adjusted. pairs: both of each seed. error: of the difference."""
    n = pairs[0][0].n
    more = [ours.correct - baseline.correct for ours, baseline in pairs]
    difference = sum(more) / (len(more) * n)
    test = by_student(difference, error, df) if df else StudentTest(None, None, None)
    images_SN = np.array([ours.bits().astype(np.float64) - baseline.bits() for ours, baseline in pairs])
    return Difference(
        difference, tuple(each / n for each in more), test.interval, test.p_value, None,
        of_mean(torch.from_numpy(images_SN.mean(0))), *beside_paper(table, row, attack, test.interval),
    )  # fmt: skip


def _printed(recipe: str) -> dict[str, float]:
    """Accuracies in percent that the paper prints in a row, by attack."""
    return dict(recipes.paper_row(recipe).paper.items())
