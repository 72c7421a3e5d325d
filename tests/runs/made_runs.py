"""Run directories as a training leaves them, written in a moment: their numbers are made up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from engine.common import yaml_text
from engine.config import load


def epoch_row(epoch: int, of: int, config: Any, *, shift: float, n: int) -> dict[str, Any]:
    """A row of an epoch, as `engine.runs.trainer` writes it."""
    progress = epoch / of
    robust = round(n * (0.2 + 0.35 * progress + shift)) / n
    row: dict[str, Any] = {
        "event": "epoch", "epoch": epoch, "step": 10 * epoch, "phase": config.method, "lr": 0.1,
        "loss": 2.3 * math.exp(-2 * progress) + shift, "images_per_second": 1000.0, "seconds": 2.0 + shift,
        "peak_memory": 300 * 2**20, "natural_accuracy": round(n * (0.4 + 0.4 * progress)) / n,
        "robust_accuracy": robust, "measured_on": "validation", "measured_n": n,
        "train_student_adversarial_accuracy": 0.2 + 0.5 * progress,
    }  # fmt: skip
    if config.method in ("ard", "iad1", "iad2"):
        unsure = 0.3 * progress
        row |= {
            "phase": "ard" if epoch <= 0.3 * of else config.method,
            "alpha": 0.9, "probe_teacher_natural_accuracy": 0.9,
            "probe_teacher_adversarial_accuracy": 0.9 - unsure,
            "probe_student_adversarial_accuracy": robust,
            "probe_alpha_histogram": [0.1 - 0.1 * progress, *[0.0] * 18, 0.9 + 0.1 * progress],
            "probe_cases": {
                "both_right": 0.9 - unsure, "only_natural_right": unsure, "both_wrong": 0.1,
                "only_adversarial_right": 0.0,
            },
        }  # fmt: skip
    return row


def result(accuracy: float, n: int, description: str = "numbers of the attack") -> dict[str, Any]:
    """A result as in summary.json."""
    return {"accuracy": accuracy, "correct": round(accuracy * n), "n": n, "description": description, "parts": {}}


def made_run(
    path: Path,
    *,
    epochs: int = 3,
    shift: float = 0.0,
    tested: dict[str, dict[str, Any]] | None = None,
    command: tuple[str, ...] = ("engine", "train"),
    finished: bool = True,
    measured_on: str = "validation",
    **keys: Any,
) -> Path:
    """A run directory. shift: of its accuracies and times.

    tested: results on test images of the best epoch.
    """
    config = load({"method": "iad1", "dataset": "cifar10", "model": "resnet8", "epochs": epochs} | keys)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml_text.write(config.tree() | {"out": None}))
    trained = epochs if finished else epochs - 1
    rows = [epoch_row(epoch, epochs, config, shift=shift, n=500) for epoch in range(1, trained + 1)]
    rows = [row | {"measured_on": measured_on} for row in rows]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {
        "engine": "0.1.0", "started": "2026-01-01T00:00:00+00:00", "command": list(command),
        "hardware": {"device": "cpu"}, "precision": {"training": "float32"}, "data": {"sha256": "d" * 64},
    }  # fmt: skip
    (path / "provenance.json").write_text(json.dumps(record))
    if finished:
        best = max(rows, key=lambda row: row["robust_accuracy"])
        summary = {
            "method": config.method, "selected_on": measured_on, "selected_by": "robust_accuracy",
            "best": best, "last": rows[-1],
        }  # fmt: skip
        if tested is not None:
            summary |= {"test_of_best": tested, "test_of_last": tested}
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def entry(attack: str, accuracy: float, n: int, **keys: Any) -> dict[str, Any]:
    """A result as in a report of evaluations."""
    parameters = {"epsilon": 8 / 255, "threat_model": "Linf", "seed": 0} if attack != "natural" else {"seed": 0}
    facts = {"engine": "0.1.0", "started": "2026-01-02T00:00:00+00:00", "data": {"name": "cifar10"}}
    return facts | {"attack": attack, "parameters": parameters} | result(accuracy, n) | keys


def write_report(path: Path, *entries: dict[str, Any]) -> Path:
    """A report of evaluations."""
    path.write_text(json.dumps({"format": 2, "results": entries}))
    return path
