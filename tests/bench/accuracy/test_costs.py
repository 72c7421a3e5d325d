"""Costs of a protocol's rows: steps in turn, and what the page makes of them."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.lib.accuracy import costs
from bench.lib.accuracy import protocol as protocols
from bench.lib.accuracy.cells import ResultFolder
from bench.lib.accuracy.collected import collect
from bench.lib.accuracy.costs import ProtocolCosts, StepCosts
from bench.lib.accuracy.protocol import AccuracyProtocol
from engine.common import yaml_text
from tests.bench.accuracy.made_cells import FACTS

TREE: dict[str, Any] = {
    "title": "small",
    "threads": 1,
    "seeds": [0],
    "common": {
        "dataset": "digits", "model": "resnet8", "epochs": 1, "batch_size": 8, "limit_train": 50, "limit_test": 20,
        "validation": 0.1, "attack": {"num_steps": 1},
    },
    "teachers": {"teacher": {"method": "at"}},
    "tables": {
        "methods": {
            "title": "methods", "baseline": "ard", "attacks": {"natural": 8},
            "rows": {"ard": {"method": "ard"}, "at": {"method": "at", "batch_size": 16}},
        }
    },
}  # fmt: skip


OTHER = {"method": "ard", "semantics": "paper", "lr": 9}


@pytest.fixture
def protocol(tmp_path: Path) -> AccuracyProtocol:
    path = tmp_path / "small.yaml"
    path.write_text(yaml_text.write(TREE))
    return protocols.read(str(path))


def test_rows_take_turns_and_an_epoch_has_the_steps_of_its_images(
    protocol: AccuracyProtocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    class Step:
        def __init__(self, keys: Any, images: Any) -> None:
            assert (keys.loss.warmup, keys.device, len(images)) == (0, "cpu", 50)
            self.method = keys.method

        def __call__(self) -> None:
            ran.append(self.method)

    monkeypatch.setattr(costs, "EngineStep", Step)
    threads = torch.get_num_threads()
    said: list[str] = []
    try:
        found = costs.measure(protocol, ResultFolder(tmp_path), torch.device("cpu"), 2, said.append)
    finally:
        torch.set_num_threads(threads)
    assert ran == ["ard", "at"] + ["ard"] * 2 + ["at"] * 2 + ["at"] * 2 + ["ard"] * 2
    assert [each.steps for each in found.rows.values()] == [math.ceil(45 / 8), math.ceil(45 / 16)]
    assert [len(each.seconds) for each in found.rows.values()] == [2, 2]
    assert costs.read(protocol, ResultFolder(tmp_path)) == found
    assert len(said) == 2


def written(protocol: AccuracyProtocol, folder: Path, **changes: Any) -> ResultFolder:
    rows = {
        row: StepCosts(keys=protocols.chosen_keys(protocol.config_of(row, 0)), steps=steps, seconds=seconds)
        for row, steps, seconds in (("ard", 6, [1.0, 2.0, 4.0]), ("at", 3, [1.0, 1.0, 3.0]))
    }
    results = ResultFolder(folder)
    results.costs.write_text(json.dumps(ProtocolCosts(facts=dict(FACTS), rows=rows).model_dump() | changes))
    return results


def test_the_ratio_is_the_median_of_the_rounds(protocol: AccuracyProtocol, tmp_path: Path) -> None:
    found = costs.read(protocol, written(protocol, tmp_path))
    assert found is not None
    ard, at = found.rows["ard"], found.rows["at"]
    assert (ard.epoch_seconds, at.epoch_seconds) == (12.0, 3.0)
    assert at.relative_to(ard) == statistics.median([1 / 1, 1 / 2, 3 / 4]) * 3 / 6
    assert ard.relative_to(ard) == 1


def test_without_a_file_there_are_none(protocol: AccuracyProtocol, tmp_path: Path) -> None:
    assert costs.read(protocol, ResultFolder(tmp_path)) is None
    assert collect(protocol, ResultFolder(tmp_path)).in_turn is None
    assert collect(protocol, written(protocol, tmp_path)).in_turn is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {}}, "row 'ard' is not there, or of other settings"),
        ({"rows": {"ard": {"keys": OTHER, "steps": 1, "seconds": [1.0]}}}, "row 'ard' is not there, or of other"),
        ({"rows": {"ard": {"keys": {}, "steps": 1, "seconds": [0.0]}}}, "seconds"),
        ({"colour": 1}, "colour"),
    ],
)  # fmt: skip
def test_a_file_that_is_damaged_or_of_other_rows_is_refused(
    protocol: AccuracyProtocol, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^[^\n]*costs\.json: [^\n]*{message}[^\n]*$"):
        costs.read(protocol, written(protocol, tmp_path, **changes))
