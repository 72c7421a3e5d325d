"""Every method learns on real images, from the command line, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

METHODS = ("st", "at", "trades", "ard", "akd2", "iad1", "iad2")
ABOVE_CHANCE = 0.17  # four standard deviations above the 0.1 of ten classes, on 300 test images


def flags(folder: Path, method: str, out: Path) -> list[str]:
    keys = {
        "attack.epsilon": "4/255", "attack.num_steps": 2, "validation": 0, "eval.final": "[natural]",
        "eval.probe_size": 20, "optim.milestones": [4, 5],
    }  # fmt: skip
    sets = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    return [
        "train", "--method", method, "--dataset", "folder", "--data", str(folder), "--model", "resnet8-strided-32",
        "--limit-train", "800", "--limit-test", "300", "--epochs", "5", "--batch-size", "32", "--out", str(out),
        *sets,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def teachers(real_images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from click.testing import CliRunner

    from engine.commands.cli import commands

    found = {}
    for method in ("at", "st"):
        out = tmp_path_factory.mktemp("teachers") / method
        outcome = CliRunner().invoke(commands, flags(real_images, method, out))
        assert outcome.exit_code == 0, outcome.output
        found[method] = out
    return found


@pytest.mark.parametrize("method", METHODS)
def test_methods_learn(
    method: str, real_images: Path, teachers: dict[str, Path], cli: Any, tmp_path: Path
) -> None:
    run = teachers.get(method, tmp_path / "run")
    if method not in teachers:
        paths = ["--teacher", str(teachers["at"] / "best.pt"), "--teacher-st", str(teachers["st"] / "best.pt")]
        outcome = cli(*flags(real_images, method, run), *paths)
        assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epochs = [row for row in rows if row["event"] == "epoch"]
    # Within a phase: the row of the warm-up and the row after it have losses of different size.
    for phase in {row["phase"] for row in epochs}:
        losses = [row["loss"] for row in epochs if row["phase"] == phase]
        assert losses[-1] < losses[0] or len(losses) == 1
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best"]["natural_accuracy"] > ABOVE_CHANCE
    if method != "st":
        assert summary["best"]["robust_accuracy"] > ABOVE_CHANCE
    for which in ("test_of_best", "test_of_last"):
        assert summary[which]["natural"]["n"] == 300


def test_cifar10_is_recognised_as_image_files(real_images: Path, cli: Any, tmp_path: Path) -> None:
    """The data set's own name finds it where $ENGINE_DATA points."""
    run = tmp_path / "run"
    outcome = cli(
        "train", "--method", "st", "--dataset", "cifar10", "--model", "resnet8", "--epochs", "1",
        "--out", str(run), "--limit-train", "100", "--limit-test", "50", "--set", "eval.final=[]",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "cifar10 as image files" in outcome.out
    names = torch.load(run / "last.pt", weights_only=True)["class_names"]
    assert names == ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
