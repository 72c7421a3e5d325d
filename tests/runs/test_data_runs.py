"""Runs over every pipeline: the same numbers of the same pixels, resumed to the bit, and bad data told of."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine import config
from engine.commands import data
from engine.common.console import Reporter
from engine.common.stopping import Interrupted
from engine.evaluation.measure import evaluate
from engine.evaluation.reports import read
from engine.pipelines import datasets, ffcv
from engine.pipelines.dali import check_installed as check_dali
from engine.pipelines.ffcv.beton_writer import BetonFormat
from engine.pipelines.reading.encoded import EncodedImages
from engine.pipelines.splits import Request
from engine.runs import assemble, lifecycle, teachers
from engine.system import precision
from tests.commands.test_bad_input import assert_user_error
from tests.conftest import CLASSES
from tests.pipelines.photographs import encode, smooth
from tests.runs.test_resume import StopAt, assert_same_run, rows_of

Keys = dict[str, Any]


def require(pipeline: str) -> None:
    """Skip, visibly, where the library of a pipeline is not installed."""
    checks = {"ffcv": ffcv.check_installed, "dali": check_dali}
    try:
        if pipeline in checks:
            checks[pipeline]()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of JPEG files of many sizes, 7 for training and 3 for testing of each of three classes."""
    root = tmp_path_factory.mktemp("photographs")
    for split, count in (("train", 7), ("test", 3)):
        for index, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                picture = smooth(30 * index + number, 20 + 7 * number, 44 - 5 * number)
                (root / split / name / f"{number}.jpg").write_bytes(encode(picture))
    return root


@pytest.fixture
def beton(photographs: Path, tmp_path: Path) -> Path:
    """The same in a .beton file."""
    require("ffcv")
    return write_beton(photographs, tmp_path / "photographs.beton")


def write_beton(folder: Path, path: Path, **options: Any) -> Path:
    data.write("folder", str(folder), path, BetonFormat("jpeg"), Reporter(), **options)
    return path


def photograph_keys(place: Path, pipeline: str, **keys: Any) -> Keys:
    """Keys of a run over views of 16 x 16 pixels of 21 photographs: 6 steps an epoch."""
    return {
        "data": str(place),
        "pipeline": pipeline,
        "image_size": 16,
        "batch_size": 4,
        "eval": {"final": ["natural", "pgd10"], "probe_size": 6},
        **keys,
    }


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("pipeline", ["ffcv", "dali", "image"])
def test_a_run_has_the_same_bits_whichever_pipeline_loads_its_images(
    pipeline: str, tiny: Any, tmp_path: Path
) -> None:
    require(pipeline)
    runs = {
        kind: lifecycle.train(tiny.config(method="iad1", pipeline=kind, out=str(tmp_path / kind)))
        for kind in ("tensor", pipeline)
    }
    students = [torch.load(run.path / "last.pt", weights_only=True)["student"] for run in runs.values()]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])
    for kind, run in runs.items():
        assert json.loads((run.path / "provenance.json").read_text())["pipeline"] == kind


@pytest.mark.parametrize("pipeline", ["ffcv", "dali", "image"])
def test_views_of_photographs_are_trained_on_and_resumed_to_the_bit(
    pipeline: str, photographs: Path, tiny: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    require(pipeline)
    place = request.getfixturevalue("beton") if pipeline == "ffcv" else photographs
    keys = photograph_keys(place, pipeline, method="iad2", order="quasi-random", workers=1)
    whole = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "whole")))
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(**keys, out=str(tmp_path / "parts")), StopAt(8))
    assert_same_run(whole.path, lifecycle.resume(tmp_path / "parts").path)
    assert whole.summary["test_of_last"]["natural"]["n"] == 9
    assert whole.summary["skipped_images"] == {"train": 0, "test": 0}


def test_augmented_images_are_trained_on_and_resumed_to_the_bit(
    photographs: Path, tiny: Any, tmp_path: Path
) -> None:
    keys = photograph_keys(photographs, "auto", method="at", augmentation="trivial-augment,colour-jitter")
    whole = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "whole")))
    assert json.loads((whole.path / "provenance.json").read_text())["pipeline"] == "image"
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(**keys, out=str(tmp_path / "parts")), StopAt(8))
    assert_same_run(whole.path, lifecycle.resume(tmp_path / "parts").path)
    plain = lifecycle.train(tiny.config(**keys | {"augmentation": []}, out=str(tmp_path / "plain")))
    losses = [[row["loss"] for row in rows_of(run.path)] for run in (whole, plain)]
    assert losses[0] != losses[1]


