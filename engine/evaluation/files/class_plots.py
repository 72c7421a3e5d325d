"""Pictures of the classes: accuracy of each under each attack, and which are taken for which.

Shape suffixes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.common.pictures import WIDTH, fitted, in_percent, new_figure, shortened, wrapped
from engine.evaluation.results import ClassAccuracy
from engine.evaluation.statistics.intervals import CONFIDENCE, wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BARS = 20
"""Classes up to which all have bars; of more the worst and the best ones, as many together."""
_MOST_COUNTS, _MOST_ROWS = 12, 30
"""Classes up to which a matrix has its counts in words, and up to which there is a matrix."""
_MOST_CONFUSIONS = 20
_HATCHES = (None, "////", "....")
_NAME = 1.6
"""Inches of a name beside bars."""

Series = Mapping[str, Mapping[str, ClassAccuracy]]
"""Accuracies by attack's title and by class."""


def class_bars(title: str, series: Series) -> Figure:
    """Figure of a bar for each class and attack with its interval, inside `pictures.style`."""
    classes, told = _shown(series)
    height = 0.8 / len(series)
    figure = new_figure(1.5 + len(classes) * (0.12 + 0.11 * len(series)))
    axes = figure.subplots()
    colors = _cycle()
    for number, (attack, found) in enumerate(series.items()):
        present = [(row, found[name]) for row, name in enumerate(classes) if name in found]
        accuracies = [each.accuracy for _, each in present]
        bounds = [wilson(round(each.accuracy * each.n), each.n) for _, each in present]
        errors = [
            [max(0.0, value - low) for value, (low, _) in zip(accuracies, bounds, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(accuracies, bounds, strict=True)],
        ]
        axes.barh(
            [row + (number + 0.5) * height - 0.4 for row, _ in present],
            accuracies,
            height,
            xerr=errors,
            color=colors[number % len(colors)],
            hatch=_HATCHES[number // len(colors) % len(_HATCHES)],
            label=shortened(attack, 30),
            error_kw={"elinewidth": 0.8, "capsize": 0, "ecolor": "#1a1a1a"},
        )
    axes.set(xlim=(0, 1), ylim=(len(classes) - 0.5, -0.5), xlabel=f"accuracy, with {CONFIDENCE:.0%} intervals")
    axes.set_yticks(range(len(classes)), [fitted(name, _NAME, 9) for name in classes])
    axes.grid(visible=False, axis="y")
    in_percent(axes.xaxis)
    if told:
        axes.axhline(len(classes) / 2 - 0.5, color="#555555", linewidth=0.8, linestyle="--")
    figure.suptitle(wrapped("\n".join(filter(None, (title, told)))), fontsize=10)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _cycle() -> list[str]:
    """Colours of the style's lines."""
    from matplotlib import rcParams

    colors: list[str] = rcParams["axes.prop_cycle"].by_key()["color"]
    return colors


def _shown(series: Series) -> tuple[list[str], str]:
    """Classes that are shown, and a line that says which, empty where these are all, in the order of the data."""
    classes = list(dict.fromkeys(name for found in series.values() for name in found))
    if len(classes) <= _MOST_BARS:
        return classes, ""
    hardest = min(series, key=lambda attack: _mean(series[attack]))
    found, half = series[hardest], _MOST_BARS // 2
    order = sorted((name for name in classes if name in found), key=lambda name: found[name].accuracy)
    of = f"of {len(classes)} classes under {shortened(hardest, 30)}"
    return [*order[:half], *order[-half:]], f"the {half} worst and the {half} best {of}"


def _mean(found: Mapping[str, ClassAccuracy]) -> float:
    return sum(each.accuracy for each in found.values()) / max(len(found), 1)


def count_confusions(labels_N: Tensor, predicted_N: Tensor, num_classes: int) -> Tensor:
    """Counts of images by true class and predicted class, CC. What is not known, -1, counts nowhere."""
    known_N = predicted_N >= 0
    pairs = labels_N[known_N] * num_classes + predicted_N[known_N]
    return pairs.bincount(minlength=num_classes**2).reshape(num_classes, num_classes)


def confusion(title: str, counts_CC: Tensor, names: Sequence[str]) -> Figure:
    """Figure of the confusions, inside `pictures.style`: a matrix, of many classes the most frequent ones."""
    return (_matrix if len(names) <= _MOST_ROWS else _most_frequent)(title, counts_CC, names)


def _matrix(title: str, counts_CC: Tensor, names: Sequence[str]) -> Figure:
    size = 8 if len(names) <= _MOST_COUNTS else 6.5
    title, short = wrapped(title), [fitted(name, _NAME / 2, size) for name in names]
    figure = new_figure(0.75 + 0.17 * (title.count("\n") + 1) + (WIDTH - 1.6))
    axes = figure.subplots()
    sums_C = counts_CC.sum(1, keepdim=True)
    shares_CC = torch.where(sums_C > 0, counts_CC / sums_C.clamp(min=1), torch.nan)
    image = axes.imshow(shares_CC.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), short, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), short, fontsize=size)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.grid(visible=False)
    if len(names) <= _MOST_COUNTS:
        _write_counts(axes, counts_CC, shares_CC)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, label="share of the true class")
    in_percent(bar.ax.yaxis)
    bar.ax.grid(visible=False)
    figure.suptitle(title, fontsize=10)
    return figure


def _write_counts(axes: Axes, counts_CC: Tensor, shares_CC: Tensor) -> None:
    """Write the counts into the cells, as large as they fit."""
    digits = len(str(int(counts_CC.max())))
    size = min(8.0, 3.0 * 72 / len(counts_CC) / (0.65 * digits))
    for row, of_class in enumerate(counts_CC.tolist()):
        for column, count in enumerate(of_class):
            light = float(shares_CC[row, column]) > 0.5
            color = "white" if light else "#1a1a1a" if count else "#a0a0a0"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=size, color=color)


def _most_frequent(title: str, counts_CC: Tensor, names: Sequence[str]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    wrong_CC = counts_CC - counts_CC.diag().diag()
    kinds, wrong = int((wrong_CC > 0).sum()), int(wrong_CC.sum())
    top = wrong_CC.flatten().sort(descending=True, stable=True)
    found = [
        (divmod(place, len(names)), count)
        for place, count in zip(top.indices[:_MOST_CONFUSIONS].tolist(), top.values.tolist(), strict=False)
        if count
    ]
    told = f"the {len(found)} most frequent of {kinds:,} confusions" if kinds > len(found) else "all confusions"
    title = f"{title}\n{told} (true → predicted); {wrong:,} images misclassified"
    figure = new_figure(1.4 + 0.24 * max(len(found), 3))
    axes = figure.subplots()
    counts = [count for _, count in found]
    axes.bar_label(axes.barh(range(len(found)), counts, 0.7), padding=2, fontsize=8)
    pairs = [[fitted(names[label], _NAME / 2 + 0.2, 8) for label in pair] for pair, _ in found]
    axes.set_yticks(range(len(found)), [" → ".join(pair) for pair in pairs], fontsize=8)
    axes.set(xlabel="images", ylim=(max(len(found), 1) - 0.5, -0.5))
    axes.set_xlim(0, 1.1 * max([1, *counts]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False, axis="y")
    figure.suptitle(wrapped(title), fontsize=10)
    return figure
