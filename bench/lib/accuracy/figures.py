"""Pictures of a protocol's table, inside `engine.common.pictures.style`: panels below each other, by attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.lib.accuracy.collected import RowCost
from bench.lib.accuracy.statistics import NOT_MEASURED, ComparedRow, ComparedTable
from engine.common.pictures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*X<>"
_LINE = 0.26  # inches of a row
_MIB = 2**20


def accuracies(tables: Sequence[ComparedTable]) -> Figure:
    """Rows by accuracy, a panel for each attack: each seed, their mean, and its interval."""
    figure, panels = _panels([len(table.rows) for table in tables])
    for table, axes in zip(tables, panels, strict=True):
        labels = [row.row if row.by_seed else f"{row.row} ({NOT_MEASURED})" for row in table.rows]
        for place, row in enumerate(table.rows):
            seeds = list(row.by_seed.values())
            axes.plot(seeds, [place + 0.18] * len(seeds), "o", color="C1", alpha=0.8, markersize=4, label="a seed")
            if row.mean is not None:
                _with_interval(
                    axes, row.mean, place - 0.12, row.interval, "mean, 95 % interval", color="C0", marker="D"
                )
        _finish(axes, labels, f"{table.attack}, n = {table.n:,}", "accuracy, percent")
        _in_percent(axes.xaxis)
    _legend(panels[-1])
    return figure


def differences(tables: Sequence[ComparedTable]) -> Figure:
    """Rows by their difference to the baseline, a panel for each attack, and the paper's as hollow marks."""
    others = [[row for row in table.rows if row.row != table.baseline] for table in tables]
    figure, panels = _panels([1.3 * len(rows) for rows in others])
    for table, rows, axes in zip(tables, others, panels, strict=True):
        axes.axvline(0, color=axes.xaxis.label.get_color(), linewidth=1)
        for place, row in enumerate(rows):
            _difference(axes, row, place)
        labels = [row.row if row.against else f"{row.row} ({NOT_MEASURED})" for row in rows]
        _finish(
            axes, labels, f"{table.attack}, n = {table.n:,}", f"accuracy minus that of {table.baseline}, points"
        )
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:+.3g}" if share else "0")
    _legend(panels[-1])
    return figure


def _difference(axes: Axes, row: ComparedRow, place: int) -> None:
    found = row.against
    if found is None:
        return
    _with_interval(
        axes, found.difference, place - 0.14, found.interval, "95 % interval: other seeds", color="C0", marker="D"
    )
    _with_interval(
        axes, found.difference, place + 0.14, found.images_interval, "95 % interval: other test images",
        color="C4", marker="", elinewidth=1.2,
    )  # fmt: skip
    if found.paper is not None:
        axes.plot(
            [found.paper],
            [place],
            "s",
            markerfacecolor="none",
            markeredgecolor="C1",
            markersize=7,
            label="the paper",
        )


def trade_off(natural: ComparedTable, robust: ComparedTable) -> Figure:
    """Natural against robust accuracy: a mark for each row's means, a small one for each seed."""
    figure = new_figure(4.6)
    axes = figure.subplots()
    for number, (of_natural, of_robust) in enumerate(zip(natural.rows, robust.rows, strict=True)):
        if of_natural.mean is None or of_robust.mean is None:
            continue
        look: dict[str, Any] = {"color": f"C{number}", "marker": _MARKERS[number % len(_MARKERS)], "linestyle": ""}
        seeds = [seed for seed in of_natural.by_seed if seed in of_robust.by_seed]
        axes.plot(
            [of_natural.by_seed[seed] for seed in seeds], [of_robust.by_seed[seed] for seed in seeds],
            alpha=0.4, markersize=4, **look,
        )  # fmt: skip
        axes.plot([of_natural.mean], [of_robust.mean], markersize=9, label=of_natural.row, **look)
    for axis in (axes.xaxis, axes.yaxis):
        _in_percent(axis)
    axes.set(xlabel=f"accuracy on natural images, percent, n = {natural.n:,}")
    axes.set(ylabel=f"accuracy under {robust.attack}, percent, n = {robust.n:,}")
    axes.margins(0.08)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.14), ncols=3, frameon=False)
    return figure


def costs(found: Sequence[RowCost], baseline: str) -> Figure:
    """Seconds an epoch and peak memory of each row by those of the baseline."""
    figure, panels = _panels([len(found)] * 2)
    of_time: Mapping[str, tuple[float | None, str]] = {
        cost.row: (cost.relative, f"{cost.epoch_seconds:.0f} s" if cost.epoch_seconds is not None else "")
        for cost in found
    }
    of_memory: Mapping[str, tuple[float | None, str]] = {
        cost.row: (cost.relative_memory, f"{cost.peak_memory / _MIB:,.0f} MiB" if cost.peak_memory else "")
        for cost in found
    }
    for axes, values, title in (
        (panels[0], of_time, "seconds an epoch"),
        (panels[1], of_memory, "peak memory"),
    ):
        bars = axes.barh(range(len(values)), [ratio or 0 for ratio, _ in values.values()], color="C0", height=0.6)
        texts = [f"{ratio:.2f} ({told})" if ratio is not None else NOT_MEASURED for ratio, told in values.values()]
        axes.axvline(1, color=axes.xaxis.label.get_color(), linewidth=1)
        behind = {"facecolor": axes.get_facecolor(), "edgecolor": "none", "pad": 0.5}
        axes.bar_label(bars, texts, padding=4, fontsize=8, bbox=behind)
        _finish(axes, list(values), title, f"times that of {baseline}")
        axes.set_xlim(0, 1.4 * max(1, *(ratio or 0 for ratio, _ in values.values())))
    return figure


def _panels(lines: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A panel for each number of lines, as high as these are."""
    heights = [0.95 + _LINE * number for number in lines]
    figure = new_figure(sum(heights) + 0.4)
    return figure, list(figure.subplots(len(lines), 1, squeeze=False, height_ratios=heights)[:, 0])


def _with_interval(
    axes: Axes, value: float, place: float, interval: tuple[float, float] | None, label: str, **look: Any
) -> None:
    around = None if interval is None else [[value - interval[0]], [interval[1] - value]]
    looks: dict[str, Any] = {"linestyle": "", "markersize": 5, "elinewidth": 1.8} | look
    axes.errorbar([value], [place], xerr=around, label=label, capsize=2.5, **looks)


def _finish(axes: Axes, labels: Sequence[str], title: str, xlabel: str) -> None:
    """Names of the rows, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_title(title, loc="left")
    axes.set_xlabel(xlabel)
    axes.grid(visible=False, axis="y")


def _in_percent(axis: Axis) -> None:
    """Label shares as numbers in percent, with as many decimals as the ticks need."""
    axis.set_major_formatter(lambda share, _: f"{100 * share:.4g}")


def _legend(axes: Axes) -> None:
    """Each label once, below the last panel."""
    handles, labels = axes.figure.axes[0].get_legend_handles_labels()
    for other in axes.figure.axes[1:]:
        more = other.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    first: dict[str, Any] = {}
    for handle, label in zip(handles, labels, strict=True):
        first.setdefault(label, handle)
    if first:
        axes.figure.legend(first.values(), first.keys(), loc="outside lower center", ncols=2, frameon=False)
