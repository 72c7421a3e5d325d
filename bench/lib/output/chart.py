"""Pictures of the rows: speed-ups over the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.lib.calls.op_cases import EAGER
from bench.lib.output.csv_rows import EvaluationRow, MeasuredRow, OpRow, PeerRow, PipelineRow, StepRow
from engine.common.numbers import ceil_div

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"compile": "tab:orange", "native": "tab:blue", "triton": "tab:green"}
PIPELINE_COLOURS = {"tensor": "tab:blue", "ffcv": "tab:green", "dali": "tab:purple", "image": "tab:orange"}
STEP_COLOURS = {"textbook": "tab:gray", "expert": "tab:orange"}
PEER_COLOURS = STEP_COLOURS | {"published": "black", "plain": "tab:gray"}
ACROSS = 3
"""Panels of ops in a line."""
TITLES = {"call": "{}", "graph": "{}, replayed from a CUDA graph"}


def draw(path: Path, rows: Sequence[OpRow]) -> None:
    """Draw a panel for each op and mode, three to a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row.mode, row.op) for row in rows))
    lines = ceil_div(len(panels), ACROSS)
    figure = Figure(figsize=(4.6 * ACROSS, 4.8 * lines), layout="constrained")
    grid = figure.subplots(lines, ACROSS, squeeze=False).flatten()
    for (mode, op), axes in zip(panels, grid, strict=False):
        _panel(axes, [row for row in rows if (row.mode, row.op) == (mode, op)])
        axes.set(title=TITLES[mode].format(op), xlabel="times faster than eager")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    first = rows[0]
    figure.suptitle(f"{_hardware(first)}, torch {first.torch}, {first.date[:10]}", fontsize=9)
    FigureCanvasAgg(figure).print_png(path)


def draw_evaluations(path: Path, rows: Sequence[EvaluationRow]) -> None:
    """Draw for each network a panel of speed-ups over the published attacks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row.network for row in rows))
    height = 1.5 + 0.3 * len(rows) / len(networks)
    figure = Figure(figsize=(5.4 * len(networks), height), layout="constrained")
    for name, axes in zip(networks, figure.subplots(1, len(networks), squeeze=False)[0], strict=True):
        own = [row for row in rows if row.network == name][::-1]
        labels = [f"{row.attack}, {row.images} images: {row.variant}" for row in own]
        bars = axes.barh(labels, [row.speedup for row in own], color="tab:blue")
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axes.axvline(1, color="tab:gray", linewidth=1)
        axes.set(title=name, xlabel="times faster than published")
        axes.margins(x=0.25)
    first = rows[0]
    figure.suptitle(f"{_hardware(first)}, torch {first.torch}, {first.date[:10]}", fontsize=9)
    FigureCanvasAgg(figure).print_png(path)


def draw_pipelines(path: Path, rows: Sequence[PipelineRow]) -> None:
    """Draw for each data set a panel of speed-ups over the baseline, and one of processors' time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.data for row in rows))
    figure = Figure(figsize=(9, 2.6 * len(names)), layout="constrained")
    for name, (speeds, costs) in zip(names, figure.subplots(len(names), 2, squeeze=False), strict=True):
        shown = [row for row in rows if row.data == name]
        labels = [f"{row.pipeline}\n{row.images_per_s:,.0f} images/s" for row in shown]
        for axes, values, heading, form in (
            (speeds, [row.speedup for row in shown], "times the images/s of a DataLoader", "%.1f"),
            (costs, [row.cpu_s_per_10k_images for row in shown], "CPU seconds for 10,000 images", "%.2f"),
        ):
            colours = [PIPELINE_COLOURS.get(row.pipeline, "tab:gray") for row in shown]
            _bars(axes, labels, values, colours, form)
            axes.set_title(f"{name}: {heading}", fontsize=9)
    first = rows[0]
    versions = f"torch {first.torch}, ffcv {first.ffcv or 'absent'}, DALI {first.dali or 'absent'}"
    figure.suptitle(f"{_hardware(first)}, {versions}, {first.date[:10]}", fontsize=9)
    FigureCanvasAgg(figure).print_png(path)