def test_teachers_are_trained_on_images_augmented_alike() -> None:
    given = {"method": "ard", "augmentation": "trivial-augment", "colour_jitter": {"hue": 0.2}}
    student = config.load(given)
    teacher = teachers.run_config(student, "teacher")
    assert (teacher.augmentation, teacher.colour_jitter) == (student.augmentation, student.colour_jitter)


def test_what_auto_chose_holds_for_the_whole_run(
    photographs: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("dali")
    keys = photograph_keys(photographs, "auto", method="at")
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(**keys, out=str(tmp_path / "run")), StopAt(3))
    monkeypatch.setattr("engine.pipelines.selection.PIPELINE_KINDS", ("none of these is asked",))
    run = lifecycle.resume(tmp_path / "run")
    assert json.loads((run.path / "provenance.json").read_text())["pipeline"] == "dali"


def test_images_that_stay_in_files_are_evaluated_as_those_in_memory(tiny: Any) -> None:
    asked = [Request(resident=resident) for resident in ("never", "always")]
    in_files, in_memory = (datasets.find("folder", str(tiny.folder), each).test for each in asked)
    assert isinstance(in_files, EncodedImages)
    model = assemble.build_student(
        config.load(tiny.config(method="at")),
        datasets.find("folder", str(tiny.folder), asked[0]),
        precision.Precision(torch.device("cpu"), torch.float32),
    )
    results = [evaluate(model, images, ["natural", "pgd20"], batch_size=7) for images in (in_files, in_memory)]
    for name in ("natural", "pgd20"):
        assert results[0][name].correct == results[1][name].correct
        assert results[0][name].n == 18
    for sample_B in (torch.tensor([3]), torch.tensor([17, 0, 5])):
        assert torch.equal(in_files.images[sample_B], in_memory.images[sample_B])


def test_a_checkpoint_is_evaluated_on_views_of_the_size_it_was_trained_on(
    photographs: Path, tiny: Any, tmp_path: Path, cli: Any
) -> None:
    require("dali")
    run = lifecycle.train(
        tiny.config(**photograph_keys(photographs, "dali", method="at"), out=str(tmp_path / "run"))
    )
    found = cli("eval", str(run.path), "--attacks", "natural,pgd10")
    assert found.code == 0, found.err
    for result in read(run.path / "best.pt.eval.json"):
        assert result["correct"] == run.summary["test_of_best"][result["attack"]]["correct"]
        assert result["skipped_images"] == 0


# ---------------------------------------------------------------- engine data


def test_a_data_set_is_written_and_told_of(photographs: Path, tmp_path: Path, cli: Any) -> None:
    require("ffcv")
    path = tmp_path / "sub" / "photographs.beton"
    written = cli(
        "data", "write", "--dataset", "folder", "--data", str(photographs), "--out", str(path),
        "--format", "jpeg", "--max-resolution", "40",
    )  # fmt: skip
    assert written.code == 0, written.err
    assert "train: 21 images from image folder" in written.out
    assert f"Written: {path}, " in written.out
    told = cli("data", "info", str(path))
    assert told.code == 0, told.err
    lines = told.out.splitlines()
    assert lines[0].startswith(f"{path}: 30 images, ")
    assert lines[1] == "fields: image (rgb image), label (int), class_name (bytes), split (int)"
    assert lines[2].startswith("images: 30 JPEG, 0 raw; 7 sizes, from 9x40 to ")
    table = [line.split() for line in lines if line.split()[:1] and line.split()[0] in CLASSES]
    assert table == [[name, str(label), "7", "3"] for label, name in enumerate(CLASSES)]


def test_limits_and_the_embedded_data_set(tmp_path: Path, cli: Any) -> None:
    require("ffcv")
    path = tmp_path / "digits.beton"
    written = cli(
        "data", "write", "--dataset", "digits", "--out", str(path), "--limit-train", "20", "--limit-test", "10"
    )
    assert written.code == 0, written.err
    told = cli("data", "info", str(path)).out
    assert "images: 0 JPEG, 30 raw; 32x32 pixels" in told
    found = datasets.find("folder", str(path), Request())
    expected = datasets.load("digits", limit_train=20, limit_test=10)
    assert torch.equal(found.train.labels, expected.train.labels)
    assert torch.equal(found.test.images[torch.arange(10)], expected.test.images)
    assert found.class_names == expected.class_names


