"""Curves of several runs in one picture: accuracies and loss by epoch, seeds as their mean and a band."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.common.pictures import DARK, LIGHT, Palette, new_figure, png, style
from engine.runs.reporting import axes as of_epochs
from engine.runs.reporting.lines import ComparedLine
from engine.runs.reporting.page import Drawn, PageSection, drawn, note
from engine.runs.reporting.plots import EpochHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LINES = 12
"""Lines that one picture tells apart: by six colours, and then by dashes."""
_DASHES = ("-", (0, (5, 2)))
_COLOURS = 6
_LETTERS = 58  # of a line of the legend
_PANELS = {"robust_accuracy": "Robust accuracy", "natural_accuracy": "Natural accuracy", "loss": "Training loss"}

Points = list[tuple[int, float, float]]


def curves(lines: Sequence[ComparedLine]) -> PageSection | None:
    """The picture of all lines; None where fewer than two have epochs."""
    begun = [replace(line, runs=tuple(run for run in line.runs if run.epochs)) for line in lines]
    with_epochs = [line for line in begun if line.runs]
    if len(with_epochs) < 2:
        return None
    shown, left = with_epochs[:MOST_LINES], with_epochs[MOST_LINES:]
    section = PageSection("Curves")
    names = "; ".join(each.label for each in shown)
    alt = f"Robust accuracy, natural accuracy and training loss by epoch of {names}."
    pictures = Drawn(_picture(shown, LIGHT), _picture(shown, DARK), alt)
    section.add(f'<div class="curves">{drawn(pictures)}</div>')
    told = ["Accuracies on the images held out for choosing the best epoch."]
    if any(line.is_group for line in shown):
        told.append("Of several seeds: the mean, and a band of one sample standard deviation on either side.")
    if left:
        told.append(f"Not drawn, for there is room for {MOST_LINES}: {', '.join(line.label for line in left)}.")
    section.add(note(" ".join(told)))
    return section


def points_of(line: ComparedLine, key: str) -> Points:
    """(epoch, mean, sample standard deviation) over the runs of a line, of the epochs that all of them have."""
    of_runs = [{row["epoch"]: row[key] for row in run.epochs if row.get(key) is not None} for run in line.runs]
    shared = sorted(set.intersection(*map(set, of_runs))) if of_runs else []
    found: Points = []
    for epoch in shared:
        values = [values[epoch] for values in of_runs]
        found.append((epoch, statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0))
    return found


def _picture(lines: Sequence[ComparedLine], palette: Palette) -> bytes:
    with style(palette):
        figure = new_figure(2.7 * len(_PANELS) + 0.3 * len(lines) + 0.3)
        grid = figure.subplots(len(_PANELS), 1)
        for axes, (key, title) in zip(grid, _PANELS.items(), strict=True):
            _panel(axes, lines, key)
            axes.set_title(title if key != "robust_accuracy" else f"{title}\n{_measured(lines)}")
        handles = dict(zip(*reversed(grid[0].get_legend_handles_labels()), strict=True))
        for axes in grid[1:]:
            handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)) | handles
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=1, frameon=False)
        return png(figure)


def _panel(axes: Axes, lines: Sequence[ComparedLine], key: str) -> None:
    epochs: set[int] = set()
    for index, line in enumerate(lines):
        points = points_of(line, key)
        if not points:
            continue
        numbers, means, deviations = zip(*points, strict=True)
        epochs |= set(numbers)
        look: Mapping[str, Any] = {"color": f"C{index % _COLOURS}", "linestyle": _DASHES[index // _COLOURS]}
        width = max(1.2, 3 - 0.35 * index)  # of equal curves each is seen
        rows = [{"epoch": number, key: mean} for number, mean in zip(numbers, means, strict=True)]
        of_epochs.line(axes, rows, key, _label(line, lines), linewidth=width, **look)
        if line.is_group:
            below = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
            above = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
            axes.fill_between(numbers, below, above, color=look["color"], alpha=0.2, linewidth=0)
    if key == "loss":
        axes.set_ylabel("loss")
    else:
        of_epochs.percent(axes, "accuracy")
    if epochs:
        of_epochs.epochs(axes, epochs)


def _histories(lines: Sequence[ComparedLine]) -> list[EpochHistory]:
    return [EpochHistory(line.runs[0].epochs, line.runs[0].config) for line in lines]


def _measured(lines: Sequence[ComparedLine]) -> str:
    """Attack and images of the robust accuracy, where they are those of all lines."""
    told = {f"{history.attack}, {history.ball}\n{history.images}" for history in _histories(lines)}
    return told.pop() if len(told) == 1 else "attacks and images differ: see the legend"


def _label(line: ComparedLine, lines: Sequence[ComparedLine]) -> str:
    seeds = f", {len(line.runs)} seeds" if line.is_group else ""
    differ = len({(each.attack, each.ball, each.images) for each in _histories(lines)}) > 1
    (own,) = _histories([line])
    told = f"{line.label}{seeds}{f' ({own.attack}, {own.ball}, {own.images})' if differ else ''}"
    return "\n".join(textwrap.wrap(told, _LETTERS))