def draw_steps(path: Path, rows: Sequence[StepRow]) -> None:
    """Draw for each method its speed-ups over the textbook, and beside them peak memory where it was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.method for row in rows))
    across = 1 + any(row.peak_mib is not None for row in rows)
    figure = Figure(figsize=(3 + 3 * across, 2.8 * len(names)), layout="constrained")
    for name, (speeds, *peaks) in zip(names, figure.subplots(len(names), across, squeeze=False), strict=True):
        mine = [row for row in rows if row.method == name]
        _step_panel(speeds, mine, [row.speedup for row in mine], "times the speed of the textbook's step", "%.2f")
        measured = {row: row.peak_mib for row in mine if row.peak_mib is not None}
        for axes in peaks:
            _step_panel(axes, list(measured), list(measured.values()), "peak memory, MiB", "%.0f")
    first = rows[0]
    figure.suptitle(f"{_hardware(first)}, torch {first.torch}, {first.date[:10]}", fontsize=9)
    FigureCanvasAgg(figure).print_png(path)


def _step_panel(axes: Axes, rows: Sequence[StepRow], values: Sequence[float], heading: str, form: str) -> None:
    labels = [f"{row.variant}\n{row.images_per_s:,.1f} images/s" for row in rows]
    _bars(
        axes, labels, values, [STEP_COLOURS.get(row.variant.partition("-")[0], "tab:blue") for row in rows], form
    )
    axes.set_title(f"{rows[0].method}, {rows[0].model}, batch {rows[0].batch_size}: {heading}", fontsize=8)


def draw_peers(path: Path, rows: Sequence[PeerRow]) -> None:
    """Draw for each method the seconds of an epoch of each candidate, and beside them peak memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.method for row in rows))
    figure = Figure(figsize=(10, 2.8 * len(names)), layout="constrained")
    for name, (times, peaks) in zip(names, figure.subplots(len(names), 2, squeeze=False), strict=True):
        mine = [row for row in rows if row.method == name]
        labels = [row.candidate for row in mine]
        colours = [PEER_COLOURS.get(row.candidate.partition("-")[0], "tab:blue") for row in mine]
        _bars(times, labels, [row.epoch_s for row in mine], colours, "%.0f")
        _bars(peaks, labels, [row.peak_mib for row in mine], colours, "%.0f")
        for axes, heading in ((times, "seconds an epoch"), (peaks, "peak memory, MiB")):
            axes.set_title(f"{name}, {mine[0].model}, batch {mine[0].batch_size}: {heading}", fontsize=8)
    first = rows[0]
    figure.suptitle(f"{_hardware(first)}, torch {first.torch}, {first.date[:10]}", fontsize=9)
    FigureCanvasAgg(figure).print_png(path)


def _hardware(row: MeasuredRow) -> str:
    return f"{row.processor}, {row.threads} threads" if row.device == "cpu" else row.device


def _bars(axes: Axes, labels: Sequence[str], values: Sequence[float], colours: Sequence[str], form: str) -> None:
    """Horizontal bars with their numbers, the first one on top."""
    bars = axes.barh(labels, values, color=colours)
    axes.bar_label(bars, fmt=form, padding=3, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)


def _panel(axes: Axes, rows: Sequence[OpRow]) -> None:
    """The bars of a case are its implementations."""
    cases = list(dict.fromkeys(_label(row) for row in rows))
    names = [name for name in COLOURS if any(row.implementation == name for row in rows)]
    height = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        bars = [row for row in rows if row.implementation == name]
        at = [cases.index(_label(row)) + (index - (len(names) - 1) / 2) * height for row in bars]
        speedups = [row.speedup_over_eager or 0 for row in bars]
        drawn = axes.barh(at, speedups, height, label=name, color=COLOURS[name])
        axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8, label=EAGER)
    axes.set_yticks(range(len(cases)), cases, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(names) + 1, frameon=False)


def _label(row: OpRow) -> str:
    return f"{row.shape}\n{row.variant}"
