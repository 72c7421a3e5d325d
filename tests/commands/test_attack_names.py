"""Attacks on the command line and in a run: the list, the user's own, other checkpoints' images, few classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import engine
from engine.attacks import table
from engine.evaluation import reports
from engine.models.weights import load_model
from engine.pipelines.datasets import find
from engine.pipelines.splits import Request
from tests.conftest import write_checkpoint


def test_the_attacks_are_listed_with_the_numbers_of_a_ball_and_the_classes(
    cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    lines = {line.split()[0]: line for line in cli("attacks").out.splitlines() if line.strip()}
    assert "L-inf, epsilon 8/255, 20 steps of 2/255, random start, cross-entropy, BN eval" in lines["pgd20"]
    assert "Madry et al. (2018)" in lines["pgd20"]
    few = cli("attacks", "--classes", "2", "--threat-model", "L2", "--epsilon", "0.5")
    lines = {line.split()[0]: line for line in few.out.splitlines() if line.strip()}
    assert "L2, epsilon 0.5, 20 steps of 0.125" in lines["pgd20"]
    assert "AutoAttack without APGD-T, which 2 classes do not define" in lines["aa"]
    assert not {"apgd-t", "apgd-dlr"} & lines.keys()


def test_an_attack_of_the_user_s_serves_wherever_others_do(
    tiny: Any, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluations, after each epoch, of which it chooses the best, in the probe and at the end."""
    monkeypatch.setattr(table, "_added", {})

    def brighter(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
        return (x + epsilon).clamp(0, 1)

    table.add("brighter", brighter, title="Brighter", summary="one step", source="me")
    run = tmp_path / "run"
    keys: dict[str, Any] = {"method": "at", "attack": {"epsilon": 0.1}, "epochs": 1}
    keys["eval"] = {"attack": "brighter", "final": ["natural", "brighter"]}
    engine.train(tiny.config(out=str(run), **keys))
    (row,) = [
        row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["event"] == "epoch"
    ]
    summary = json.loads((run / "summary.json").read_text())["test_of_best"]
    assert row["robust_accuracy"] == summary["brighter"]["accuracy"]  # selected on the test images

    found = cli("eval", str(run), "--attacks", "brighter,natural,pgd3", "--data", str(tiny.folder))
    assert found.code == 0, found.err
    report = {result["attack"]: result for result in reports.read(run / "best.pt.eval.json")}
    assert list(report) == ["brighter", "natural", "pgd3"]
    assert report["brighter"]["correct"] == summary["brighter"]["correct"]
    assert report["brighter"]["parameters"]["function"].endswith("brighter")
    assert "Brighter: L-inf, epsilon 25.5/255, one step, 18 images, batch 64, seed 0" in found.out
    network = load_model(run / "best.pt").module
    images: Any = find("folder", str(tiny.folder), Request(only_test=True)).test
    x = (images.images.permute(0, 3, 1, 2).float() / 255 + 0.1).clamp(0, 1)
    with torch.no_grad():
        assert report["brighter"]["correct"] == int((network(x).argmax(1) == images.labels).sum())


def test_images_are_transferred_from_another_checkpoint(tiny: Any, cli: Any, tmp_path: Path) -> None:
    path, source = tmp_path / "m.pt", write_checkpoint(tmp_path / "s.pt", 5)
    shutil.copy(tiny.teacher, path)
    name = f"transfer:{source}"
    call = ["eval", str(path), "--dataset", "folder", "--data", str(tiny.folder), "--attacks", f"pgd20,{name}"]
    outcome = cli(*call, "--epsilon", "0.1")
    assert outcome.code == 0, outcome.err
    first = {entry["attack"]: entry for entry in reports.read(tmp_path / "m.pt.eval.json")}
    assert first[name]["parameters"]["crafted_on"]["sha256"] == load_model(source).sha256
    write_checkpoint(source, 6)
    assert cli(*call, "--epsilon", "0.1").code == 0
    entries = [entry for entry in reports.read(tmp_path / "m.pt.eval.json") if entry["attack"] == name]
    assert len(entries) == 2  # of another content of the source
    assert len(reports.read(tmp_path / "m.pt.eval.json")) == 3
    itself = cli(*call[:-1], f"pgd20,transfer:{path}", "--epsilon", "0.1", "--out", str(tmp_path / "out"))
    assert itself.code == 0, itself.err
    (report,) = (tmp_path / "out").glob("*.json")
    own, transferred = reports.read(report)
    assert own["correct"] == transferred["correct"]


@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        ("transfer:nowhere.pt", "transfer:nowhere.pt: there is no file nowhere.pt"),
        ("transfer:{}:pgd0", "attack: 'pgd0' is not known; did you mean 'pgd20'"),
        ("transfer:{}", "ten.pt: the checkpoint's head has 10 classes, the data set has 3"),
        ("apgd-t", "apgd-t: needs 4 classes, and the model has 3; defined: natural, fgsm, "),
    ],
)
def test_an_attack_that_cannot_be_made_is_one_line(
    attacks: str, message: str, tiny: Any, cli: Any, tmp_path: Path
) -> None:
    (tmp_path / "others").mkdir()
    other = write_checkpoint(tmp_path / "others" / "ten.pt", 0, 10)
    where = ["--dataset", "folder", "--data", str(tiny.folder)]
    shutil.copy(tiny.teacher, tmp_path / "m.pt")
    outcome = cli("eval", str(tmp_path / "m.pt"), *where, "--attacks", attacks.format(other))
    run = [*tiny.flags(method="at", out=str(tmp_path / "run")), "--set", f"eval.final=['{attacks.format(other)}']"]
    for found in (outcome, cli(*run)):
        assert found.code == 2
        (line,) = found.err.strip().splitlines()
        assert message in line
    assert {file.name for file in tmp_path.iterdir()} == {"m.pt", "others"}


def test_autoattack_of_few_classes_is_named_so(tiny: Any, cli: Any, tmp_path: Path) -> None:
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    shutil.copy(tiny.teacher, tmp_path / "m.pt")
    where = ["--dataset", "folder", "--data", str(tiny.folder), "--epsilon", "1", "--limit-aa", "6"]
    outcome = cli("eval", str(tmp_path / "m.pt"), *where, "--attacks", "natural,aa")
    assert outcome.code == 0, outcome.err
    natural, aa = reports.read(tmp_path / "m.pt.eval.json")
    assert (natural["n"], aa["n"]) == (18, 6)
    assert aa["parameters"]["parts"] == list(aa["parts"]) == ["natural", "apgd-ce", "fab-t", "square"]
    assert "AA without APGD-T: AutoAttack without APGD-T, which 3 classes do not define" in " ".join(
        outcome.out.split()
    )
    assert "standard" not in aa["description"]
