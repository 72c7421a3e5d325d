"""Axes of pictures by epoch: whole epochs, percent, labelled marks, and a legend below."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EpochRows = Sequence[Mapping[str, Any]]
_MOST_MARKERS = 40
"""Points of a line up to which each has a marker."""
_NEAR = 0.6
"""Share of the axes within which two labels above them would overlap."""
_ROW = 11
"""Points from one row of labels to the next."""


def line(axes: Axes, rows: EpochRows, key: str, label: str, **style: Any) -> None:
    """A key of the rows by epoch; a single point is seen, too."""
    points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    if points:
        marker = "o" if len(points) <= _MOST_MARKERS else ""
        look: dict[str, Any] = {"marker": marker, "markersize": 3.5, "linewidth": 1.6} | style
        axes.plot(*zip(*points, strict=True), label=label, **look)


def epochs(axes: Axes, numbers: Iterable[int]) -> None:
    """Ticks at whole epochs, from the first to the last of them."""
    from matplotlib.ticker import MaxNLocator

    numbers = list(numbers)
    first, last = min(numbers), max(numbers)
    margin = max(0.5, 0.02 * (last - first))
    axes.set_xlim(max(0.5, first - margin), last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")


def percent(axes: Axes, ylabel: str) -> None:
    """Shares from 0 to 100 %; a curve along an edge is seen."""
    from matplotlib.ticker import MultipleLocator, PercentFormatter

    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_locator(MultipleLocator(0.2))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel(ylabel)


def marks(axes: Axes, at: Mapping[str, float]) -> int:
    """Vertical lines with their labels above the axes, in rows where they are near; points that these take."""
    low, high = axes.get_xlim()
    ordered, row, most = sorted(at.items(), key=lambda item: item[1]), 0, 0
    for index, (label, x) in enumerate(ordered):
        is_near = index > 0 and x - ordered[index - 1][1] < _NEAR * (high - low)
        row = row + 1 if is_near else 0
        most = max(most, row + 1)
        place, is_last = (x - low) / (high - low), index + 1 == len(ordered)
        side = "right" if place > (0.75 if is_last else 0.3) else "left"
        axes.axvline(x, color=axes.xaxis.label.get_color(), linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            label, (x, 1), xycoords=("data", "axes fraction"), xytext=(0, 3 + _ROW * row),
            textcoords="offset points", ha=side, va="bottom", fontsize=8.5,
        )  # fmt: skip
    return _ROW * most


def legend_below(axes: Axes, columns: int = 2) -> None:
    """A legend that covers no curve."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=columns, frameon=False)
