"""`python -m bench.kernels`, small."""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bench import gate, kernels
from bench.lib.calls import op_cases
from bench.lib.output.csv_rows import OpRow
from engine.kernels import dispatch


@pytest.fixture(autouse=True)
def open_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "tests_pass", lambda *_: True)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(kernels.main, ["--device", "cpu", *arguments])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_quick_run_times_every_op_in_every_implementation(tmp_path: Path) -> None:
    ended = run("--quick", "--out", str(tmp_path))
    assert ended.exit_code == 0, ended.output
    rows = read(tmp_path / "kernels.csv")
    assert {row["op"] for row in rows} == {*op_cases.OPS}
    there = set() if dispatch.missing("native", "cpu") else {"native"}
    assert [(row["op"], row["implementation"]) for row in rows] == [
        (case.op, name)
        for case in op_cases.table(0, quick=True)
        for name in ("eager", *there.intersection(dispatch.SERVED_BY[case.op]["cpu"]))
    ]
    for row in rows:
        assert row.keys() == {field.name for field in fields(OpRow)}
        assert 0 < float(row["q10_s"]) <= float(row["median_s"]) <= float(row["q90_s"])
        assert float(row["gb_per_s"]) == pytest.approx(
            int(row["bytes_moved"]) / float(row["median_s"]) / 1e9, rel=1e-4
        )
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert ended.output.count("not measured") == 6


def test_one_op_can_be_timed_alone(tmp_path: Path) -> None:
    assert run("--quick", "--op", "pgd_update", "--out", str(tmp_path)).exit_code == 0
    assert {row["op"] for row in read(tmp_path / "kernels.csv")} == {"pgd_update"}


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "missing", lambda name, kind: f"no {name} for {kind}" * (name == "native"))
    ended = run("--quick", "--op", "crop_flip", "--out", str(tmp_path))
    assert ended.exit_code == 0
    assert "not timed: crop_flip by native: no native for cpu" in ended.output
    assert {row["implementation"] for row in read(tmp_path / "kernels.csv")} == {"eager"}


def test_what_fails_is_not_timed_and_the_command_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(dispatch, "missing", lambda *_: "")
    monkeypatch.setattr("engine.kernels.pgd_update", broken)
    ended = run("--quick", "--op", "pgd_update", "--out", str(tmp_path))
    assert ended.exit_code == 1
    assert "pgd_update 4x3x8x8 native call: RuntimeError no such instruction\n" in ended.output
    assert {row["implementation"] for row in read(tmp_path / "kernels.csv")} == {"eager"}


def test_a_device_that_is_not_there_is_named() -> None:
    ended = CliRunner().invoke(kernels.main, ["--device", "cuda:99"])
    assert ended.exit_code == 2
    assert "cuda:99" in ended.output
