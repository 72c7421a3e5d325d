"""The picture of a comparison of teachers: accuracies with intervals, the four cases, and alpha."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.common.pictures import in_percent, new_figure, png, shortened, style, wrapped
from engine.evaluation.candidates import MEASURES
from engine.evaluation.statistics.intervals import CONFIDENCE
from engine.training.telemetry import CASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ACCURACIES = {
    "natural": ("on x", "#0072b2"),
    "transfer": ("on x~", "#e69f00"),
    "robust": ("on x^", "#d55e00"),
    "reliability": ("mean of x~ and x^", "#808080"),
}
_CASES = dict(zip(CASES, ("#009e73", "#e69f00", "#d55e00", "#cc79a7"), strict=True))
_ABOVE = 34
"""Room for a legend above a plot, in points."""
_BAND = 0.8
"""Height of a candidate's bars, in rows."""
_NAME = 16
_PANEL = 1.6
"""Inches of a panel beside its rows: title, legend and labels."""

Entries = Sequence[Mapping[str, Any]]


def picture(report: Mapping[str, Any]) -> bytes:
    """PNG of a report of `engine teachers`, a row for each candidate, the best first."""
    with style():
        return png(_figure(report))


def _figure(report: Mapping[str, Any]) -> Figure:
    """Figure of three panels, one below the other."""
    entries = report["candidates"]
    data, student = report["data"], report["student"]
    title = wrapped(
        f"Candidate teachers on {data['n']:,} {data['split']} images of {data['name']}, by {report['sort_by']}\n"
        f"{report['attack']['description']}\n"
        f"x~ is crafted on the student ({student['model']}: natural {student['natural']:.2%}, on x~ "
        f"{student['adversarial']:.2%}), x^ on each candidate; alpha = P_T(x~ | y)^{report['beta']:g}",
        most=70,
    )
    heights = [_PANEL + 0.75 * len(entries), _PANEL + 0.4 * len(entries), 0.9 + 0.8 * len(entries)]
    figure = new_figure(sum(heights) + 0.2 * (title.count("\n") + 1))
    panels = figure.add_gridspec(3, 1, height_ratios=heights)
    accuracies, cases = figure.add_subplot(panels[0]), figure.add_subplot(panels[1])
    _draw_accuracies(accuracies, entries)
    _draw_cases(cases, entries)
    names = [f"{entry['rank']}  {shortened(entry['label'], _NAME)}" for entry in entries]
    models = [f"{name}\n{shortened(entry['model'], _NAME)}" for name, entry in zip(names, entries, strict=True)]
    for axes, texts in ((accuracies, models), (cases, names)):
        axes.set(xlim=(0, 1), ylim=(len(entries) - 0.5, -0.5))  # the first at the top
        axes.grid(visible=False, axis="y")
        axes.set_yticks(range(len(entries)), texts)
        in_percent(axes.xaxis)
    below = panels[2].subgridspec(len(entries), 1)
    _draw_alpha([figure.add_subplot(below[row]) for row in range(len(entries))], entries)
    figure.suptitle(title, fontsize=9)
    return figure


def _draw_accuracies(axes: Axes, entries: Entries) -> None:
    height = _BAND / len(_ACCURACIES)
    for position, (name, (images, color)) in enumerate(_ACCURACIES.items()):
        found = [entry["measures"][name] for entry in entries]
        values = [estimate["value"] for estimate in found]
        errors = [
            [max(0.0, value - estimate["low"]) for value, estimate in zip(values, found, strict=True)],
            [max(0.0, estimate["high"] - value) for value, estimate in zip(values, found, strict=True)],
        ]
        rows = [row + (position + 0.5) * height - _BAND / 2 for row in range(len(entries))]
        label = f"{MEASURES[name].title}, {images}"
        axes.barh(rows, values, height, xerr=errors, color=color, label=label, error_kw={"capsize": 2})
    _finish(axes, f"Accuracies, with {CONFIDENCE:.0%} intervals")


def _draw_cases(axes: Axes, entries: Entries) -> None:
    left = [0.0] * len(entries)
    for case, color in _CASES.items():
        shares = [entry["measures"][case]["value"] for entry in entries]
        axes.barh(range(len(entries)), shares, _BAND, left=left, color=color, label=MEASURES[case].title)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    _finish(axes, "Is the teacher right on x and x~? (cf. Section 3.2)")


def _finish(axes: Axes, title: str) -> None:
    """Title, and between it and the axes the legend."""
    axes.set_title(title, pad=_ABOVE, fontsize=10)
    axes.set_xlabel("share of images")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, frameon=False)


def _draw_alpha(all_axes: Sequence[Axes], entries: Entries) -> None:
    highest = max(max(entry["alpha_histogram"]) for entry in entries)
    for axes, entry in zip(all_axes, entries, strict=True):
        shares = entry["alpha_histogram"]
        axes.stairs(shares, [index / len(shares) for index in range(len(shares) + 1)], fill=True)
        axes.axvline(entry["measures"]["alpha"]["value"], color="#1a1a1a", linestyle="--", linewidth=1)
        axes.set(xlim=(0, 1), ylim=(0, 1.05 * highest), ylabel=str(entry["rank"]))
        axes.tick_params(labelbottom=axes is all_axes[-1])
        in_percent(axes.yaxis)
    all_axes[0].set_title("alpha on x~, share of images (dashed: mean)", fontsize=10)
    all_axes[-1].set_xlabel("alpha")
