"""Saved adversarial images: the file, after kills, with many processes, on a full disk; accuracies by class."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from engine.attacks.auto.search import Ball
from engine.attacks.autoattack import FLAGS, raised
from engine.common import files
from engine.common.console import Reporter
from engine.common.stopping import RunFailed
from engine.evaluation import evaluate_checkpoint as evaluation
from engine.evaluation import reports, whole_set
from engine.evaluation.evaluate_checkpoint import EvaluationConfig
from engine.evaluation.files import adversarial
from engine.evaluation.files.hits import judged
from engine.evaluation.measure import evaluate
from engine.evaluation.partial_results import PartialResults
from engine.evaluation.reports import read
from engine.evaluation.results import Result, per_class
from engine.models.weights import load_model
from engine.system.distributed import World
from tests.conftest import Cli
from tests.evaluation.saved import EPSILON, shorten, trained
from tests.processes import together


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("network") / "at.pt", tiny_folder)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)


def wanted(
    folder: Path, file: Path | None, attacks: tuple[str, ...] = ("natural", "aa", "square")
) -> EvaluationConfig:
    saved = None if file is None else str(file)
    keys: dict[str, Any] = {"data": str(folder), "epsilon": EPSILON, "device": "cpu", "batch_size": 5}
    return EvaluationConfig(attacks, save_adversarial=saved, **keys)


def measure(
    checkpoint: Path, folder: Path, root: Path, world: World | None = None, name: str = "hits.safetensors"
) -> list[dict[str, Any]]:
    """The entries of a report, whose images are saved beside it."""
    evaluation.run(checkpoint, wanted(folder, root / name), Reporter(), out=root / "report.json", world=world)
    return read(root / "report.json")


def images_of(root: Path, name: str = "hits.safetensors") -> dict[str, torch.Tensor]:
    return load_file(root / name)


def test_the_file_holds_all_that_broke_and_each_is_adversarial(
    checkpoint: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """By the network called directly, in float64 distances, on pixels that are read from the files."""
    entries = {entry["attack"]: entry for entry in measure(checkpoint, tiny_folder, tmp_path)}
    saved, network = images_of(tmp_path), load_model(checkpoint).module
    data = evaluation.opened(checkpoint, wanted(tiny_folder, None), []).images.test
    x_nat = torch.as_tensor(np.asarray(data.images))[saved["samples"]].permute(0, 3, 1, 2)
    assert torch.equal(saved["labels"], data.labels[saved["samples"]])
    assert saved["images"].dtype == torch.float32
    away = (saved["images"].double() - (x_nat.float() / 255).double()).abs()
    assert away.max() <= 24 / 255
    assert 0 <= saved["images"].min() <= saved["images"].max() <= 1
    with torch.no_grad():
        predicted = network(saved["images"]).argmax(1)
        rounded = (saved["images"] * 255).round()
        still = (network(rounded / 255).argmax(1) != saved["labels"]) & (
            (rounded - x_nat).abs().flatten(1).amax(1) <= 24
        )
    assert torch.equal(predicted, saved["predicted"])
    assert (predicted != saved["labels"]).all()
    assert "adversarial" not in entries["natural"]
    digest = hashlib.sha256((tmp_path / "hits.safetensors").read_bytes()).hexdigest()
    for number, attack in enumerate(("aa", "square")):
        mine, entry = saved["result"] == number, entries[attack]
        broke = {part: each["images"] - each["stood"] for part, each in entry["details"].items()}
        counts = saved["part"][mine].bincount(minlength=len(broke)).tolist()
        assert counts == [0, *list(broke.values())[1:]]
        assert entry["adversarial"] == {
            "file": "hits.safetensors", "sha256": digest, "images": sum(counts),
            "still_adversarial_as_uint8": int(still[mine].sum()),
        }  # fmt: skip
        fell = saved[f"fell.{number}"]
        assert (fell < 0).sum() == entry["correct"] > 0
        assert torch.equal(fell[saved["samples"][mine]].long(), saved["part"][mine])
        assert (saved["rank"][mine] >= 2).all()
    with safe_open(tmp_path / "hits.safetensors", "pt") as file:
        told = json.loads(file.metadata()["engine_adversarial"])
    assert told["checkpoint"] == entries["aa"]["checkpoint"]["sha256"]
    assert [each["parts"] for each in told["results"]] == [
        list(entries[name]["parts"]) for name in ("aa", "square")
    ]
    assert [each["parameters"] for each in told["results"]] == [entries[n]["parameters"] for n in ("aa", "square")]
    assert (told["epsilon"], told["threat_model"]) == (24 / 255, "Linf")


def test_what_is_rounded_is_judged_in_whole_levels() -> None:
    """A step of exactly epsilon is inside, though float32 pixels may be a little farther apart."""
    last = torch.nn.Linear(3, 2)
    with torch.no_grad():
        last.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 0]]))
        last.bias.copy_(torch.tensor([0.0, 0.5]))
    network = torch.nn.Sequential(torch.nn.Flatten(), last)
    for level in range(0, 240, 7):
        x_nat = torch.full((3, 3, 1, 1), level / 255)
        x_adv = torch.stack([torch.full((3, 1, 1), (level + away) / 255) for away in (8, 8.4, 8.6)])
        labels = (~(network(x_nat).argmax(1) > 0)).long()  # every class is the wrong one
        judgement = judged(network, x_adv, x_nat, labels, Ball("Linf", 8 / 255))
        misclassified = network(x_adv).argmax(1) != labels
        assert judgement.hit_rounded_R.tolist() == [bool(misclassified[0]), bool(misclassified[1]), False]


class Killed(BaseException):
    pass


def killed(*given: object) -> None:
    raise Killed


def test_a_killed_evaluation_goes_on_with_its_images(
    checkpoint: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the images and their note, and with a record that was cut off."""
    monkeypatch.setattr(whole_set, "_SECONDS_BETWEEN_NOTES", -1.0)
    kept = PartialResults.add_note
    (whole := tmp_path / "whole").mkdir()
    expected = measure(checkpoint, tiny_folder, whole)
    for moment in range(1, 4):
        (root := tmp_path / str(moment)).mkdir()
        calls = 0

        def add_note(self: PartialResults, attack: str, note: Any, moment: int = moment) -> None:
            nonlocal calls
            calls += "0" in note.get("stood", "") and note["part"] > 0
            if calls == moment:
                raise Killed
            kept(self, attack, note)

        with monkeypatch.context() as patch:
            patch.setattr(PartialResults, "add_note", add_note)
            with pytest.raises(Killed):
                measure(checkpoint, tiny_folder, root)
        assert not (root / "hits.safetensors").exists()
        (records,) = root.glob("report.partial/*/*.tensors")
        records.write_bytes(records.read_bytes()[:-5])
        found = measure(checkpoint, tiny_folder, root)
        assert (root / "hits.safetensors").read_bytes() == (whole / "hits.safetensors").read_bytes()
        assert not (root / "report.partial").exists()
        for entry, other in zip(found, expected, strict=True):
            assert entry["correct"] == other["correct"]
            assert entry.get("adversarial") == other.get("adversarial")


