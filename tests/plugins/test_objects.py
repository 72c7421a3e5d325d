"""Training from Python with objects in place of names: model, data set, teachers, callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import engine
from engine import models
from engine.common.tensor_files import read_tensors
from engine.pipelines.datasets import DATASETS
from engine.runs.run_directory import RunDir
from tests.conftest import Cli
from tests.plugins.test_register import Net, images_of

KEYS: dict[str, Any] = {
    "method": "ard", "epochs": 2, "batch_size": 8, "device": "cpu", "validation": 0, "log_every": 2,
    "attack": {"num_steps": 1}, "eval": {"final": ["natural"], "probe_size": 6},
}  # fmt: skip


def objects() -> dict[str, Any]:
    torch.manual_seed(5)
    (train, labels), (test, test_labels) = images_of(32), images_of(12, 1)
    data = TensorDataset(train / 255, labels), TensorDataset(test / 255, test_labels)
    return {"model": Net, "dataset": data, "teachers": {"teacher": Net(3)}}


def weights(path: Path) -> list[float]:
    state: dict[str, torch.Tensor] = read_tensors(path / "last.pt").value["student"]
    return torch.cat([value.flatten().double() for value in state.values()]).tolist()


def test_a_run_with_objects_goes_on_bit_by_bit_and_from_python_alone(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    whole = engine.train(
        KEYS, out=str(tmp_path / "whole"), **objects(), callbacks=[lambda row: rows.append(row["step"])]
    )
    assert rows == [row["step"] for row in RunDir(whole.path).rows()]

    class Enough(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["event"] == "step" and row["step"] == 6:
            raise Enough

    with pytest.raises(Enough):
        engine.train(KEYS, out=str(tmp_path / "part"), **objects(), callbacks=[stop])
    assert "python:Net" not in models.TABLE
    assert "python:TensorDataset" not in DATASETS
    begun = RunDir.existing(tmp_path / "part")[1]
    assert (begun.model, begun.dataset, begun.teacher.model) == (
        "python:Net",
        "python:TensorDataset",
        "python:Net",
    )

    told = cli("train", "--resume", str(tmp_path / "part"))
    assert told.code == 2
    assert "stands for an object that was given to engine.train" in told.err
    assert "engine.resume(PATH" in told.err
    for given, line in (
        ({"model": Net}, "dataset: 'python:TensorDataset' stands for an object|teachers: teacher"),
        (objects() | {"teachers": {}}, "teachers: teacher: 'python:Net' stands for an object"),
        (objects() | {"teachers": {"teacher": Net(3)}}, "teacher is another than before"),
        (objects() | {"dataset": (images_of(32, 9), images_of(12))}, "changed since"),
        (
            objects() | {"teachers": objects()["teachers"] | {"teacher_st": Net(3)}},
            "teacher_st: the run began with None",
        ),
    ):
        with pytest.raises(ValueError, match=line):
            engine.resume(tmp_path / "part", **given)
    assert weights(engine.resume(tmp_path / "part", **objects()).path) == weights(whole.path)


def test_a_module_is_copied_and_a_name_is_still_a_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Net(3)
    before = [value.clone() for value in network.state_dict().values()]
    keys = KEYS | {"method": "st", "epochs": 1}
    run = engine.train(
        keys, out=str(tmp_path / "run"), model=network, dataset=lambda: (images_of(32), images_of(12))
    )
    assert all(torch.equal(*pair) for pair in zip(before, network.state_dict().values(), strict=True))
    assert network.training
    assert weights(run.path) != torch.cat([value.flatten().double() for value in before]).tolist()
    named = engine.train(
        keys, out=str(tmp_path / "named"), model="resnet8", dataset="digits", limit_train=20, limit_test=20
    )
    with pytest.raises(ValueError, match="model: the run began with 'resnet8', and not with an object"):
        engine.resume(named.path, model=network)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"model": 3}, "model: a name, a torch.nn.Module or a function"),
        ({"model": lambda num_classes: Net(4)}, r"must give logits \(2, 3\), and gives \(2, 4\)"),
        ({"teachers": {"teacher": Net(4)}}, r"must give logits \(2, 3\), and gives \(2, 4\)"),
        ({"teachers": {"techer": Net(3)}}, "teachers: 'techer' is not known; did you mean 'teacher'"),
        ({"teachers": {"teacher": "at.pt"}}, "teachers: teacher: a torch.nn.Module is expected"),
        ({"callbacks": [3]}, "callbacks: functions of a row"),
        ({"dataset": (images_of(9),)}, "gives tuple, and no pair"),
        ({"dataset": 3}, "gives int, and no pair"),
    ],
)
def test_what_is_no_such_object_is_told_in_one_line(given: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told) as error:
        engine.train(KEYS, out=str(tmp_path / "run"), **(objects() | given))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists(), "nothing is left of what did not begin"
