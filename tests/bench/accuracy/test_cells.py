"""Cells of bench.accuracy: a teacher and its student, trained, attacked, read again, and measured once more."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.lib.accuracy import cells
from bench.lib.accuracy import protocol as protocols
from bench.lib.accuracy.cells import NO_SEED, SIZES, MeasuredCell, ResultFolder
from bench.lib.accuracy.protocol import AccuracyProtocol, Cell
from engine.common import yaml_text
from engine.evaluation.measure import evaluate
from engine.models.weights import load_model, weights_sha256
from engine.pipelines import datasets
from engine.runs.run_directory import RunDir

YAML: dict[str, Any] = {
    "title": "small",
    "threads": 1,
    "seeds": [3],
    "common": {
        "dataset": "digits",
        "model": "resnet8",
        "epochs": 2,
        "limit_train": 60,
        "limit_test": 40,
        "batch_size": 20,
        "attack": {"num_steps": 1},
        "eval": {"final": [], "attack": "fgsm", "probe_size": 10},
    },
    "teachers": {"teacher": {"method": "at", "seed": 100, "epochs": 1}},
    "tables": {
        "methods": {
            "title": "methods",
            "baseline": "ard",
            "attacks": {"natural": 30, "pgd20": 20},
            "rows": {"ard": {"method": "ard"}},
        }
    },
}


@dataclasses.dataclass(frozen=True)
class Measured:
    protocol: AccuracyProtocol
    results: ResultFolder
    work: Path
    path: str

    def cell(self) -> Cell:
        return protocols.cell_of(self.protocol, "ard", 3, self.results.teachers(["teacher"]))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder, threads = tmp_path_factory.mktemp("accuracy"), torch.get_num_threads()
    path, results, work = folder / "small.yaml", ResultFolder(folder / "results"), folder / "work"
    path.write_text(yaml_text.write(YAML))
    try:
        for row, seed in (("teacher", NO_SEED), ("ard", "3")):
            arguments = [str(path), SIZES[False], str(results.folder), str(work), "cpu", row, seed]
            assert cells.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    return Measured(protocols.read(str(path)), results, work, str(path))


def test_the_accuracies_are_those_of_the_best_epoch_s_student(measured: Measured) -> None:
    found = measured.results.measured(measured.cell())
    assert found is not None
    run = RunDir(measured.work / f"ard-seed3-{found.settings}")
    student = load_model(run.best).module
    images = datasets.load("digits").test
    for attack, n in (("natural", 30), ("pgd20", 20)):
        (expected,) = evaluate(student, images, [attack], limit=n).values()
        assert (found.accuracies[attack].n, found.accuracies[attack].correct) == (n, expected.correct)
        assert found.accuracies[attack].bits().tolist() == expected.verdicts.tolist()
        assert found.accuracies[attack].share == expected.accuracy
    assert found.weights == weights_sha256(student)
    assert found.epochs == 2
    summary = run.read_summary()
    assert summary is not None
    assert found.epoch == summary["best"]["epoch"]


def test_the_log_is_the_run_s(measured: Measured) -> None:
    run = RunDir(next(measured.work.glob("ard-seed3-*")))
    log = measured.results.log("ard-seed3").read_text()
    assert [json.loads(line) for line in log.splitlines()] == list(run.rows())
    found = measured.results.read("ard-seed3")
    assert found is not None
    seconds = [row["seconds"] for row in run.rows() if row["event"] == "epoch"]
    assert found.seconds == pytest.approx(sum(seconds))
    assert found.epoch_seconds == pytest.approx(np.median(seconds))


def test_the_student_learned_from_the_teacher_that_is_kept(measured: Measured) -> None:
    kept = load_model(measured.results.teacher("teacher"))
    run = RunDir(next(measured.work.glob("teacher-*")))
    assert weights_sha256(kept.module) == weights_sha256(load_model(run.best).module)
    student = measured.results.read("ard-seed3")
    assert student is not None
    assert student.teachers == {"teacher": weights_sha256(kept.module)}
    config = yaml_text.read(RunDir(next(measured.work.glob("ard-seed3-*"))).config.read_text())
    assert config["teacher"]["checkpoint"] == str(measured.results.teacher("teacher"))
    teacher = measured.results.read("teacher")
    assert teacher is not None
    assert (teacher.seed, teacher.epochs, set(teacher.accuracies)) == (None, 1, {"natural", "pgd20"})


def test_a_cell_that_is_there_is_known_and_one_of_other_settings_refused(measured: Measured) -> None:
    cell, results = measured.cell(), measured.results
    assert results.measured(cell) is not None
    assert results.measured(dataclasses.replace(cell, seed=4)) is None
    assert results.measured(dataclasses.replace(cell, attacks={"natural": 31})) is None
    assert results.measured(dataclasses.replace(cell, attacks={"fgsm": 1})) is None
    other = dataclasses.replace(
        cell, keys={**cell.keys, "lr": 0.7, "attack": {**cell.keys["attack"], "bn": "batch"}}
    )
    with pytest.raises(ValueError, match=r"ard-seed3\.json is of other settings, which differ in lr, attack\.bn;"):
        results.measured(other)
    with pytest.raises(ValueError, match=r"differ in threads;"):  # it would be overwritten
        results.measured(dataclasses.replace(cell, attacks={"fgsm": 1}, threads=9))
    with pytest.raises(ValueError, match=r"differ in teachers, threads;"):
        results.measured(dataclasses.replace(cell, teachers={"teacher": "0"}, threads=9))


def test_a_key_that_there_was_not_yet_has_its_default(measured: Measured, tmp_path: Path) -> None:
    """Settings that came after a cell was measured change nothing of it, unless they are turned on."""
    cell, content = measured.cell(), json.loads(measured.results.cell("ard-seed3").read_bytes())
    del content["keys"]["attack"]["steps_warmup"]
    results = copied(measured, tmp_path, keys=content["keys"])
    assert results.measured(cell) is not None
    turned_on = {**cell.keys, "attack": {**cell.keys["attack"], "steps_warmup": 0.5}}
    with pytest.raises(ValueError, match=r"differ in attack\.steps_warmup;"):
        results.measured(dataclasses.replace(cell, keys=turned_on))


def copied(measured: Measured, folder: Path, **changes: Any) -> ResultFolder:
    """Results with the cell alone, whose file has these changes."""
    results = ResultFolder(folder)
    content = json.loads(measured.results.cell("ard-seed3").read_bytes())
    for path, source in ((results.cell("ard-seed3"), json.dumps(content | changes)),):
        path.parent.mkdir(parents=True)
        path.write_text(source)
    return results


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": 3}, "weights"),
        ({"colour": "red"}, "colour"),
        ({"seconds": float("nan")}, "seconds"),
        ({"accuracies": {"natural": {"n": 2, "correct": 1, "seconds": 1.0, "images": "a", "verdicts": "AA=="}}},
         "natural: verdicts and their number differ"),
        ({"accuracies": {"natural": {"n": 2, "correct": 1, "seconds": 1.0, "images": "a", "verdicts": "?"}}}, ""),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(
    measured: Measured, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^[^\n]*ard-seed3\.json: [^\n]*{message}[^\n]*; move it away$"):
        copied(measured, tmp_path, **changes).read("ard-seed3")


def test_a_file_that_is_no_json_is_refused(measured: Measured, tmp_path: Path) -> None:
    results = copied(measured, tmp_path)
    results.cell("ard-seed3").write_text("{")
    with pytest.raises(ValueError, match=r"^cannot read [^\n]*ard-seed3\.json"):
        results.read("ard-seed3")


def test_cells_of_other_images_are_not_mixed(
    measured: Measured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = copied(measured, tmp_path / "results", data="0" * 64)
    arguments = [measured.path, SIZES[False], str(results.folder), str(measured.work), "cpu", "teacher", NO_SEED]
    threads = torch.get_num_threads()
    try:
        assert cells.main(arguments) == 2
    finally:
        torch.set_num_threads(threads)
    error = capsys.readouterr().err
    assert error == f"data: the images are not those of {results.cell('ard-seed3')}, which cannot be compared\n"
    assert not results.teacher("teacher").exists()


def test_what_is_compared_of_a_cell_that_is_measured_once_more(measured: Measured, tmp_path: Path) -> None:
    found = measured.results.read("ard-seed3")
    assert found is not None
    log = measured.results.log("ard-seed3")

    def differences(other: MeasuredCell, other_log: Path = log) -> list[str]:
        assert found is not None
        return cells.differences((found, log), (other, other_log))

    assert differences(found.model_copy(update={"seconds": 9.0, "peak_memory": 1, "facts": {}})) == []
    assert differences(found.model_copy(update={"weights": "0", "epoch": 7})) == ["weights", "epoch"]
    fewer = found.accuracies["natural"].model_copy(update={"verdicts": "AAAAAA=="})
    accuracies = {**found.accuracies, "natural": fewer}
    assert differences(found.model_copy(update={"accuracies": accuracies})) == ["natural"]
    assert differences(found.model_copy(update={"accuracies": {"natural": found.accuracies["natural"]}})) == [
        "pgd20"
    ]
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for change, expected in (({"seconds": 99.0, "images_per_second": 1.0}, []), ({"loss": 9.0}, ["log"])):
        changed = tmp_path / "log.jsonl"
        changed.write_text("".join(json.dumps(row | change) + "\n" for row in rows))
        assert differences(found, changed) == expected
