"""`engine verify`: whatever is altered is found, and images that an attack should have found."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.common.console import Reporter
from engine.evaluation import evaluate_checkpoint as evaluation
from engine.evaluation.evaluate_checkpoint import EvaluationConfig
from tests.conftest import Cli
from tests.evaluation.saved import EPSILON, shorten, trained

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def measured(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a checkpoint, a report and its adversarial images."""
    root = tmp_path_factory.mktemp("measured")
    checkpoint = trained(root / "at.pt", tiny_folder)
    keys: dict[str, Any] = {"data": str(tiny_folder), "epsilon": EPSILON, "device": "cpu"}
    config = EvaluationConfig(["natural", "apgd-ce", "square"], save_adversarial=str(root / "hits.st"), **keys)
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        evaluation.run(checkpoint, config, Reporter(), out=root / "report.json")
    return root


@pytest.fixture
def copied(measured: Path, tmp_path: Path) -> Path:
    """The same in a folder of its own, from where it may be altered; the checkpoint is beside the report."""
    root = tmp_path / "copied"
    shutil.copytree(measured, root)
    report = json.loads((root / "report.json").read_text())
    for entry in report["results"]:
        entry["checkpoint"]["path"] = "gone/at.pt"
    (root / "report.json").write_text(json.dumps(report))
    return root


