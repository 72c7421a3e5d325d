"""`python -m bench.accuracy`: which cells are measured when, by processes that end, fail or are stopped."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bench import accuracy
from bench.lib.accuracy import cells, page
from bench.lib.accuracy import protocol as protocols
from engine.common import yaml_text
from engine.config import merge

PROTOCOL: dict[str, Any] = {
    "title": "small",
    "threads": 1,
    "seeds": [0, 1],
    "common": {"dataset": "digits", "model": "resnet8", "epochs": 1},
    "teachers": {"teacher": {"method": "at", "seed": 100}},
    "tables": {
        "methods": {
            "title": "methods",
            "baseline": "ard",
            "attacks": {"natural": 8},
            "rows": {"ard": {"method": "ard"}, "at": {"method": "at"}},
        },
        "rates": {
            "title": "rates",
            "baseline": "at",
            "attacks": {"natural": 8},
            "rows": {"at": None, "at-lr1": {"method": "at", "lr": 1}},
        },
    },
}
# In the place of a training: a cell of the settings that are wanted, or what a file named after the row says.
PROGRAM = """
import json, signal, sys, time
from pathlib import Path
name, size, folder, work, device, row, seed = sys.argv[1:]
protocol = json.loads(Path(name).with_suffix(".json").read_text())
told = Path(work).parent / "told"
what = row if seed == "-" else row + "-seed" + seed
with told.open("a") as file:
    file.write(what + "\\n")
trouble = Path(work).parent / (what + ".trouble")
if trouble.exists():
    if trouble.read_text() == "hang":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
        trouble.with_suffix(".began").touch()
        time.sleep(60)
    print("some lines")
    sys.exit(trouble.read_text())
content = protocol[what]
path = Path(folder) / "cells" / (what + ".json")
path.parent.mkdir(parents=True, exist_ok=True)
log = Path(folder) / "logs" / (what + ".jsonl")
log.parent.mkdir(exist_ok=True)
log.write_text('{"event": "epoch", "loss": 1.0}\\n')
path.write_text(json.dumps(content))
if seed == "-":
    teacher = Path(folder) / "teachers" / (row + ".safetensors")
    teacher.parent.mkdir(exist_ok=True)
    teacher.write_text(row)
