"""Facts of a checkpoint's training and of its accuracies, from the files beside it, for a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.attacks import table
from engine.attacks.pgd import describe
from engine.config import explicit, load
from engine.deployment.exporting.model_card import Accuracy
from engine.evaluation import reports
from engine.evaluation.statistics.intervals import wilson
from engine.models.weights import LoadedModel
from engine.runs.run_directory import RunDir

_OF_SUMMARY = {"best.pt": "test_of_best", "last.pt": "test_of_last"}
"""Key of summary.json that has the accuracies of a run's checkpoint."""


def training(loaded: LoadedModel) -> list[tuple[str, str]]:
    """Names and texts of how a network was trained, as far as the checkpoint and its run directory tell."""
    config: Mapping[str, Any] = loaded.config or {}
    rows = [(name, str(config[name])) for name in ("method", "semantics", "epochs", "seed") if name in config]
    if loaded.dataset:
        rows.insert(0, ("data", loaded.dataset))
    attack = config.get("attack")
    if isinstance(attack, dict) and "num_steps" in attack:
        rows.append(("attack of the training", describe(load(explicit(config)).attack)))
    run, summary = _run_of(Path(loaded.path))
    if run is None:
        return rows
    for session in run.sessions()[-1:]:
        for section, teacher in session.get("teachers", {}).items():
            rows.append((section, f"{teacher.get('model')}, sha256 {teacher.get('sha256')}"))
        versions = session.get("versions", {})
        rows.append(
            ("trained with", ", ".join(f"{key} {versions[key]}" for key in ("python", "torch") if key in versions))
        )
    if summary and Path(loaded.path).name == run.best.name:
        rows.append(
            ("epoch of the checkpoint", f"{summary['best'].get('epoch')}, selected on {summary['selected_on']}")
        )
    return rows


def accuracies(loaded: LoadedModel) -> list[Accuracy]:
    """Accuracies of a checkpoint on test images: of its run, and of the evaluations of its very content."""
    path = Path(loaded.path)
    found: dict[tuple[str, int, str], Accuracy] = {}
    _, summary = _run_of(path)
    if summary is not None:
        for name, result in summary.get(_OF_SUMMARY[path.name], {}).items():
            each = _accuracy(name, result, "summary.json")
            found[each.attack, each.n, each.numbers] = each
    report = reports.path_of(path, None)
    for entry in reports.read(report):
        if reports.checkpoint_of(entry) == loaded.sha256:
            each = _accuracy(entry["attack"], entry, report.name)
            found[each.attack, each.n, each.numbers] = each
    return list(found.values())


def _accuracy(name: str, result: Mapping[str, Any], source: str) -> Accuracy:
    n = int(result["n"])
    correct = round(float(result["accuracy"]) * n)
    warned = "; may be too high" if result.get("warnings") else ""
    numbers = f"{result.get('description', '')}{warned}"
    return Accuracy(_title(name, result), correct / n, wilson(correct, n), n, numbers, source)


def _title(name: str, result: Mapping[str, Any]) -> str:
    try:
        return table.title(name, result)
    except ValueError:  # an attack of the user's that is not imported now
        return name


def _run_of(path: Path) -> tuple[RunDir | None, dict[str, Any] | None]:
    """The run directory of a checkpoint that is one of its own, and its summary where it is finished."""
    if path.name not in _OF_SUMMARY or not (path.parent / "config.yaml").is_file():
        return None, None
    run, config = RunDir.existing(path.parent)
    return run, run.result(config)
