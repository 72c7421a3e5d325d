"""Runs beside the paper: the row of a recipe, and the columns of Table 14."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from functools import cache
from typing import Any

from engine.config import KEYS, RunConfig, differences, load, recipes
from engine.runs.reporting.lines import ComparedLine
from engine.runs.reporting.page import PageSection, note
from engine.runs.reporting.reading import AccuracyMeasure, RunFiles, title_of
from engine.runs.reporting.tables import Cell, Number, Percent, ReportTable

_NAMED = re.compile(r"(?:--config=)?recipe:(.+)")
# Seconds an epoch and MiB of the paper's Table 14, of ResNet-18 on CIFAR-10.
_TABLE_14 = {"ard": (156.12, 3253), "iad1": (182.01, 3977), "akd2": (147.10, 2397), "iad2": (167.23, 3249)}
_MIB = 2**20


@cache
def _rows() -> tuple[tuple[recipes.PaperRow, RunConfig], ...]:
    return tuple((row, load(row.config)) for row in recipes.paper_rows())


def beside_paper(lines: Sequence[ComparedLine]) -> PageSection | None:
    """Accuracies of runs of the paper's rows beside the paper's; None where no run is of one."""
    found = [(line, of_line) for line in lines if line.first and (of_line := recipe_of(line.first))]
    if not found:
        return None
    section = PageSection("Beside the paper")
    head = ("run", "attack", "here", "n", "paper", "difference, points", "ratio")
    rows = [row for line, (recipe, _) in found for row in _accuracies(line, recipe)]
    section.add_table(ReportTable("beside-the-paper", head, rows))
    for line, (recipe, changed) in found:
        told = f"{line.label}: {recipe.name} (Table {recipe.table}: {recipe.row})."
        if changed:
            changes = "; ".join(
                f"{key} {_short(ours)}, there {_short(row)}" for key, (row, ours) in changed.items()
            )
            told += f" Not that row's training, so the numbers are no reproduction. Different: {changes}."
        section.add(note(told))
    section.add(note("The paper's numbers are of all test images and of one training each, as printed."))
    return section


def recipe_of(run: RunFiles) -> tuple[recipes.PaperRow, dict[str, tuple[Any, Any]]] | None:
    """The paper's row that a run was begun from, with both values of keys that differ; else one that is equal.

    Recipes that aim beyond the rows have no accuracies of the paper, and are none of these.
    """
    command = run.sessions[0].get("command") if run.sessions else None
    words = command if isinstance(command, list) else []
    named = {match[1] for word in words if (match := _NAMED.fullmatch(str(word)))}
    of_run = run.config
    equal = None
    for recipe, config in _rows():
        if recipe.name in named:
            return recipe, _different(config, of_run)
        alike = all(
            getattr(config, key) == getattr(of_run, key) for key in ("method", "dataset", "model", "epochs")
        )
        if equal is None and alike and not _different(config, of_run):
            equal = recipe
    return None if equal is None else (equal, {})


def _different(row: RunConfig, run: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Keys that decide the network, its teachers or its choice, and differ; the seed aside."""
    return {key: values for key, values in differences(row, run).items() if _matters(key)}


def _matters(key: str) -> bool:
    if key in ("seed", "teacher.seed", "teacher_st.seed"):
        return False
    return KEYS[key].decides or key == "eval.attack" or key.startswith(("teacher", "extra_"))


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _accuracies(line: ComparedLine, recipe: recipes.PaperRow) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for attack, percent in recipe.paper.items():
        measure = _measured_on_most(line, attack)
        paper = Number(percent, f"{percent:.2f}%")
        if measure is None:
            rows.append([line.label, title_of(attack, {}), "not measured", None, paper, None, None])
            continue
        ours, cell = line.mean(measure) or 0.0, line.cell(measure)
        difference = 100 * ours - percent
        shown = Percent(ours) if cell is None else cell
        rows.append(
            [
                line.label,
                ", ".join(filter(None, (measure.title, measure.ball))),
                shown,
                measure.n,
                paper,
                Number(difference, f"{difference:+.2f}"),
                Number(100 * ours / percent, f"{100 * ours / percent:.3f}") if percent else None,
            ]
        )
    return rows


def _measured_on_most(line: ComparedLine, attack: str) -> AccuracyMeasure | None:
    """The measure of that attack, at the training's epsilon, on the most test images that every seed has."""
    assert line.first is not None
    found = [
        each.measure
        for of_run in line.tested
        for each in of_run
        if each.measure.attack == attack and each.ball in (None, line.first.ball)
        and line.mean(each.measure) is not None
        and (each.ball is not None or not each.measure.is_attack)
    ]  # fmt: skip
    return max(found, key=lambda measure: measure.n or 0, default=None)


# ---------------------------------------------------------------- Table 14


def costs(lines: Sequence[ComparedLine]) -> PageSection | None:
    """Seconds an epoch and peak memory, the columns of Table 14; None where no run has either."""
    found = [(line.runs[0].config, row) for line in lines if line.runs and (row := _cost(line))]
    if not found:
        return None
    section = PageSection("Time and memory (the columns of Table 14)")
    head = ["run", "device", "time per epoch, s", "peak memory, MiB", "memory of"]
    papers = [_TABLE_14.get(config.method) if _is_as_in_table_14(config) else None for config, _ in found]
    told = (
        "Time: the steps of an epoch on average, evaluations left out. Memory: the highest of all epochs; on a "
        "GPU what tensors took, on a CPU the resident memory of the process."
    )
    rows = [row for _, row in found]
    if any(papers):
        head += ["paper: time, s", "paper: MiB"]
        rows = [[*row, *(paper or (None, None))] for row, paper in zip(rows, papers, strict=True)]
        told += " The paper's numbers are of a GPU that it does not name, and of another program."
    section.add_table(ReportTable("time-and-memory", head, rows))
    section.add(note(told))
    return section


def _is_as_in_table_14(config: RunConfig) -> bool:
    return config.dataset == "cifar10" and config.model == "resnet18"


def _cost(line: ComparedLine) -> list[Cell] | None:
    rows = [row for run in line.runs for row in run.epochs]
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    peaks = [row["peak_memory"] for row in rows if "peak_memory" in row]
    if not seconds and not peaks:
        return None
    device = _device(line.runs[0])
    mean = statistics.mean(seconds) if seconds else None
    return [
        line.label,
        device or None,
        None if mean is None else Number(mean, f"{mean:.2f}"),
        Number(max(peaks) / _MIB, f"{max(peaks) / _MIB:,.0f}") if peaks else "not recorded",
        ("process" if device == "cpu" else "tensors on the GPU") if peaks and device else None,
    ]


def _device(run: RunFiles) -> str:
    hardware = run.sessions[-1].get("hardware") if run.sessions else None
    return str(hardware.get("device", "")) if isinstance(hardware, dict) else ""