def test_a_note_whose_image_is_lost_does_not_count(
    checkpoint: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole := tmp_path / "whole").mkdir()
    measure(checkpoint, tiny_folder, whole)
    (root := tmp_path / "again").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(adversarial, "write", killed)
        with pytest.raises(Killed):
            measure(checkpoint, tiny_folder, root)
    files = sorted(root.glob("report.partial/*/*.tensors"))
    assert len(files) == 2
    for file in files:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1  # of the last record alone
        file.write_bytes(content)
    measure(checkpoint, tiny_folder, root)
    assert (root / "hits.safetensors").read_bytes() == (whole / "hits.safetensors").read_bytes()


def test_notes_without_images_serve_no_evaluation_that_saves_them(
    checkpoint: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(reports, "add", killed)
        with pytest.raises(Killed):
            evaluation.run(checkpoint, wanted(tiny_folder, None), Reporter(), out=tmp_path / "report.json")
    before = {path.name for path in (tmp_path / "report.partial").iterdir()}
    entries = measure(checkpoint, tiny_folder, tmp_path)
    assert entries[1]["adversarial"]["images"] > 0
    assert {path.name for path in (tmp_path / "report.partial").iterdir()} == before


def save_here(world: World, checkpoint: str, folder: str, out: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        measure(Path(checkpoint), Path(folder), Path(out), world)


def test_two_processes_write_the_same_file(checkpoint: Path, tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    measure(checkpoint, tiny_folder, tmp_path / "one")
    together(2, save_here, str(checkpoint), str(tiny_folder), str(tmp_path / "two"))
    one, two = ((tmp_path / name / "hits.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    entries = read(tmp_path / "two" / "report.json")
    assert entries[1]["adversarial"] == read(tmp_path / "one" / "report.json")[1]["adversarial"]


def test_a_full_disk_keeps_what_was_measured(
    checkpoint: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(adversarial, "create", full)
        with pytest.raises(RunFailed, match=r"No space left on device; what was measured is kept"):
            measure(checkpoint, tiny_folder, tmp_path)
        assert not read(tmp_path / "report.json")
        patch.undo()
        shorten(patch)
        patch.setattr(reports, "write_json", full)
        with pytest.raises(RunFailed, match="what was measured is kept"):
            measure(checkpoint, tiny_folder, tmp_path)
        assert not (tmp_path / "hits.safetensors").exists()  # it would be in the way of the same command
        patch.undo()
        shorten(patch)
        patch.setattr(whole_set._Share, "_add", lambda *given: pytest.fail("an image is attacked again"))
        measure(checkpoint, tiny_folder, tmp_path)
    assert (tmp_path / "hits.safetensors").exists()


@pytest.mark.parametrize(
    ("attacks", "told"),
    [
        ("natural,pgd20,aa", "the images of pgd20 are not kept; those that are: apgd-ce, .*square, aa"),
        ("natural", "no attack is asked for that finds images; those that do: apgd-ce"),
    ],
)
def test_attacks_that_give_no_images_are_refused(
    attacks: str, told: str, cli: Cli, checkpoint: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    arguments = ["--attacks", attacks, "--data", str(tiny_folder), "--out", str(tmp_path)]
    done = cli("eval", str(checkpoint), *arguments, "--save-adversarial", str(tmp_path / "x.safetensors"))
    assert done.code == 2

    assert re.search(told, done.err)
    assert not list(tmp_path.iterdir())


def test_no_file_is_overwritten(
    cli: Cli, checkpoint: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_text("mine")
    arguments = ["--attacks", "aa", "--data", str(tiny_folder), "--save-adversarial", str(file)]
    done = cli("eval", str(checkpoint), *arguments)
    assert (done.code, done.err) == (
        2, f"engine: --save-adversarial: {file} exists; remove it, or choose another name\n"
    )  # fmt: skip
    done = cli("eval", str(checkpoint), str(checkpoint), *arguments)
    assert "--save-adversarial: one checkpoint is expected, got 2" in done.err
    file.unlink()

    def meanwhile(path: Path, content: bytes) -> None:
        path.write_text("theirs")
        files.create(path, content)

    monkeypatch.setattr(adversarial, "create", meanwhile)
    with pytest.raises(RunFailed, match="has come into being meanwhile; what was measured is kept"):
        measure(checkpoint, tiny_folder, tmp_path, name=file.name)
    assert file.read_text() == "theirs"


def test_images_are_kept_beside_notes_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
    data = torch.rand(5, 3, 4, 4), torch.arange(5)
    with pytest.raises(ValueError, match="keeps_images: the images are kept beside the notes of partial"):
        evaluate(model, data, ["square"], keeps_images=True)


def test_accuracies_by_class_by_hand() -> None:
    labels = torch.tensor([2, 0, 1, 2, 0, 2, 4])
    result = Result("x", 3, 6, "", 0.0, samples=torch.tensor([0, 1, 3, 4, 5, 6]))
    result = Result(**{**vars(result), "verdicts": torch.tensor([True, False, True, False, False, True])})
    names = ("a", "b", "c", "d", "e")
    assert per_class(result, labels, names) == {"a": (0.0, 2), "c": (2 / 3, 3), "e": (1.0, 1)}
    assert per_class(result, labels, None) == {"0": (0.0, 2), "2": (2 / 3, 3), "4": (1.0, 1)}


def test_reports_tell_classes_and_flags(checkpoint: Path, tiny_folder: Path, tmp_path: Path) -> None:
    evaluation.run(
        checkpoint, wanted(tiny_folder, None, ("natural", "pgd10", "aa")), Reporter(), out=tmp_path / "r.json"
    )
    for entry in read(tmp_path / "r.json"):
        assert entry["per_class"].keys() == {"circle", "square", "triangle"}
        assert all(each["n"] == 6 for each in entry["per_class"].values())
        of_all = sum(each["accuracy"] * each["n"] for each in entry["per_class"].values())
        assert of_all == pytest.approx(entry["correct"])
        assert entry["flags"] == []


def test_flags_are_told_by_name() -> None:
    class Random(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.rand(len(x), 5, dtype=x.dtype)

    data = torch.rand(5, 3, 4, 4), torch.arange(5)
    result = evaluate(Random(), data, ["square"], device="cpu")["square"]
    assert "random" in result.flags
    assert set(result.as_dict()["flags"]) <= FLAGS.keys()
    assert raised(0b1010) == ("probabilities", "zero_gradients")