def test_a_beton_serves_as_its_data_set(real_images: Path, tmp_path: Path) -> None:
    require("ffcv")
    path = tmp_path / "cifar10.beton"
    data.write("cifar10", str(real_images), path, BetonFormat(), Reporter(), limit_train=50, limit_test=20)
    found = datasets.find("cifar10", str(path), Request())
    expected = datasets.load("cifar10", str(real_images), limit_train=50, limit_test=20)
    assert torch.equal(found.train.images[torch.arange(50)], expected.train.images)
    assert (found.class_names, found.flip, found.source) == (expected.class_names, True, str(path))
    with pytest.raises(ValueError, match=r"does not hold the classes of cifar100, but airplane, automobile"):
        datasets.find("cifar100", str(path), Request())


# ---------------------------------------------------------------- bad data


def damaged(content: bytes) -> bytes:
    return content[: len(content) // 2]


def test_an_unreadable_photograph_ends_a_run_with_its_name_or_is_skipped(
    photographs: Path, tiny: Any, tmp_path: Path, cli: Any
) -> None:
    require("dali")
    folder = tmp_path / "folder"
    shutil.copytree(photographs, folder)
    bad = folder / "train" / "square" / "4.jpg"
    bad.write_bytes(damaged(bad.read_bytes()))
    keys = photograph_keys(folder, "dali", method="at", epochs=1)
    failed = cli(*tiny.flags(**keys, out=str(tmp_path / "failed")))
    assert_user_error(failed, str(bad), "is not a readable image")
    skipped = cli(*tiny.flags(**keys, on_bad_image="skip", out=str(tmp_path / "skipped")))
    assert skipped.code == 0, skipped.err
    assert f"Skipped: 1 unreadable training images: {bad}" in skipped.out
    summary = json.loads((tmp_path / "skipped" / "summary.json").read_text())
    assert summary["skipped_images"] == {"train": 1, "test": 0}


def test_an_image_in_memory_is_skipped_too(tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(tiny.folder, folder)
    bad = folder / "test" / "circle" / "0003.png"
    bad.write_bytes(damaged(bad.read_bytes()))
    with pytest.raises(ValueError, match=f"^data: {re.escape(str(bad))} is not a readable image"):
        lifecycle.train(tiny.config(method="st", data=str(folder), out=str(tmp_path / "failed")))
    keys = {"method": "st", "epochs": 1, "data": str(folder), "on_bad_image": "skip"}
    run = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "skipped")))
    assert run.summary["skipped_images"] == {"train": 0, "test": 1}
    assert run.summary["test_of_last"]["natural"]["n"] == 17


def change_a_pixel(folder: Path) -> None:
    path = folder / "train" / "circle" / "0001.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a pixel": change_a_pixel,
    "an image less": lambda folder: (folder / "train" / "circle" / "0001.png").unlink(),
    "a name": lambda folder: (folder / "test" / "circle" / "0001.png").rename(
        folder / "test" / "circle" / "x.png"
    ),
    "a class": lambda folder: (folder / "train" / "circle" / "0001.png").rename(
        folder / "train" / "square" / "1.png"
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_data_in_files_that_changed_are_not_resumed_with(change: str, tiny: Any, tmp_path: Path, cli: Any) -> None:
    require("dali")
    folder = tmp_path / "folder"
    shutil.copytree(tiny.folder, folder)
    keys = {"method": "at", "data": str(folder), "pipeline": "dali"}
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(**keys, out=str(tmp_path / "run")), StopAt(2))
    CHANGES[change](folder)
    assert_user_error(cli("train", "--resume", str(tmp_path / "run")), str(folder), "changed since")


def test_a_beton_that_changed_is_not_resumed_with(
    beton: Path, photographs: Path, tiny: Any, tmp_path: Path
) -> None:
    keys = photograph_keys(beton, "ffcv", method="at")
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(**keys, out=str(tmp_path / "run")), StopAt(2))
    write_beton(photographs, beton, limit_train=20, force=True)
    with pytest.raises(ValueError, match=rf"{re.escape(str(beton))} changed since"):
        lifecycle.resume(tmp_path / "run")


BETON_FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut off": (lambda content: content[: len(content) - 7], "is no whole .beton file (it is cut off"),
    "half": (damaged, "is no whole .beton file (it is cut off"),
    "empty": (lambda content: b"", "is no whole .beton file (it ends at byte 0"),
    "another format": (lambda content: encode(smooth(0, 9, 9)), "is no whole .beton file (it begins with"),
}


@pytest.mark.parametrize("fault", BETON_FAULTS)
def test_a_file_that_is_no_whole_beton_is_one_line(
    fault: str, beton: Path, tiny: Any, tmp_path: Path, cli: Any
) -> None:
    make, words = BETON_FAULTS[fault]
    beton.write_bytes(make(beton.read_bytes()))
    keys = photograph_keys(beton, "ffcv", method="at")
    assert_user_error(cli(*tiny.flags(**keys, out=str(tmp_path / "run"))), str(beton), words)
    assert_user_error(cli("data", "info", str(beton)), str(beton), words)
    assert not (tmp_path / "run").exists()


