"""A flat folder of classes, trained on and evaluated: the held-out images are named, and found again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from engine.evaluation import evaluate_checkpoint
from engine.evaluation.evaluate_checkpoint import EvaluationConfig
from engine.pipelines import datasets
from engine.pipelines.reading import decoding, encoded
from engine.pipelines.splits import Request
from engine.runs import lifecycle
from tests.conftest import CLASSES, Tiny, write_checkpoint
from tests.runs.helpers import Listener


@pytest.fixture
def flat(tiny: Tiny, tmp_path: Path) -> Path:
    """The 14 training images of each class, without train/ around them."""
    shutil.copytree(tiny.folder / "train", tmp_path / "flat")
    return tmp_path / "flat"


def evaluated(checkpoint: Path, **keys: Any) -> tuple[int, Listener]:
    """Number of images, and what was said."""
    said = Listener()
    report = evaluate_checkpoint.run(checkpoint, EvaluationConfig(["natural"], device="cpu", **keys), said)
    return report.results["natural"]["n"], said


def test_a_run_names_its_test_images_and_its_evaluation_takes_the_same(
    flat: Path, tiny: Tiny, tmp_path: Path
) -> None:
    said = Listener()
    run = lifecycle.train(tiny.config(method="at", data=str(flat), epochs=1, out=str(tmp_path / "run")), said)
    named = json.loads((run.path / "test_split.json").read_text())["test"]
    dataset = datasets.find("folder", str(flat), Request(resident="never"))
    assert isinstance(dataset.test, encoded.EncodedImages)
    assert named == list(dataset.test.names)
    assert [sum(name.startswith(each) for name in named) for each in CLASSES] == [3, 3, 3]
    assert any(
        line.startswith(f"Note: {flat} has no test images of its own: 9 of its 42 images") for line in said.lines
    )
    assert run.summary["test_of_last"]["natural"]["n"] == 9

    n, said = evaluated(run.path / "last.pt")
    assert (n, [line for line in said.lines if "Warning" in line]) == (9, [])
    trained = run.summary["test_of_last"]["natural"]["accuracy"]
    report = evaluate_checkpoint.run(run.path / "last.pt", EvaluationConfig(["natural"], device="cpu"), Listener())
    assert report.results["natural"]["accuracy"] == trained

    chosen = [Path(name) for name in dataset.test.names]
    for name in chosen[:2]:  # others take their place
        (flat / name).unlink()
    _, said = evaluated(run.path / "last.pt")
    assert any("test images were no test images of the training" in line for line in said.lines)


def test_a_network_that_was_not_trained_on_a_folder_is_evaluated_on_all_of_it(
    flat: Path, tiny: Tiny, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign.pt"
    torch.save(torch.load(tiny.teacher, weights_only=True)["student"], foreign)
    n, said = evaluated(foreign, model="resnet8", dataset="folder", data=str(flat))
    assert n == 42
    assert f"Note: the classes lie in {flat} itself: all of its 42 images are test images" in said.lines


@pytest.mark.parametrize(("name", "count"), [("val", 42), ("mine", 9)])
def test_of_another_folder_its_name_tells(name: str, count: int, flat: Path, tmp_path: Path) -> None:
    own = write_checkpoint(tmp_path / "own.pt", 0)
    flat.rename(tmp_path / name)
    assert evaluated(own, data=str(tmp_path / name))[0] == count


def test_a_limit_of_autoattack_reads_no_other_images(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Mock(wraps=decoding.pixels)
    monkeypatch.setattr("engine.pipelines.reading.encoded.pixels", decode)
    told = Mock(side_effect=lambda *arguments, **keys: pytest.fail(str(decode.call_count)))
    monkeypatch.setattr(evaluate_checkpoint, "evaluate", told)
    own = write_checkpoint(tmp_path / "own.pt", 0, 10)
    folder = tmp_path / "ten"
    for part in ("train", "test"):
        for number in range(10):
            shutil.copytree(tiny.folder / "test" / CLASSES[0], folder / part / str(number))
    keys: dict[str, Any] = {"device": "cpu", "data": str(folder), "limit_aa": 20}
    with pytest.raises(pytest.fail.Exception, match="^20$"):
        evaluate_checkpoint.run(own, EvaluationConfig(["aa"], **keys), Listener())
    decode.reset_mock()
    with pytest.raises(pytest.fail.Exception, match="^60$"):
        evaluate_checkpoint.run(own, EvaluationConfig(["natural", "aa"], **keys), Listener())
