"""Lines of a comparison: runs, runs that differ in their seed alone as one line, and evaluated checkpoints."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.config import differences
from engine.evaluation.reports import SUFFIX
from engine.runs.reporting.reading import (
    TEACHER_FOLDERS,
    AccuracyMeasure,
    EvalFile,
    MeasuredAccuracy,
    RunFiles,
    lowest,
    of_entries,
)
from engine.runs.reporting.tables import Cell, Percent

_SEED = re.compile(r"seed-(\d+)")


@dataclass(frozen=True)
class ComparedLine:
    """One run, several that differ in their seed alone, or the report of an evaluated checkpoint."""

    label: str
    path: Path
    runs: tuple[RunFiles, ...] = ()
    report: EvalFile | None = None

    @property
    def first(self) -> RunFiles | None:
        """The run, or the first of them."""
        return self.runs[0] if self.runs else None

    @property
    def role(self) -> str:
        """A teacher's role to its student; empty of anything else."""
        return self.runs[0].role if self.runs else ""

    @property
    def is_group(self) -> bool:
        """True if there are several seeds."""
        return len(self.runs) > 1

    @cached_property
    def tested(self) -> list[list[MeasuredAccuracy]]:
        """Accuracies on test images, of each run."""
        return [run.tested for run in self.runs] if self.report is None else [lowest(of_entries(self.report))]

    @cached_property
    def every(self) -> list[list[MeasuredAccuracy]]:
        """Those and the other accuracies on the images by which the best epoch was chosen, of each run."""
        found = []
        for tested, held_out in zip(self.tested, [run.held_out for run in self.runs] or [[]], strict=True):
            known = {each.measure for each in tested}
            found.append([*tested, *(each for each in held_out if each.measure not in known)])
        return found

    def values(self, measure: AccuracyMeasure) -> list[MeasuredAccuracy]:
        """Accuracies of the runs that have this measure."""
        return [each for found in self.every for each in found if each.measure == measure]

    def mean(self, measure: AccuracyMeasure) -> float | None:
        """Mean accuracy; None unless every run has it."""
        found = self.values(measure)
        return (
            statistics.mean(each.accuracy for each in found) if found and len(found) == len(self.every) else None
        )

    def hull(self, measure: AccuracyMeasure) -> tuple[float, float]:
        """The intervals of all runs together, from the lowest end to the highest."""
        intervals = [each.percent for each in self.values(measure)]
        return min(each.low or 0.0 for each in intervals), max(each.high or 0.0 for each in intervals)

    def cell(self, measure: AccuracyMeasure) -> Cell:
        """The accuracy with its interval; of several seeds the mean and the sample standard deviation."""
        found = self.values(measure)
        if not found:
            return None
        if not self.is_group:
            return found[0].percent
        if len(found) < len(self.runs):
            return f"in {len(found)} of {len(self.runs)} seeds"
        values = [each.accuracy for each in found]
        return Percent(statistics.mean(values), deviation=statistics.stdev(values), seeds=len(values))


def runs_of(path: Path) -> list[Path]:
    """The run directories of a path: itself, or those of its seeds in their order."""
    return [path] if (path / "config.yaml").is_file() else _seeds(path)


def is_report(path: Path) -> bool:
    """True for the report of an evaluated checkpoint."""
    return path.name.endswith(SUFFIX) and not path.is_dir()


def teachers_of(run: RunFiles) -> list[RunFiles]:
    """The teachers that were trained for a run, in its directory."""
    return [
        RunFiles(run.path / folder, role)
        for folder, role in TEACHER_FOLDERS.items()
        if (run.path / folder / "config.yaml").is_file()
    ]


def lines_of(runs: Sequence[RunFiles], reports: Sequence[EvalFile]) -> list[ComparedLine]:
    """Lines in the order of their first runs, each teacher after its student, with labels of their own."""
    found: list[list[RunFiles]] = []
    for run in runs:
        for group in found:
            if _differ_in_seed_alone(group, run):
                group.append(run)
                break
        else:
            found.append([run])
    texts = _labels([group[0] for group in found])
    made = [ComparedLine(text, _place(group), tuple(group)) for text, group in zip(texts, found, strict=True)]
    return made + [
        ComparedLine(str(report.path).removesuffix(SUFFIX), report.path, report=report) for report in reports
    ]


def _seeds(path: Path) -> list[Path]:
    found = [(int(match[1]), each) for each in _folders(path) if (match := _SEED.fullmatch(each.name))]
    return [each for _, each in sorted(found) if (each / "config.yaml").is_file()]


def _place(group: Sequence[RunFiles]) -> Path:
    """Folder of the runs of a line."""
    first = group[0].path
    above = first.parent.parent if group[0].role else first.parent
    return above if len(group) > 1 and all(above in run.path.parents for run in group) else first


def _folders(path: Path) -> Iterable[Path]:
    return (each for each in path.iterdir() if each.is_dir()) if path.is_dir() else ()


def _differ_in_seed_alone(group: Sequence[RunFiles], run: RunFiles) -> bool:
    first = group[0]
    if first.role != run.role or run.config.seed in {each.config.seed for each in group}:
        return False
    if set(differences(first.config, run.config)) != {"seed"}:
        return False
    return not first.data_sha256 or not run.data_sha256 or first.data_sha256 == run.data_sha256


# What tells runs apart, the first that does.
_NAMES: tuple[Callable[[RunFiles], Any], ...] = (
    lambda run: run.config.dataset,
    lambda run: "" if run.config.semantics == "paper" else run.config.semantics,
    lambda run: f"epsilon {run.config.attack.epsilon * 255:.4g}/255" if run.config.attack.epsilon else "",
    lambda run: f"{run.config.epochs} epochs",
    lambda run: run.path.name,
    lambda run: run.path,
)


def _student(run: RunFiles) -> str:
    """The student of a teacher by its folder's name, of seeds by that of the folder above."""
    folder = run.path.parent
    student = folder.parent if _SEED.fullmatch(folder.name) else folder
    return f", {run.role} of {student.name}" if run.role else ""


def _labels(runs: Sequence[RunFiles]) -> list[str]:
    """Method and model of each, and what tells it from others of the same."""
    texts = [f"{run.config.method}, {run.config.model}{_student(run)}" for run in runs]
    for name in _NAMES:
        same: dict[str, list[int]] = defaultdict(list)
        for index, text in enumerate(texts):
            same[text].append(index)
        for indices in same.values():
            told = {index: str(name(runs[index])) for index in indices}
            if len(set(told.values())) > 1:
                for index, text in told.items():
                    texts[index] += f", {text}" if text else ""
    return texts