def test_a_photograph_in_a_beton_that_cannot_be_decoded_ends_the_run(
    beton: Path, tiny: Any, tmp_path: Path, cli: Any
) -> None:
    content = bytearray(beton.read_bytes())
    at = content.index(b"\xff\xda", content.index(b"\xff\xd8"))  # the first image's scan
    content[at : at + 40] = bytes(40)
    beton.write_bytes(content)
    keys = photograph_keys(beton, "ffcv", method="at", eval={"probe_size": 3, "final": []})
    outcome = cli(*tiny.flags(**keys, out=str(tmp_path / "run")))
    assert_user_error(outcome, f"{beton}: image 0 is not a readable image")


WRONG: dict[str, tuple[list[str], list[str]]] = {
    # name: (arguments after `engine`, what the line must say)
    "pipeline": (["train", "--pipeline", "webdataset"], ["pipeline", "webdataset", "'dali'"]),
    "image size": (["train", "--image-size", "0"], ["image_size", "0"]),
    "image size of one size": (["train", "--dataset", "digits", "--image-size", "16"], ["image_size", "digits"]),
    "bad images": (["train", "--on-bad-image", "ignore"], ["on_bad_image", "ignore", "'skip'"]),
    "workers": (["train", "--workers", "0"], ["workers", "0"]),
    "order": (["train", "--set", "order=sorted"], ["order", "sorted", "quasi-random"]),
    "no name of a beton": (["data", "write", "--dataset", "digits", "--out", "x.zip"], ["--out", "x.zip"]),
    "format": (
        ["data", "write", "--dataset", "digits", "--out", "x.beton", "--format", "png"],
        ["format", "png", "jpeg"],
    ),
    "quality of raw": (
        ["data", "write", "--dataset", "digits", "--out", "x.beton", "--quality", "80"],
        ["quality", "raw", "80"],
    ),
    "data set": (["data", "write", "--dataset", "cifar11", "--out", "x.beton"], ["cifar11", "cifar10"]),
    "no beton": (["data", "info", "none.beton"], ["none.beton"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(case: str, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, words = WRONG[case]
    if case == "data set":
        require("ffcv")
    if arguments[0] == "train" and "--dataset" not in arguments:
        arguments = [*arguments, "--dataset", "digits"]
    assert_user_error(cli(*arguments), *words)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_file_that_exists_is_not_replaced_unasked(tmp_path: Path, cli: Any) -> None:
    require("ffcv")
    path = tmp_path / "x.beton"
    path.write_text("mine")
    arguments = ["data", "write", "--dataset", "digits", "--out", str(path), "--limit-train", "10"]
    assert_user_error(cli(*arguments), str(path), "exists", "--force")
    assert path.read_text() == "mine"
    assert cli(*arguments, "--force").code == 0
    assert path.stat().st_size > 1000
    assert [each.name for each in tmp_path.iterdir()] == ["x.beton"]


def test_tensor_is_refused_for_images_of_any_size(photographs: Path, tiny: Any, tmp_path: Path, cli: Any) -> None:
    keys = photograph_keys(photographs, "tensor", method="at")
    outcome = cli(*tiny.flags(**keys, out=str(tmp_path / "run")))
    assert_user_error(outcome, "pipeline: tensor holds images of one size", "image_size")


def test_ffcv_tells_how_to_make_a_beton_of_a_folder(
    photographs: Path, tiny: Any, tmp_path: Path, cli: Any
) -> None:
    require("ffcv")
    keys = photograph_keys(photographs, "ffcv", method="at")
    outcome = cli(*tiny.flags(**keys, out=str(tmp_path / "run")))
    assert_user_error(outcome, "pipeline: ffcv reads .beton files", str(photographs), "`engine data write`")


def test_the_first_image_may_be_the_one_to_skip(tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(tiny.folder, folder)
    first = folder / "train" / "circle" / "0000.png"
    first.write_bytes(b"nothing")
    for resident in ("always", "if it fits", "never"):
        found = datasets.find("folder", str(folder), Request(on_bad_image="skip", resident=resident))
        assert found.train.skipped == (str(first),)
        assert (len(found.train), len(found.test)) == (41, 18)
        with pytest.raises(ValueError, match=f"^data: {re.escape(str(first))} is not a readable image"):
            datasets.find("folder", str(folder), Request(resident=resident))