def alter(root: Path, change: Callable[[Tensors], object], *, sealed: bool = True) -> None:
    """Change the tensors; sealed: and the hash in the report with them."""
    with safe_open(root / "hits.st", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(root / "hits.st")
    change(tensors)
    save_file(tensors, root / "hits.st", metadata)
    if sealed:
        told(root, lambda entry: entry["adversarial"].update(sha256=digest(root)))


def told(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what the report says of results with images."""
    report = json.loads((root / "report.json").read_text())
    for entry in report["results"]:
        if "adversarial" in entry:
            change(entry)
    (root / "report.json").write_text(json.dumps(report))


def digest(root: Path) -> str:
    return hashlib.sha256((root / "hits.st").read_bytes()).hexdigest()


def check(cli: Cli, root: Path, *arguments: str) -> tuple[int, str]:
    done = cli("verify", str(root / "report.json"), "--device", "cpu", "--images", "0", *arguments)
    return done.code, done.out + done.err


def test_what_was_measured_holds(cli: Cli, measured: Path, copied: Path) -> None:
    for root in (measured, copied):
        code, said = check(cli, root)
        assert code == 0, said
        assert f"All holds: {root / 'report.json'}" in said


def test_one_byte_is_found(cli: Cli, copied: Path) -> None:
    content = bytearray((copied / "hits.st").read_bytes())
    content[-1] ^= 1
    (copied / "hits.st").write_bytes(content)
    code, said = check(cli, copied)
    assert code == 1
    assert said.count("is not the file that the report tells of") == 2
    content[10:60] = bytes(50)
    (copied / "hits.st").write_bytes(content)
    assert check(cli, copied)[0] == 1


def outside(tensors: Tensors) -> None:
    tensors["images"][0, 0, 0, 0] = 1 - tensors["images"][0, 0, 0, 0].round()


def another_label(tensors: Tensors) -> None:
    tensors["labels"][0] = (tensors["labels"][0] + 1) % 3


def another_class(tensors: Tensors) -> None:
    tensors["predicted"][0] = tensors["labels"][0]


def another_sample(tensors: Tensors) -> None:
    tensors["samples"][0] += 1


def beyond(tensors: Tensors) -> None:
    tensors["samples"][0] = 1000


def not_a_number(tensors: Tensors) -> None:
    tensors["images"][0, 0, 0, 0] = float("nan")


def one_less(tensors: Tensors) -> None:
    for name in ("images", "samples", "labels", "predicted", "part", "rank", "result"):
        tensors[name] = tensors[name][1:].clone()


def one_more_stood(tensors: Tensors) -> None:
    tensors["fell.0"][(tensors["fell.0"] > 0).nonzero()[0]] = -1


def another_part(tensors: Tensors) -> None:
    tensors["part"][0] = 2


def no_tensor(tensors: Tensors) -> None:
    del tensors["rank"]


ALTERATIONS: dict[Callable[[Tensors], None], str] = {
    outside: "lies outside the ball",
    another_label: "has another label in the data",
    another_class: "gets another class from the network",
    another_sample: "the images are not those of the samples that fell",
    beyond: "there are images of no sample of the data",
    not_a_number: "lies outside the ball",
    one_less: "adversarial images are there, and the report tells of",
    one_more_stood: "images stood, and the report tells of",
    another_part: "the images' parts are not those",
    no_tensor: "has no tensor 'rank'",
}


@pytest.mark.parametrize("change", ALTERATIONS, ids=lambda change: change.__name__)
def test_altered_tensors_are_found_whatever_the_hash_says(
    change: Callable[[Tensors], None], cli: Cli, copied: Path
) -> None:
    alter(copied, change)
    code, said = check(cli, copied)
    assert code == 1, said
    assert ALTERATIONS[change] in said
    assert "is not the file" not in said


def test_a_clean_image_is_found(cli: Cli, copied: Path, tiny_folder: Path) -> None:
    keys: dict[str, Any] = {"data": str(tiny_folder), "epsilon": EPSILON, "device": "cpu"}
    test = evaluation.opened(copied / "at.pt", EvaluationConfig(["natural"], **keys), []).images.test

    def clean(tensors: Tensors) -> None:
        pixels = torch.as_tensor(test.images[tensors["samples"][:1]])
        tensors["images"][:1] = pixels.permute(0, 3, 1, 2) / 255

    alter(copied, clean)
    code, said = check(cli, copied)
    assert code == 1
    assert "is classified correctly" in said
    assert "when rounded to n/255" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda entry: entry.update(correct=entry["correct"] + 1), "images stood, and the report tells of"),
        (lambda entry: entry["adversarial"].update(images=99), "and the report tells of 99"),
        (lambda entry: entry["adversarial"].update(still_adversarial_as_uint8=99), "n/255"),
        (lambda entry: entry["details"]["natural"].update(stood=1), "images fell to natural"),
        (lambda entry: entry["parameters"].update(epsilon=0.5), "has no images of"),
        (lambda entry: entry["parameters"].update(data="x"), "has no images of"),
    ],
)
def test_altered_reports_are_found(
    change: Callable[[dict[str, Any]], object], words: str, cli: Cli, copied: Path
) -> None:
    told(copied, change)
    code, said = check(cli, copied)
    assert code == 1
    assert words in said


def test_another_network_and_other_images_are_found(cli: Cli, copied: Path, tiny_folder: Path) -> None:
    folder = copied / "images"
    shutil.copytree(tiny_folder, folder)
    first = next((folder / "test" / "circle").iterdir())
    shutil.copy(next((folder / "test" / "square").iterdir()), first)
    code, said = check(cli, copied, "--data", str(folder))
    assert (code, "the data's sha256 is another" in said) == (1, True)
    with (copied / "at.pt").open("ab") as file:
        file.write(b"x")
    code, said = check(cli, copied)
    assert (code, "is not the checkpoint that was evaluated" in said) == (1, True)


def test_images_that_an_attack_missed_are_found(
    cli: Cli, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Square with 20 queries leaves images that a gradient finds."""
    shorten(monkeypatch)
    checkpoint = trained(tmp_path / "at.pt", tiny_folder)
    keys: dict[str, Any] = {"data": str(tiny_folder), "epsilon": "60/255", "device": "cpu"}
    config = EvaluationConfig(["square"], save_adversarial=str(tmp_path / "hits.st"), **keys)
    evaluation.run(checkpoint, config, Reporter(), out=tmp_path / "report.json")
    code, said = check(cli, tmp_path)
    assert code == 0, said
    code, said = check(cli, tmp_path, "--images", "all")
    assert code == 1
    every = said.count("found an adversarial image that the report missed")
    assert every > 0
    code, said = check(cli, tmp_path, "--images", "1", "--seed", "3")
    assert said.count("found an adversarial image that the report missed") <= 1


@pytest.mark.parametrize("given", ["-1", "many", "1.5", ""])
def test_a_number_of_images_is_needed(given: str, cli: Cli, copied: Path) -> None:
    done = cli("verify", str(copied / "report.json"), f"--images={given}")
    assert (done.code, "--images: a whole number from 0 on, or 'all'" in done.err) == (2, True)


def test_what_cannot_be_verified_is_refused(cli: Cli, copied: Path) -> None:
    done = cli("verify", str(copied / "nothing.json"))
    assert (done.code, "there is no such report" in done.err) == (2, True)
    (copied / "hits.st").rename(copied / "moved.st")
    code, said = check(cli, copied)
    assert (code, "hits.st: cannot be read" in said) == (2, True)
    told(copied, lambda entry: entry.pop("options"))
    code, said = check(cli, copied)
    assert (code, "is not whole: options: Field required" in said) == (2, True)
    told(copied, lambda entry: entry.pop("adversarial"))
    code, said = check(cli, copied)
    assert (code, "no result in it has adversarial images" in said) == (2, True)
    (copied / "report.json").write_text("{")
    assert check(cli, copied)[0] == 2
