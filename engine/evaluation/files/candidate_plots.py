"""The picture of a comparison of teachers: accuracies with intervals, the four cases, and alpha."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.evaluation.candidates import MEASURES
from engine.training.telemetry import CASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ACCURACIES = {
    "natural": ("on x", "tab:blue"),
    "transfer": ("on x~", "tab:orange"),
    "robust": ("on x^", "tab:red"),
    "reliability": ("mean of x~ and x^", "tab:gray"),
}
_CASES = dict(zip(CASES, ("tab:green", "gold", "tab:red", "tab:purple"), strict=True))
_ABOVE = 36
"""Room for a legend above a plot, in points."""
_BAND = 0.8
"""Height of a candidate's bars, in rows."""

Entries = Sequence[Mapping[str, Any]]


def picture(report: Mapping[str, Any]) -> bytes:
    """PNG of a report of `engine teachers`, a row for each candidate, the best first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = report["candidates"]
    figure = Figure(figsize=(15, 2.4 + 1.25 * len(entries)), layout="constrained")
    grid = figure.add_gridspec(len(entries), 3)
    accuracies, cases = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[:, 1])
    _draw_accuracies(accuracies, entries)
    _draw_cases(cases, entries)
    for axes in (accuracies, cases):
        axes.set(xlim=(0, 1), ylim=(len(entries) - 0.5, -0.5), xlabel="share of images")  # the first at the top
        axes.grid(axis="x", alpha=0.3)
    names = [f"{entry['rank']}  {entry['label']}\n{entry['model']}" for entry in entries]
    accuracies.set_yticks(range(len(entries)), names, parse_math=False)
    cases.set_yticks(range(len(entries)), [str(entry["rank"]) for entry in entries])
    histograms = [figure.add_subplot(grid[row, 2]) for row in range(len(entries))]
    _draw_alpha(histograms, entries)
    data, student = report["data"], report["student"]
    figure.suptitle(
        f"Candidate teachers on {data['n']:,} {data['split']} images of {data['name']}, by {report['sort_by']}\n"
        f"{report['attack']['description']}\n"
        f"x~ is crafted on the student ({student['model']}: natural {student['natural']:.2%}, on x~ "
        f"{student['adversarial']:.2%}), x^ on each candidate; alpha = P_T(x~ | y)^{report['beta']:g}",
        fontsize=10,
    )
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


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
    _finish(axes, "Accuracies, with 95 % intervals")


def _draw_cases(axes: Axes, entries: Entries) -> None:
    left = [0.0] * len(entries)
    for case, color in _CASES.items():
        shares = [entry["measures"][case]["value"] for entry in entries]
        axes.barh(range(len(entries)), shares, _BAND, left=left, color=color, label=MEASURES[case].title)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    _finish(axes, "Is the teacher right on x and x~? (cf. Section 3.2)")


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, pad=_ABOVE)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, frameon=False)


def _draw_alpha(all_axes: Sequence[Axes], entries: Entries) -> None:
    highest = max(max(entry["alpha_histogram"]) for entry in entries)
    for axes, entry in zip(all_axes, entries, strict=True):
        shares = entry["alpha_histogram"]
        axes.stairs(shares, [index / len(shares) for index in range(len(shares) + 1)], fill=True, color="tab:blue")
        axes.axvline(entry["measures"]["alpha"]["value"], color="black", linestyle="--", linewidth=1)
        axes.set(xlim=(0, 1), ylim=(0, 1.05 * highest), ylabel=f"{entry['rank']}: share")
        axes.grid(alpha=0.3)
    all_axes[0].set_title("alpha on x~ (dashed: mean)", pad=_ABOVE)
    all_axes[-1].set_xlabel("alpha")
