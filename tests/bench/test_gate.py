"""Nothing is timed while a test fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import cases, gate, kernels


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(("text", "passes"), [
    ("def test_right(): pass", True),
    ("def test_right(): pass\ndef test_wrong(): assert False", False),
    ("def test_broken(): raise RuntimeError", False),
    ("import nothing_of_that_name", False),
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
    names = [path.name for path in gate.checks(cases.OPS, "cpu")]
    assert names == ["test_distill_loss.py", "test_pgd_update.py", "test_crop_flip.py", "test_table.py"]
    assert all(path.exists() for path in gate.checks(cases.OPS, "cpu"))


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