"""


class Machine:
    """The command, on a protocol in a folder; networks are not read, and what would train writes made-up cells."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.yaml = folder / "small.yaml"
        self.out = folder / "out"
        self.write(PROTOCOL)

    def write(self, tree: dict[str, Any]) -> None:
        self.yaml.write_text(yaml_text.write(tree))
        protocol = protocols.read(str(self.yaml))
        contents = {
            cell.name: self.content(cell.row, cell.seed, cell.settings, cell.teachers, cell.keys)
            for cell in protocols.cells(protocol, {"teacher": "teacher"})
        }
        contents["teacher"] = self.content("teacher", None, "0", {}, {})
        self.yaml.with_suffix(".json").write_text(json.dumps(contents))

    def content(self, row: str, seed: int | None, settings: str, teachers: Any, keys: Any) -> dict[str, Any]:
        natural = {"n": 8, "correct": 4, "seconds": 1.0, "images": "i", "verdicts": "8A=="}
        return {
            "protocol": "small", "row": row, "seed": seed, "settings": settings, "keys": keys,
            "teachers": teachers, "threads": 1, "data": "d", "facts": {}, "weights": "w", "epoch": 1, "epochs": 1,
            "epoch_seconds": 2.0, "seconds": 2.0, "peak_memory": None, "accuracies": {"natural": natural},
        }  # fmt: skip

    def run(self, *arguments: str) -> Result:
        places = ["--out", str(self.out), "--work", str(self.folder / "work"), "--device", "cpu"]
        return CliRunner().invoke(accuracy.main, [str(self.yaml), *places, *arguments])

    def told(self) -> list[str]:
        path = self.folder / "work" / "told"
        return path.read_text().split() if path.exists() else []

    def trouble(self, name: str, what: str) -> None:
        (self.folder / "work").mkdir(exist_ok=True)
        (self.folder / "work" / f"{name}.trouble").write_text(what)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    def teachers(self: cells.ResultFolder, sections: list[str]) -> dict[str, str]:
        return {name: self.teacher(name).read_text() for name in sections if self.teacher(name).exists()}

    monkeypatch.setattr(accuracy, "PROGRAM", (sys.executable, "-c", PROGRAM))
    monkeypatch.setattr(accuracy, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(cells.ResultFolder, "teachers", teachers)
    monkeypatch.setattr(page, "write", lambda *given: None)
    return Machine(tmp_path)


def test_every_cell_is_measured_once_and_students_wait_for_their_teacher(machine: Machine) -> None:
    result = machine.run()
    assert result.exit_code == 0, result.output
    assert machine.told() == [
        "teacher", "ard-seed0", "at-seed0", "ard-seed1", "at-seed1", "at-lr1-seed0", "at-lr1-seed1",
    ]  # fmt: skip
    assert "0 of 6 cells are measured" in result.output
    assert "at-lr1-seed1: natural 50.00%; 2 s an epoch" in result.output
    again = machine.run()
    assert again.exit_code == 0
    assert "6 of 6 cells are measured" in again.output
    assert len(machine.told()) == 7


def test_a_table_alone_needs_no_teacher_that_its_rows_do_not_read(machine: Machine) -> None:
    assert machine.run("--table", "rates").exit_code == 0
    assert machine.told() == ["at-seed0", "at-lr1-seed0", "at-seed1", "at-lr1-seed1"]


def test_those_that_need_no_teacher_go_on_while_one_is_trained(machine: Machine) -> None:
    assert machine.run("--jobs", "3").exit_code == 0
    assert set(machine.told()[:3]) == {"teacher", "at-seed0", "at-seed1"}


def test_one_that_fails_is_told_and_the_others_are_measured(machine: Machine) -> None:
    machine.trouble("at-seed0", "no memory")
    result = machine.run()
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == "Error: at-seed0: no memory"
    assert len(machine.told()) == 7
    (machine.folder / "work" / "at-seed0.trouble").unlink()
    assert machine.run().exit_code == 0
    assert machine.told()[7:] == ["at-seed0"]


def test_students_of_a_teacher_that_fails_are_left(machine: Machine) -> None:
    machine.trouble("teacher", "bad")
    result = machine.run()
    assert result.exit_code == 1
    assert machine.told() == ["teacher", "at-seed0", "at-seed1", "at-lr1-seed0", "at-lr1-seed1"]
    assert "2 are left; the same command goes on" in result.output


def test_what_runs_when_the_budget_ends_is_stopped_and_nothing_else_begins(machine: Machine) -> None:
    machine.trouble("at-seed0", "hang")
    result = machine.run("--table", "rates", "--budget", "2")
    assert result.exit_code == 0, result.output
    assert (machine.folder / "work" / "at-seed0.began").exists()
    assert machine.told() == ["at-seed0"]
    assert "4 are left; the same command goes on" in result.output


def test_nothing_begins_that_would_not_end_in_time(tmp_path: Path) -> None:
    now = time.monotonic()
    workers = accuracy.Workers((), cells.ResultFolder(tmp_path), tmp_path, "cpu", 1, now + 10)
    assert not workers.is_late
    workers.longest = 60.0
    assert workers.is_late
    workers.deadline = None
    assert not workers.is_late


def test_a_cell_once_more_is_the_same_or_not(machine: Machine) -> None:
    assert machine.run().exit_code == 0
    same = machine.run("--again", "ard/1")
    assert same.exit_code == 0, same.output
    assert "the same, bit for bit" in same.output
    path = machine.yaml.with_suffix(".json")
    contents = json.loads(path.read_text())
    contents["ard-seed1"]["weights"] = "x"
    path.write_text(json.dumps(contents))
    other = machine.run("--again", "ard/1")
    assert other.exit_code == 1
    assert "differs in weights" in other.output
    records = sorted((machine.out / "again").iterdir())
    assert [record.name for record in records] == ["ard-seed1-1.json", "ard-seed1-2.json"]
    assert [json.loads(record.read_text())["same_bits"] for record in records] == [True, False]
    kept = json.loads((machine.out / "cells" / "ard-seed1.json").read_text())
    assert kept["weights"] == "w"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--again", "ard"], r"--again: ROW/SEED is expected, such as ard/0, got 'ard'"),
        (["--again", "ard/-1"], r"--again: ROW/SEED is expected"),
        (["--again", "arf/0"], r"row: 'arf' is not known"),
        (["--again", "at/0"], r"at-seed0\.json is not there yet"),
        (["--table", "method"], r"table: 'method' is not known"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_measured(
    machine: Machine, arguments: list[str], message: str
) -> None:
    result = machine.run(*arguments)
    assert result.exit_code == 2
    assert machine.told() == []
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert re.search(message, line)


def test_a_cell_of_other_settings_is_neither_taken_nor_overwritten(machine: Machine) -> None:
    assert machine.run().exit_code == 0
    before = (machine.out / "cells" / "at-seed0.json").read_bytes()
    machine.write(merge(PROTOCOL, {"common": {"lr": 0.2}}))
    result = machine.run()
    assert result.exit_code == 2
    assert "which differ in lr; move it away" in result.output
    assert (machine.out / "cells" / "at-seed0.json").read_bytes() == before
