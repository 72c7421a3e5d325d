"""A run's own section: accuracies, pictures, epochs, settings and provenance."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.attacks.table import title
from engine.common.pictures import DARK, LIGHT
from engine.config import explicit
from engine.evaluation.reports import SUFFIX
from engine.runs.reporting import plots
from engine.runs.reporting.page import Drawn, PageSection, details, drawn, found, grid, h3, mapping, note
from engine.runs.reporting.reading import EvalFile, RunFiles, content_of, interval
from engine.runs.reporting.tables import Cell, Percent, ReportTable

_EPOCH_COLUMNS = (
    "epoch", "phase", "lr", "loss", "alpha", "natural_accuracy", "robust_accuracy", "attack_steps",
    "probe_fgsm_pgd_gap", "images_per_second", "seconds", "peak_memory",
    "share_of_peak",
)  # fmt: skip
_MOST_EPOCHS = 12
"""Epochs up to which all are shown; of more every so many, and all of them folded."""
_PROVENANCE = ("engine", "commit", "started", "pipeline")
_PROVENANCE_GROUPS = ("versions", "hardware", "precision", "kernels", "data", "teachers")

# What tells the results of one report apart, by what it is called in a table.
_TELLING = {
    "seed": ("parameters", "seed"),
    "data": ("data", "sha256"),
    "image size": ("parameters", "image_size"),
    "model": ("model",),
    "weights": ("weights",),
    "checkpoint": ("checkpoint", "sha256"),
    "engine": ("engine",),
    "measured": ("started",),
}


def seeds_section(title: str, runs: Sequence[tuple[str, RunFiles]]) -> PageSection:
    """All of several runs, each folded. runs: with the begin of their tables' names."""
    section = PageSection(title)
    for name, run in runs:
        of_run = run_section(run, name)
        section.tables += of_run.tables
        section.add(details(f"Seed {run.config.seed}, {run.path}", "".join(of_run.parts)))
    return section


def run_section(run: RunFiles, name: str) -> PageSection:
    """All of a run. name: begin of its tables' names."""
    config = run.config
    role = f"{run.role[0].upper()}{run.role[1:]}: " if run.role else ""
    section = PageSection(f"{role}{config.method} on {config.dataset}, {config.model}, {run.path}")
    if not run.is_finished:
        section.add(note(f"Not finished: {len(run.epochs)} of {config.epochs} epochs so far."))
    _add_accuracies(section, run, name)
    for file in run.evaluations:
        add_evaluation(section, file, f"{name}-{file.path.name.removesuffix(SUFFIX)}")
    _add_pictures(section, run)
    _add_epochs(section, run, name)
    settings = explicit(config.tree())
    section.add_folded("Settings that differ from the method's defaults", mapping(f"{name}-settings", settings))
    for provenance in run.sessions[-1:]:
        known = {key: provenance[key] for key in _PROVENANCE if key in provenance}
        told = known | {key: provenance.get(key, {}) for key in _PROVENANCE_GROUPS}
        section.add_folded("Provenance", mapping(f"{name}-provenance", told))
    return section


def report_section(file: EvalFile, name: str) -> PageSection:
    """The section of a report that was given by itself."""
    section = PageSection(f"Evaluations, {file.path}")
    add_evaluation(section, file, name)
    section.add(grid(_found(path) for path in _pictures_of_report(file.path)))
    return section


def _add_accuracies(section: PageSection, run: RunFiles, name: str) -> None:
    summary = run.summary or {}
    for key, which in (("test_of_best", "best"), ("test_of_last", "last")):
        if results := summary.get(key):
            chosen = (
                f", selected on {run.selected_on} by {summary.get('selected_by', '')}" if which == "best" else ""
            )
            heading = f"Test images, {which} epoch ({summary[which]['epoch']}{chosen})"
            rows = [_result(attack, result) for attack, result in results.items()]
            section.add_table(ReportTable(f"{name}-{which}", _HEAD, rows), heading)


_HEAD = ("attack", "accuracy", "n", "with")


def _result(attack: str, result: Mapping[str, Any]) -> tuple[Cell, ...]:
    accuracy, n = float(result["accuracy"]), result["n"]
    shown = Percent(accuracy, *interval(accuracy, n)) if n > 0 else Percent(accuracy)
    return name_of(attack, result), shown, n, result.get("description")


