"""`engine predict`: tables, CSV and JSON, lists on standard input, files that are never replaced or half there."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.commands.deployment import predict as command
from engine.deployment.predicted_files import FileAnswer, PredictedFiles
from engine.deployment.predicting import predict
from engine.models.weights import Ranked, load_model
from tests.commands.test_bad_input import assert_user_error
from tests.conftest import CLASSES, Cli
from tests.evaluation.saved import EPSILON, trained
from tests.pipelines.photographs import smooth


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a trained network."""
    return trained(tmp_path_factory.mktemp("run") / "best.pt", tiny_folder).parent


@pytest.fixture
def images(tiny_folder: Path) -> Path:
    return tiny_folder / "test"


@pytest.fixture
def files(images: Path) -> list[str]:
    return [str(path) for name in CLASSES for path in sorted((images / name).iterdir())]


def test_a_table_tells_the_class_of_each_image(run: Path, images: Path, files: list[str], cli: Cli) -> None:
    outcome = cli("predict", str(run), str(images), "--device", "cpu", "--top", "2")
    assert (outcome.code, outcome.err) == (0, "")
    expected = predict(load_model(run / "best.pt"), files).top(2)
    rows = [line.split() for line in outcome.out.splitlines() if ".png" in line]
    for words, file, (first, second) in zip(rows, files, expected, strict=True):
        percent = [f"{each.probability:.2%}" for each in (first, second)]
        assert words == [file, first.name, percent[0], second.name, percent[1]]


def test_json_holds_all_that_decides_the_answers(run: Path, files: list[str], cli: Cli) -> None:
    outcome = cli("predict", str(run), *files, "--format", "json", "--attack", "pgd10", "--epsilon", EPSILON)
    assert outcome.code == 0
    assert "Note: " in outcome.err  # and standard output is JSON alone
    found = json.loads(outcome.out)
    assert found["checkpoint"]["sha256"] == hashlib.sha256((run / "best.pt").read_bytes()).hexdigest()
    assert found["class_names"] == list(CLASSES)
    assert found["attack"]["description"].startswith("L-inf, epsilon 24/255, 10 steps of 6/255, random start")
    assert found["attack"]["holds"] == "this attack did not change the answer; no certificate"
    assert (found["image_size"], found["versions"]["torch"] is not None) == (None, True)
    assert [image["file"] for image in found["images"]] == files
    for image in found["images"]:
        assert image["size"] == [8, 8]
        assert image["attacked"]["holds"] == (image["attacked"]["class"] == image["class"])
        assert image["attacked"]["masked"] is False
    assert {image["attacked"]["holds"] for image in found["images"]} == {True, False}


def test_csv_and_json_tell_the_same(run: Path, images: Path, cli: Cli, tmp_path: Path) -> None:
    common = ("predict", str(run), str(images), "/nowhere,\n\u00e9.png", "--on-bad-image", "skip", "--top", "9")
    options = ("--attack", "fgsm", "--epsilon", EPSILON, "--device", "cpu")
    for name in ("a.csv", "a.json"):
        outcome = cli(*common, *options, "--out", str(tmp_path / name))
        assert (outcome.code, outcome.err) == (0, "")
        assert f"Written: {tmp_path / name}" in outcome.out
    lines = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text(encoding="utf-8"), newline="")))
    told = json.loads((tmp_path / "a.json").read_text())["images"]
    for line, image in zip(lines, told, strict=True):
        assert line["file"] == image["file"]
        assert line["error"] == image.get("error", "")
        if line["error"]:
            assert {line[key] for key in ("class", "probability", "class_3", "holds")} == {""}
            continue
        columns = [("class", "probability"), ("class_2", "probability_2"), ("class_3", "probability_3")]
        ranked = [(each["class"], each["probability"]) for each in image["top"]]
        assert [(line[name], float(line[number])) for name, number in columns] == ranked
        assert (line["attacked_class"], line["holds"] == "true") == (
            image["attacked"]["class"],
            image["attacked"]["holds"],
        )
    assert lines[-1]["error"].startswith("/nowhere")


def test_the_table_tells_what_holds_and_what_is_doubtful(
    run: Path, images: Path, cli: Cli, tmp_path: Path
) -> None:
    import torch

    outcome = cli("predict", str(run), str(images), "--attack", "pgd10", "--epsilon", EPSILON)
    assert outcome.code == 0
    assert "epsilon 24/255" in outcome.out
    assert "it is no certificate" in outcome.out
    assert " changed to " in outcome.out
    assert " holds " in outcome.out
    assert "holds*" not in outcome.out
    state = load_model(run / "best.pt").module.state_dict()
    head = {key: value * 1e9 for key, value in state.items() if key.startswith("linear")}
    torch.save(state | head, tmp_path / "large.pt")
    outcome = cli("predict", str(tmp_path / "large.pt"), str(images), "--attack", "pgd10")
    assert outcome.code == 0
    assert "holds*" in outcome.out
    assert "* doubtful: most of the gradient was zero" in outcome.out
    assert "Warning: pgd10: 18 of 18 answers hold although" in outcome.out


def test_a_list_on_standard_input(
    run: Path, files: list[str], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / os.fsdecode(b"two\nlines \xff.png")  # no text at all
    Image.fromarray(smooth(1, 8, 8)).save(odd, "PNG")
    names = [str(odd), *files[:2]]
    for options, end, expected in ((("-0",), b"\0", names), ((), b"\n", names[1:])):
        listed = end.join(os.fsencode(name) for name in expected)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(listed)))
        out = tmp_path / f"{len(expected)}.csv"
        outcome = cli("predict", str(run), "-", *options, "--out", str(out))
        assert outcome.code == 0, outcome.err
        text = out.read_bytes().decode("utf-8", "surrogateescape")
        assert [line["file"] for line in csv.DictReader(io.StringIO(text, newline=""))] == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert_user_error(cli("predict", str(run), "-"), "IMAGES: no file is named")


