"""Nothing is timed while a test fails."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bench import gate, kernels, pipelines, step
from bench.gate import Mark, State
from bench.lib.calls import op_cases
from engine.pipelines.selection import PIPELINE_KINDS

REAL_RUN, REAL_STATE = subprocess.run, gate.state_of
STATE = State("sources", "library", "device", "python", "torch", "triton")


@pytest.fixture(autouse=True)
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Marks lie in a folder of the test's own, and the sources are as they are."""
    monkeypatch.setattr(gate, "MARKS", tmp_path / "marks")
    monkeypatch.setattr(gate, "state_of", lambda device_type: STATE)
    return tmp_path / "marks"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes what each run of tests asks for, instead of running them; none passes."""
    noted: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        noted.append(command[command.index("-k") + 1])
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    return noted


def mark_of(paths: Sequence[str] = ("tests/a",), ops: Sequence[str] = (), passed: Sequence[str] = ()) -> Mark:
    return Mark("2026-01-02T03:04:05+00:00", "", STATE, (*paths,), (*ops,), (*passed,))


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(("text", "passes"), [
    ("def test_right(): pass", True),
    ("def test_right(): pass\ndef test_wrong(): assert False", False),
    ("def test_broken(): raise RuntimeError", False),
    ("import nothing_of_that_name", False),
    ("import pytest\ndef test_it(): pytest.skip('nothing is checked')", False),
    ("", False),
])  # fmt: skip
def test_the_gate_opens_only_where_tests_ran_and_passed(text: str, passes: bool, tmp_path: Path) -> None:
    assert gate.tests_pass([written(tmp_path / "test_it.py", text)], ["it"], "cpu") is passes


@pytest.mark.parametrize(("device_type", "passes"), [("cpu", True), ("cuda", False)])
def test_only_on_a_gpu_the_gate_runs_the_tests_that_need_one(
    device_type: str, passes: bool, tmp_path: Path
) -> None:
    text = "import pytest\ndef test_right(): pass\n@pytest.mark.gpu\ndef test_wrong(): assert False"
    assert gate.tests_pass([written(tmp_path / "test_it.py", text)], ["it"], device_type) is passes


def test_only_tests_that_name_the_ops_are_asked(tmp_path: Path) -> None:
    file = written(tmp_path / "test_all.py", "def test_mine(): pass\ndef test_other(): assert False")
    assert gate.tests_pass([file], ["mine"], "cpu")
    assert not gate.tests_pass([file], ["mine", "other"], "cpu")
    assert not gate.tests_pass([file], ["neither"], "cpu")


def test_the_tests_of_each_op_are_there() -> None:
    names = [path.name for path in gate.checks(op_cases.OPS, "cpu")]
    assert names == [
        *(f"test_{op}.py" for op in ("distill_loss", "pgd_update", "crop_flip", "batch_norm", "image_conv3x3")),
        "test_table.py",
    ]
    assert all(path.exists() for path in gate.checks(op_cases.OPS, "cpu"))


def test_a_failing_test_stops_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    failing = written(tmp_path / "test_it.py", "def test_crop_flip(): assert 1 == 2")
    asked: list[tuple[list[str], str]] = []

    def checks(ops: Sequence[str], device_type: str) -> list[Path]:
        asked.append((list(ops), device_type))
        return [failing]

    monkeypatch.setattr(gate, "checks", checks)
    monkeypatch.setattr(kernels.Bench, "rows", lambda *_: pytest.fail("timed"))
    out = tmp_path / "out"
    ended = CliRunner().invoke(
        kernels.main, ["--quick", "--device", "cpu", "--op", "crop_flip", "--out", str(out)]
    )
    assert ended.exit_code == 1
    assert "tests do not pass" in ended.output
    assert asked == [(["crop_flip"], "cpu")]
    assert not out.exists()
    assert "1 failed" in capfd.readouterr().out


def test_what_has_passed_is_not_run_again(
    tmp_path: Path,
    marks: Path,
    runs: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = written(tmp_path / "test_all.py", "def test_mine(): pass\ndef test_other(): pass")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", REAL_RUN)
        assert gate.tests_pass([file], ["mine", "other"], "cpu")
    (path,) = marks.iterdir()
    capsys.readouterr()
    for ops in (["mine"], ["other", "mine"]):
        assert gate.tests_pass([file], ops, "cpu")
        assert "tests: passed at 20" in capsys.readouterr().out
    assert runs == []
    assert json.loads(path.read_text())["passed"] == [f"{file}::test_mine", f"{file}::test_other"]
    assert not gate.tests_pass([file], ["mine"], "cuda")  # another selection
    assert not gate.tests_pass([file], ["mine", "neither"], "cpu")
    assert runs == ["mine", "mine or neither"]


@pytest.mark.parametrize(("paths", "ops", "covered"), [
    (["tests/a"], ["op"], True),
    (["tests/a/test_op.py"], ["op"], True),
    (["tests/a/test_op.py", "tests/a/test_rest.py"], ["op", "new"], True),
    (["tests/a/test_rest.py"], ["op"], False),  # none of its tests has that name
    (["tests/a"], ["new"], False),
    (["tests"], ["op"], False),
    (["tests/ab"], ["op"], False),
    (["tests/a", "tests/b"], ["op"], False),
])  # fmt: skip
def test_a_mark_covers_what_was_run_and_passed(paths: list[str], ops: list[str], covered: bool) -> None:
    passed = ["tests/a/test_op.py::test_one[2]", "tests/a/test_rest.py::test_two"]
    assert mark_of(["tests/a"], [], passed).covers(paths, ops) is covered
    assert mark_of(["tests/a"], [*ops, "more"], passed).covers(paths, ops) is covered
    assert not mark_of(["tests/a"], ["more"], passed).covers(paths, ops)
    assert not mark_of(["tests/a"], [], []).covers(paths, ops)


@pytest.mark.parametrize("field", [field.name for field in fields(State)])
def test_a_mark_of_another_state_does_not_count(
    field: str, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.leave(mark_of(passed=["tests/a/test_op.py::test_op"]), "cpu")
    assert gate.tests_pass([gate.CHECKOUT / "tests" / "a"], ["op"], "cpu")
    monkeypatch.setattr(gate, "state_of", lambda _: replace(STATE, **{field: "other"}))
    assert not gate.tests_pass([gate.CHECKOUT / "tests" / "a"], ["op"], "cpu")
    assert runs == ["op"]


@pytest.mark.parametrize("damage", [
    lambda text: "",
    lambda text: text[: len(text) // 2],
    lambda text: "[]",
    lambda text: text.replace('"sources"', '"other"'),
    lambda text: text.replace('"paths": [', '"paths": [1, '),
    lambda text: json.dumps(json.loads(text) | {"ops": "op"}),
    lambda text: json.dumps(json.loads(text) | {"state": "well"}),
    lambda text: json.dumps(json.loads(text) | {"date": None}),
])  # fmt: skip
def test_a_damaged_mark_is_told_and_does_not_count(
    damage: Any, runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = gate.leave(mark_of(passed=["tests/a/test_op.py::test_op"]), "cpu")
    path.write_text(damage(path.read_text()))
    assert not gate.tests_pass([gate.CHECKOUT / "tests" / "a"], ["op"], "cpu")
    assert f"tests: {path} is no mark and does not count: " in capsys.readouterr().out
    assert runs == ["op"]


@pytest.mark.parametrize("text", ["def test_op(): assert False", ""])
def test_a_failed_or_empty_run_removes_the_marks_of_its_device(text: str, tmp_path: Path, marks: Path) -> None:
    older = gate.leave(mark_of(), "cpu")
    other = gate.leave(mark_of(), "cuda")
    assert not gate.tests_pass([written(tmp_path / "test_it.py", text)], ["op"], "cpu")
    assert not older.exists()
    assert [*marks.iterdir()] == [other]


def test_sources_that_change_meanwhile_leave_no_mark(
    tmp_path: Path, marks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    states = iter([STATE, replace(STATE, sources="others")])
    monkeypatch.setattr(gate, "state_of", lambda _: next(states))
    assert gate.tests_pass([written(tmp_path / "test_it.py", "def test_op(): pass")], ["op"], "cpu")
    assert not marks.exists()
    assert "the sources were changed meanwhile" in capsys.readouterr().out


def test_the_digest_is_of_names_and_contents_of_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    for room in gate.ROOMS:
        (root / room / "deep").mkdir(parents=True)
    (root / "engine" / "kernels").symlink_to("../kernels")
    for name in gate.BUILD_FILES:
        (root / name).touch()
    monkeypatch.setattr(gate, "CHECKOUT", root)
    seen = [gate.digest()]
    for room in gate.ROOMS:
        for name in ("a.py", "deep/a.cu"):
            for text in ("one", "two"):
                (root / room / name).write_text(text)
                seen.append(gate.digest())
    (root / "bench" / "a.py").rename(root / "bench" / "b.py")
    seen.append(gate.digest())
    assert len({*seen}) == len(seen)
    for name in ("bench/results/x/step.csv", "tests/__pycache__/a.pyc", "kernels/_native.so", "bench/README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("another")
        assert gate.digest() == seen[-1]


def test_the_sources_are_all_that_git_keeps_of_the_rooms() -> None:
    listed = subprocess.run(
        ["git", "ls-files", *gate.ROOMS], cwd=gate.CHECKOUT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    kept = {path for name in listed.stdout.splitlines() if (path := gate.CHECKOUT / name).is_file()}
    left_out = {path for path in kept - {*gate.sources()} if path.suffix != ".md"}
    assert {path.relative_to(gate.CHECKOUT).parts[:2] for path in left_out} == {("bench", "results")}


def test_the_state_is_that_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gate, "NATIVE_LIBRARY", written(tmp_path / "library.so", "abc"))
    state = REAL_STATE("cpu")
    assert state.library == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert state.torch == torch.__version__
    assert all([state.sources, state.device, state.python])
    monkeypatch.setattr(gate, "NATIVE_LIBRARY", tmp_path / "none.so")
    assert REAL_STATE("cpu").library == ""


@pytest.mark.parametrize(("paths", "names", "device"), [
    *((gate.checks(op_cases.OPS, device), op_cases.OPS, device) for device in ("cpu", "cuda")),
    (pipelines.PIPELINE_TESTS, PIPELINE_KINDS, "cpu"),
    ([step.STEP_TESTS], ["textbook"], "cpu"),
])  # fmt: skip
def test_the_one_run_has_the_tests_of_every_bench(
    paths: Sequence[Path], names: Sequence[str], device: str
) -> None:
    below = [path.relative_to(gate.CHECKOUT).as_posix() for path in paths]
    passed = [f"{path}::test_{name}" for path in below for name in names]
    assert mark_of(gate.TESTS[device], passed=passed).covers(below, names)
    assert all((gate.CHECKOUT / path).exists() for path in gate.TESTS[device])


@pytest.mark.parametrize(("text", "code"), [("def test_it(): pass", 0), ("def test_it(): assert False", 1)])
def test_the_command_runs_all_and_leaves_a_mark(
    text: str, code: int, tmp_path: Path, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "test_it.py", text)
    monkeypatch.setitem(gate.TESTS, "cpu", (str(file),))
    ended = CliRunner().invoke(gate.main, ["--device", "cpu"])
    assert ended.exit_code == code, ended.output
    assert len([*marks.glob("cpu-*.json")]) == 1 - code
    assert ("tests: 1 passed, noted in" in ended.output) is (code == 0)


def test_the_command_refuses_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    ended = CliRunner().invoke(gate.main, ["--device", "cuda"])
    assert ended.exit_code == 2
    assert "--device cuda: there is no CUDA device" in ended.output
