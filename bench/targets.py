"""The speeds that the native library is built for, and whether a measurement reached them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.results import Row

THREADS = 2


@dataclass(frozen=True)
class Target:
    """At least `wanted` in each row that `applies`; the least of them decides."""

    text: str
    unit: str
    wanted: float
    applies: Callable[[Row], bool]
    value: Callable[[Row], float | None]


def _distill(row: Row) -> bool:
    return row.op == "distill_loss"


def _pgd(row: Row) -> bool:
    return row.op == "pgd_update"


TARGETS = (
    Target(
        "distill_loss over eager at 128x10", "x", 2.0,
        lambda row: _distill(row) and row.shape == "128x10",
        lambda row: row.speedup_over_eager,
    ),
    Target(
        "distill_loss over eager at larger sizes", "x", 3.0,
        lambda row: _distill(row) and row.shape != "128x10",
        lambda row: row.speedup_over_eager,
    ),
    Target("distill_loss over torch.compile", "x", 1.0, _distill, lambda row: row.speedup_over_compile),
    Target(
        "pgd_update over eager at 128x3x32x32", "x", 5.0,
        lambda row: _pgd(row) and row.shape == "128x3x32x32",
        lambda row: row.speedup_over_eager,
    ),
    Target(
        "pgd_update of the copy's bandwidth beyond the cache", "", 0.8,
        lambda row: _pgd(row) and row.beyond_cache,
        lambda row: row.share_of_copy,
    ),
    Target(
        "crop_flip of 128x3x32x32", " images/s", 800_000.0,
        lambda row: row.op == "crop_flip" and row.shape == "128x3x32x32",
        lambda row: row.images_per_s,
    ),
)  # fmt: skip


def verdicts(rows: Iterable[Row]) -> list[str]:
    """A line per target: reached, not reached or not measured. They are for float32 on two CPU threads."""
    judged = [
        row
        for row in rows
        if (row.implementation, row.device, row.dtype, row.threads) == ("native", "cpu", "float32", THREADS)
    ]
    return [verdict(target, judged) for target in TARGETS]


def verdict(target: Target, rows: Iterable[Row]) -> str:
    """What the slowest row says of a target."""
    values = [value for row in rows if target.applies(row) and (value := target.value(row)) is not None]
    wanted = f"{target.text}: at least {target.wanted:,g}{target.unit}"
    if not values:
        return f"not measured: {wanted}"
    worst = min(values)
    word = "reached" if worst >= target.wanted else "not reached"
    return f"{word}: {wanted}; measured {worst:,.4g}{target.unit}"