def test_no_file_is_overwritten(run: Path, files: list[str], cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    out.write_text("before")
    assert_user_error(cli("predict", str(run), files[0], "--out", str(out)), f"--out: {out} exists", "--force")
    assert out.read_text() == "before"
    assert cli("predict", str(run), files[0], "--out", str(out), "--force").code == 0
    assert len(json.loads(out.read_text())["images"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


BAD: dict[str, tuple[list[str], list[str]]] = {
    "no images": ([], ["IMAGES"]),
    "no such image": (["/nowhere.png"], ["/nowhere.png is not a readable image", "No such file"]),
    "no image": ([__file__], ["test_predict.py is not a readable image"]),
    "format": (["FILE", "--format", "xml"], ["--format: 'xml' is not known", "csv, json, table"]),
    "name of the file": (["FILE", "--out", "TMP/a.txt"], ["a.txt is named neither .csv nor .json"]),
    "table in a file": (["FILE", "--out", "TMP/a.csv", "--format", "table"], ["--format", "terminal"]),
    "no folder": (["FILE", "--out", "TMP/b/a.csv"], ["--out", "b is no folder"]),
    "folder as file": (["FILE", "--out", "TMP", "--format", "csv", "--force"], ["--out", "exists"]),
    "attack": (["FILE", "--attack", "pdg20"], ["attack", "pdg20", "pgd20"]),
    "several radii": (["FILE", "--attack", "fgsm", "--epsilon", "1/255,2/255"], ["attack.epsilon"]),
    "null without list": (["FILE", "-0"], ["--null"]),
    "two lists": (["-", "-"], ["IMAGES", "once"]),
    "top": (["FILE", "--top", "0"], ["--top"]),
    "normalisation": (["FILE", "--normalize", "cifar10"], ["normalize"]),
}


@pytest.mark.parametrize("name", BAD)
def test_whatever_a_user_gets_wrong_is_one_line(
    name: str, run: Path, files: list[str], cli: Cli, tmp_path: Path
) -> None:
    arguments, told = BAD[name]
    given = [word.replace("FILE", files[0]).replace("TMP", str(tmp_path)) for word in arguments]
    assert_user_error(cli("predict", str(run), *given), *told)
    assert not list(tmp_path.iterdir())


def test_a_network_that_is_not_there_is_one_line(files: list[str], cli: Cli) -> None:
    assert_user_error(cli("predict", "nowhere.pt", files[0]), "nowhere.pt")


def test_an_interrupted_command_leaves_no_file(run: Path, files: list[str], cli: Cli, tmp_path: Path) -> None:
    code = (
        "import signal\nfrom engine import register\ncalls = []\n"
        "def ends(model, x, y):\n    calls.append(x)\n"
        "    if len(calls) > 1:\n        signal.raise_signal(signal.SIGINT)\n    return x\n"
        "register.attack('ends', ends)\n"
    )
    (tmp_path / "ends.py").write_text(code)
    out, saved = tmp_path / "a.json", tmp_path / "saved"
    common = ("predict", str(run), *files, "--import", str(tmp_path / "ends.py"), "--attack", "ends")
    outcome = cli(*common, "--batch-size", "5", "--out", str(out), "--save-adversarial", str(saved))
    assert (outcome.code, outcome.err.strip()) == (130, "engine: interrupted")
    assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"ends.py", "saved"}


def test_a_file_that_comes_meanwhile_stays(run: Path, files: list[str], cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    code = (
        f"import pathlib\nfrom engine import register\ndef writes(model, x, y):\n"
        f"    pathlib.Path({str(out)!r}).write_text('another')\n    return x\n"
        "register.attack('writes', writes)\n"
    )
    (tmp_path / "writes.py").write_text(code)
    common = ("predict", str(run), *files, "--import", str(tmp_path / "writes.py"), "--attack", "writes")
    outcome = cli(*common, "--out", str(out))
    assert (outcome.code, out.read_text()) == (1, "another")
    assert f"--out: {out} has come into being meanwhile" in outcome.err


def test_saved_images_are_told_of(run: Path, files: list[str], cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    common = ("predict", str(run), *files, "--attack", "pgd10", "--epsilon", EPSILON)
    outcome = cli(*common, "--save-adversarial", str(folder))
    assert outcome.code == 0
    assert f"Written: {folder}: {len(list(folder.iterdir()))} images that change the answer" in outcome.out
    assert_user_error(cli(*common, "--save-adversarial", str(folder)), "--save-adversarial", "no empty folder")


def test_names_of_files_and_classes_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    row = FileAnswer("[bold]a\x1b[2J\n.png", (8, 8), top=(Ranked(0, "[red]cat\x07", 0.5),))
    command._show(command._reporter(aside=False), PredictedFiles({}, (row,)), 1)
    told = capsys.readouterr().out
    assert "[bold]a\\x1b[2J .png" in told
    assert "[red]cat\\x07" in told
    assert "50.00%" in told


def test_probabilities_in_files_are_exact(run: Path, files: list[str], cli: Cli) -> None:
    outcome = cli("predict", str(run), *files, "--format", "json", "--device", "cpu")
    told: list[Any] = json.loads(outcome.out)["images"]
    expected = predict(load_model(run / "best.pt"), files).probabilities.amax(dim=1).tolist()
    assert [image["probability"] for image in told] == expected
