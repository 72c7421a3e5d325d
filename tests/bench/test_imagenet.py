"""The benchmark on photographs: its rows, its verdict, and a small run of it."""

from __future__ import annotations

import csv
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench import imagenet
from bench.lib import machine
from bench.lib.output.csv_rows import ImagenetRow, ResumedRow
from bench.lib.steps import killed_run, stages
from bench.lib.steps.killed_run import KilledRun
from bench.lib.steps.stages import TimedStage
from tests.bench.readme import documented

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("heading", "kind"), [("imagenet.csv", ImagenetRow), ("imagenet-resumed.csv", ResumedRow)]
)
def test_the_columns_are_documented(heading: str, kind: type) -> None:
    own = [field.name for field in fields(kind)]
    assert own[-len(documented(heading)) :] == documented(heading)


def test_images_a_second_are_of_all_processes() -> None:
    keys = imagenet.keys_of("resnet8", Path("/nowhere"), 16, 8, CPU)
    (row,) = imagenet.stage_rows(machine.facts(CPU), keys, 2, [TimedStage("attack", 16, 0.5, 10.0)])
    assert (row.images_per_s, row.attack_steps, row.image_size) == (32.0, 2, 16)


def test_what_was_not_shown_or_differs_is_said() -> None:
    keys = imagenet.keys_of("resnet8", Path("/nowhere"), 16, 8, CPU)
    row = imagenet.resumed_row(machine.facts(CPU), keys, 2, KilledRun(3, 1, True, 9.0))
    assert "killed after step 1 of 3, resumed, equal to the bit" in imagenet.sentence(row)
    assert "NOT SHOWN" in imagenet.sentence(replace(row, killed_after=0))
    assert "DIFFERENT" in imagenet.sentence(replace(row, same_bits=False))


def test_states_are_the_same_to_the_bit_or_not() -> None:
    state = {"a": [torch.ones(3), 1], "b": {"c": None}}
    assert killed_run._is_same(state, {"a": [torch.ones(3), 1], "b": {"c": None}})
    for other in (
        {"a": [torch.ones(3).nextafter(torch.zeros(3)), 1], "b": {"c": None}},
        {"a": [torch.ones(3), 2], "b": {"c": None}},
        {"a": [torch.ones(3)], "b": {"c": None}},
        {"a": [torch.ones(3), 1]},
    ):
        assert not killed_run._is_same(state, other)


def test_a_run_that_differs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "timed", lambda *given: [TimedStage("attack", 16, 0.5, 10.0)])
    monkeypatch.setattr(killed_run, "outcome", lambda *given: KilledRun(3, 1, False, 9.0))
    arguments = ["--quick", "--model", "resnet8", "--device", "cpu", "--out", str(tmp_path)]
    result = CliRunner().invoke(imagenet.main, arguments)
    assert result.exit_code == 1
    assert "resumed runs differ from undisturbed ones: resnet8" in result.output


@pytest.mark.slow
def test_a_small_run_is_killed_resumed_and_the_same(tmp_path: Path) -> None:
    arguments = ["--quick", "--model", "resnet8", "--device", "cpu", "--out", str(tmp_path)]
    result = CliRunner().invoke(imagenet.main, arguments)
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((tmp_path / "imagenet.csv").open()))
    assert tuple(row["stage"] for row in rows) == ("loading", "attack", "training step", "evaluation")
    assert [int(row["images"]) for row in rows] == [24, 16, 16, 4]
    assert all(float(row["peak_mib"]) > 0 for row in rows)
    (resumed,) = csv.DictReader((tmp_path / "imagenet-resumed.csv").open())
    assert (resumed["steps"], resumed["same_bits"]) == ("3", "True")
    assert resumed["killed_after"] in ("1", "2")