def name_of(attack: str, result: Mapping[str, Any]) -> str:
    """An attack as it is asked for, with the parts of AutoAttack that were not run."""
    parts = result.get("parts")
    is_whole = attack != "aa" or not isinstance(parts, Mapping) or not parts
    missing = "" if is_whole else title(attack, result).partition(" without ")[2]
    return f"{attack} without {missing}" if missing else attack


def add_evaluation(section: PageSection, file: EvalFile, name: str) -> None:
    """Every result of a report, with what tells them apart."""
    told = [[_of(entry, keys) for keys in _TELLING.values()] for entry in file.entries]
    differ = [len({row[column] for row in told}) > 1 for column in range(len(_TELLING))]
    head = (*_HEAD, *itertools.compress(_TELLING, differ))
    rows = [
        (*_result(entry["attack"], entry), *itertools.compress(row, differ))
        for entry, row in zip(file.entries, told, strict=True)
    ]
    section.add_table(ReportTable(name, head, rows), file.path.name)
    if file.earlier:
        section.add(
            note(f"{len(file.earlier)} results are of an earlier content of the checkpoint: compared nowhere.")
        )
    warnings = [str(text) for entry in file.entries for text in entry.get("warnings", ())]
    section.add(*map(note, dict.fromkeys(warnings)))


def _of(entry: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Value of an entry under nested keys, short."""
    value: Any = entry
    for key in keys:
        value = value.get(key, "") if isinstance(value, Mapping) else ""
    return str(value)[:19]  # of a hash enough to tell it from others, and of a time all but the zone


# ---------------------------------------------------------------- epochs


def _add_epochs(section: PageSection, run: RunFiles, name: str) -> None:
    rows = run.epochs
    if rows:
        columns = [key for key in _EPOCH_COLUMNS if any(key in row for row in rows)]
        table = ReportTable(f"{name}-epochs", columns, [[row.get(key, "") for key in columns] for row in rows])
        section.add(h3("Epochs"))
        if len(rows) <= _MOST_EPOCHS:
            section.tables.append(table)
            section.add(table.html())
        else:
            best = run.best.get("epoch")
            shown = [table.rows[index] for index in chosen_epochs([row["epoch"] for row in rows], best)]
            section.add(table.html(shown, links=False))
            section.add(note(f"The first, the last{', the best' if best else ''} and some between."))
            section.add_folded(f"All {len(rows)} epochs", table)
    for row in run.rolled_back:
        section.add(note(f"Epoch {row.get('epoch')} was rolled back: {row.get('overfitting')}"))


def chosen_epochs(epochs: Sequence[int], best: int | None) -> list[int]:
    """Indices of the first, the last and the best epoch, and of every so many between: about ten."""
    step = -(-len(epochs) // 10)
    chosen = {0, len(epochs) - 1} | set(range(step - 1, len(epochs), step))
    return sorted(chosen | {index for index, epoch in enumerate(epochs) if epoch == best})


# ---------------------------------------------------------------- pictures


def _add_pictures(section: PageSection, run: RunFiles) -> None:
    """Pictures drawn from the rows in light and dark, and then those that lie in the directory."""
    pictures = []
    if run.epochs:
        history = plots.EpochHistory(run.epochs, run.config, run.best.get("epoch"))
        for name, (light, dark) in plots.pages_of(history, (LIGHT, DARK)).items():
            pictures.append(drawn(Drawn(light, dark, plots.PANELS[name].alt)))
    section.add(grid(pictures))
    others = [path for path in sorted(run.path.glob("*.png")) if not plots.is_drawn_anew(path)]
    section.add(grid(map(_found, others)))
    for folder in sorted(run.path.glob("*.eval.pictures")):
        if files := sorted(folder.glob("*.png")):
            section.add(details(f"{folder.name}: {len(files)} pictures", grid(map(_found, files))))


def _pictures_of_report(path: Path) -> list[Path]:
    """Pictures that an evaluation has drawn beside its report."""
    stem = path.name.removesuffix(".json")
    return [*sorted(path.parent.glob(f"{stem}.*.png")), *sorted((path.parent / f"{stem}.pictures").glob("*.png"))]


def _found(path: Path) -> str:
    """A picture that was drawn by another command."""
    return found(content_of(path), f"Picture {path.name} of {path.parent}", path.name)


def found_pictures(folder: Path) -> str:
    """Every picture of a folder."""
    return grid(map(_found, sorted(folder.glob("*.png"))))
