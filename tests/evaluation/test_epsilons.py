"""Evaluations at several radii: the list, a result of each as if it were alone, the table and the picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.common.console import Reporter
from engine.evaluation import evaluate_checkpoint as evaluation
from engine.evaluation.evaluate_checkpoint import EvaluationConfig, Report
from engine.evaluation.files import epsilons
from engine.evaluation.files.epsilons import Curves, Radius
from engine.evaluation.reports import path_of, read
from tests.conftest import Cli
from tests.evaluation.saved import trained


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("network") / "at.pt", tiny_folder)


def test_lists_are_read_in_ascending_order() -> None:
    assert epsilons.asked(None) == epsilons.asked("8/255") == epsilons.asked("x") == []
    assert epsilons.asked("8/255, 0.5,2/255") == [
        Radius("2/255", 2 / 255),
        Radius("8/255", 8 / 255),
        Radius("0.5", 0.5),
    ]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("2/255,", "--epsilon: a radius is missing in '2/255,'"),
        (",", "--epsilon: a radius is missing"),
        ("8/255,4/255,16/510", "--epsilon: 8/255 and 16/510 are the same radius"),
        ("8/255,-1/255", "attack.epsilon"),
        ("8/255,much", "attack.epsilon"),
        ("8/255,8/0", "attack.epsilon"),
        ("8/255,2", "attack"),  # an L-inf length above 1
    ],
)
def test_other_lists_are_refused_before_anything_is_measured(
    given: str, told: str, cli: Cli, checkpoint: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    arguments = ["--attacks", "pgd10", "--data", str(tiny_folder), "--out", str(tmp_path)]
    done = cli("eval", str(checkpoint), *arguments, "--epsilon", given)
    assert done.code == 2
    assert told in done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--save-adversarial", "--robustbench-json"])
def test_files_of_one_radius_take_one(option: str, cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    done = cli("eval", str(checkpoint), "--epsilon", "2/255,4/255", option, str(tmp_path / "file"))
    assert (done.code, "--epsilon: one radius is expected" in done.err) == (2, True)


def test_every_radius_has_the_result_that_it_has_alone(
    cli: Cli, checkpoint: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    arguments = ["--attacks", "natural,pgd10,fgsm", "--data", str(tiny_folder), "--out", str(tmp_path)]
    done = cli("eval", str(checkpoint), *arguments, "--device", "cpu", "--epsilon", "60/255,8/255,24/255")
    assert done.code == 0, done.err
    report = path_of(checkpoint, tmp_path)
    entries = read(report)
    assert [entry["attack"] for entry in entries] == ["natural", "pgd10", "fgsm", "pgd10", "fgsm", "pgd10", "fgsm"]
    by_radius: dict[str, list[float]] = {"pgd10": [], "fgsm": []}
    for entry, text in zip(entries[1:], ["8/255"] * 2 + ["24/255"] * 2 + ["60/255"] * 2, strict=True):
        keys: dict[str, Any] = {"data": str(tiny_folder), "epsilon": text, "device": "cpu"}
        alone = evaluation.run(checkpoint, EvaluationConfig([entry["attack"]], **keys), Reporter())
        assert entry["correct"] == alone.results[entry["attack"]]["correct"]
        numerator, denominator = text.split("/")
        assert entry["parameters"]["epsilon"] == int(numerator) / int(denominator)
        by_radius[entry["attack"]].append(entry["accuracy"])
    assert by_radius["pgd10"][0] > by_radius["pgd10"][2]
    rows = {line.split()[0]: line.split()[1:] for line in done.out.splitlines() if line.strip()}
    assert rows["PGD-10"] == ["18", *(f"{accuracy:.2%}" for accuracy in by_radius["pgd10"])]
    assert rows["Natural"] == ["18", *[f"{entries[0]['accuracy']:.2%}"] * 3]
    picture = report.with_name(report.name.replace(".json", ".epsilons.png"))
    assert f"Written: {picture}" in done.out.replace("\n", " ")
    assert Image.open(io.BytesIO(picture.read_bytes())).size[0] > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([report.name, picture.name])


def test_a_single_radius_has_no_picture(cli: Cli, checkpoint: Path, tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ["--attacks", "natural", "--data", str(tiny_folder), "--out", str(tmp_path)]
    assert cli("eval", str(checkpoint), *arguments, "--epsilon", "8/255").code == 0
    assert [path.name for path in tmp_path.iterdir()] == [path_of(checkpoint, tmp_path).name]


def test_curves_begin_at_the_accuracy_under_no_attack() -> None:
    def report(**accuracies: float) -> Report:
        return Report("x", {name: {"accuracy": accuracy} for name, accuracy in accuracies.items()}, None)

    reports = {Radius("2/255", 2 / 255): report(natural=0.9, pgd20=0.5), Radius("0.5", 0.5): report(pgd20=0.25)}
    assert epsilons.points_of(Curves("Linf", reports)) == {"PGD-20": [(0.0, 0.9), (2.0, 0.5), (127.5, 0.25)]}
    assert epsilons.points_of(Curves("L2", reports))["PGD-20"][-1] == (0.5, 0.25)
    assert Curves("Linf", reports).results() == {
        "natural": {"2/255": {"accuracy": 0.9}, "0.5": {"accuracy": 0.9}},
        "pgd20": {"2/255": {"accuracy": 0.5}, "0.5": {"accuracy": 0.25}},
    }
