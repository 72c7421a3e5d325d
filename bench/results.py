"""One row per measurement, its arithmetic, and the CSV file it is written to."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from bench.cases import Case, beyond
from bench.machine import Facts

COPY, EAGER, COMPILE = "copy", "eager", "compile"


@dataclass(frozen=True)
class Row:
    """One line of kernels.csv; README.md describes the columns. None: there is nothing to compare with."""

    date: str
    commit: str
    device: str
    processor: str
    cores: int
    threads: int
    python: str
    torch: str
    triton: str
    op: str
    implementation: str
    mode: str
    shape: str
    setting: str
    dtype: str
    rounds: int
    median_s: float
    q10_s: float
    q90_s: float
    speedup_over_eager: float | None
    speedup_over_compile: float | None
    bytes_moved: int
    gb_per_s: float
    copy_gb_per_s: float
    share_of_copy: float
    beyond_cache: bool
    images_per_s: float | None

    @property
    def variant(self) -> str:
        """The setting, and the dtype where it is not the usual one."""
        return self.setting if self.dtype == "float32" else f"{self.setting}, {self.dtype}"


def rows(
    facts: Facts, case: Case, mode: str, samples: Mapping[str, Sequence[float]], cache_bytes: int
) -> list[Row]:
    """Rows of one case: of every candidate but the copy, which all are compared with.

    samples: seconds per call in each round, by candidate; the candidates of a round were timed one after another.
    """
    copies = samples[COPY]
    copy_bytes_per_s = case.footprint / statistics.median(copies)
    result = []
    for name, seconds in samples.items():
        if name == COPY:
            continue
        median, (q10, q90) = statistics.median(seconds), quantiles(seconds)
        shares = [
            case.bytes_moved / mine / (case.footprint / copy) for mine, copy in zip(seconds, copies, strict=True)
        ]
        row = Row(
            **facts,
            op=case.op,
            implementation=name,
            mode=mode,
            shape=case.shape,
            setting=case.setting,
            dtype=str(case.dtype).removeprefix("torch."),
            rounds=len(seconds),
            median_s=median,
            q10_s=q10,
            q90_s=q90,
            speedup_over_eager=speedup(samples.get(EAGER), seconds),
            speedup_over_compile=speedup(samples.get(COMPILE), seconds),
            bytes_moved=case.bytes_moved,
            gb_per_s=case.bytes_moved / median / 1e9,
            copy_gb_per_s=copy_bytes_per_s / 1e9,
            share_of_copy=statistics.median(shares),
            beyond_cache=case.footprint >= beyond(cache_bytes),
            images_per_s=case.images / median if case.images else None,
        )
        result.append(row)
    return result


def speedup(baseline: Sequence[float] | None, seconds: Sequence[float]) -> float | None:
    """Median over the rounds of baseline / seconds: a round's disturbance is in both."""
    if baseline is None:
        return None
    return statistics.median(theirs / mine for theirs, mine in zip(baseline, seconds, strict=True))


def quantiles(seconds: Sequence[float]) -> tuple[float, float]:
    """The 10 % and the 90 % quantile, interpolated between neighbours."""
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return tenths[0], tenths[-1]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows as CSV, numbers with six digits; an absent one is an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Row))
        for row in rows:
            writer.writerow(f"{cell:.6g}" if isinstance(cell, float) else cell for cell in astuple(row))
