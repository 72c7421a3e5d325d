"""Numbers of a run by the names under which every tool shows them: `epoch/robust_accuracy`, `step/loss`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TIMINGS = frozenset(("seconds", "images_per_second", "share_of_peak", "peak_memory"))
"""Keys of a row that another run of the same training, or its resumed part, need not have the same values of."""
_NOT_A_CURVE = ("event", "epoch", "step", "measured_n")


def curves(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row as EVENT/KEY, those of a dict in it as EVENT/KEY/NAME; texts and lists are left out."""
    numbers: dict[str, float] = {}
    for key, value in row.items():
        inner = value if isinstance(value, dict) else {None: value}
        for name, number in inner.items():
            if key in _NOT_A_CURVE or isinstance(number, bool) or not isinstance(number, int | float):
                continue
            numbers[f"{row['event']}/{key}" if name is None else f"{row['event']}/{key}/{name}"] = number
    return numbers


def histograms(row: Mapping[str, Any]) -> dict[str, list[float]]:
    """The shares in equal bins of [0, 1] of a row, as EVENT/KEY."""
    return {f"{row['event']}/{key}": list(value) for key, value in row.items() if isinstance(value, list)}


def edges(shares: list[float]) -> list[float]:
    """Edges of the bins of a histogram: one more than there are shares, from 0 to 1."""
    return [number / len(shares) for number in range(len(shares) + 1)]


def results(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a summary.json: best/KEY, last/KEY, and accuracies as test_of_best/ATTACK."""
    numbers: dict[str, float] = {}
    for which in ("best", "last"):
        row = summary[which]
        numbers |= curves({**row, "event": which}) | {f"{which}/epoch": row["epoch"]}
        tested = summary.get(f"test_of_{which}", {})
        numbers |= {f"test_of_{which}/{attack}": result["accuracy"] for attack, result in tested.items()}
    return numbers
