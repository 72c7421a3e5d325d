"""Processes of a command: their number, start, supervision and end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.common.stopping import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR
from engine.system import launcher, precision
from engine.system.distributed import FINAL_EXIT_CODE


@pytest.mark.parametrize(
    ("gpus", "processes", "device", "there", "expected"),
    [
        (None, None, "auto", 0, 0),
        (None, None, "auto", 8, 0),
        (8, None, "auto", 8, 8),
        (1, None, "cuda", 8, 1),
        (None, 2, "auto", 0, 2),
        (None, 2, "cpu", 8, 2),
        (9, None, "auto", 8, "--gpus 9: this machine has 8 CUDA GPUs"),
        (1, None, "auto", 0, "--gpus 1: this machine has 0 CUDA GPUs"),
        (2, None, "auto", 1, "--gpus 2: this machine has 1 CUDA GPU"),
        (2, None, "cpu", 8, "--gpus 2 and --device cpu exclude each other"),
        (2, None, "cuda:1", 8, "--gpus 2 and --device cuda:1 exclude each other"),
        (2, 2, "auto", 8, "--gpus and --procs exclude each other: GPUs have a process each"),
        (None, 2, "auto", 8, "--procs 2 is for CPUs: add --device cpu, or use --gpus 2"),
        (None, 10**9, "cpu", 0, "--procs 1000000000: at most 1024"),
        (None, 2, "cuda:0", 8, "--procs 2 is for CPUs: add --device cpu, or use --gpus 2"),
    ],
)
def test_count(
    gpus: int | None,
    processes: int | None,
    device: str,
    there: int,
    expected: int | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "count_gpus", lambda: there)
    if isinstance(expected, int):
        assert launcher.count(gpus, processes, device) == expected
    else:
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            launcher.count(gpus, processes, device)


# ---------------------------------------------------------------- starting and ending

CHILD = """
import os, signal, sys, time
from pathlib import Path

rank, restarts, folder = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"]), Path(sys.argv[1])

def wait():
    (folder / f"waits-{rank}").touch()
    time.sleep(60)

def leaves(code, after=0.0):
    def leave(number, frame):
        time.sleep(after)
        sys.exit(code)
    signal.signal(signal.SIGTERM, leave)

(folder / f"start-{restarts}-{rank}").touch()
"""

Launch = Callable[..., int]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Launches two processes of a script, with `rank`, `restarts`, `folder`, `wait` and `leaves` at hand."""

    def run(script: str, **keys: int) -> int:
        command = [sys.executable, "-S", "-c", CHILD + script, str(tmp_path)]
        return launcher.launch(2, command, tmp_path / "logs", **keys)

    return run


def starts(folder: Path) -> list[int]:
    """Restart counts of what was started; one that is ended at once may leave no trace."""
    return sorted({int(path.name.split("-")[1]) for path in folder.glob("start-*")})


def send_when_both_wait(folder: Path, *numbers: int) -> None:
    def send() -> None:
        until = time.monotonic() + 30
        while len(list(folder.glob("waits-*"))) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    threading.Thread(target=send, daemon=True).start()


def test_all_that_end_well_are_started_once(
    launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first has the terminal; what the second prints goes to its file, its errors to the terminal too."""
    assert launch("print('out', rank, flush=True); print('err', rank, file=sys.stderr)") == 0
    assert starts(tmp_path) == [0]
    printed = capfd.readouterr()
    assert printed.out == "out 0\n"
    assert sorted(printed.err.splitlines()) == ["[1] err 1", "err 0"]
    assert sorted((tmp_path / "logs" / "1" / "process-1.log").read_text().splitlines()) == ["err 1", "out 1"]


def test_what_prints_nothing_leaves_no_logs(launch: Launch, tmp_path: Path) -> None:
    assert launch("") == 0
    assert not (tmp_path / "logs").exists()


def test_where_one_fails_all_are_started_again(
    launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = """
print(f"start {restarts}", file=sys.stderr)
if restarts == 0 and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if restarts == 1 and rank == 1:
    sys.exit(1)
if restarts < 2:
    leaves(0)
    wait()
"""
    assert launch(script) == 0
    assert starts(tmp_path) == [0, 1, 2]
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("engine: ")]
    assert said == [
        "engine: process 1 of 0..1 was killed by SIGKILL; starting all again, 1 of 3 times",
        "engine: process 1 of 0..1 ended with exit code 1; starting all again, 2 of 3 times",
    ]
    logs = sorted((tmp_path / "logs").glob("*/*"))
    assert [path.read_text() for path in logs] == ["start 0\n", "start 1\n", "start 2\n"]


def test_what_always_fails_is_given_up(launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("sys.exit(7)") == EXIT_FAILED
    assert starts(tmp_path) == [0, 1, 2, 3]
    assert capfd.readouterr().err.splitlines()[-1].endswith("ended with exit code 7; given up after 3 restarts")


def test_what_the_user_can_mend_is_not_started_again(
    launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch("if rank: sys.exit(2)\nwait()") == EXIT_USER_ERROR
    assert starts(tmp_path) == [0]
    assert capfd.readouterr().err == "", "the process has said it"


def test_a_line_that_one_says_for_all_has_no_mark_and_no_log(
    launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = "if rank: print('engine: no such file', file=sys.stderr); sys.exit(2)\nwait()"
    assert launch(script) == EXIT_USER_ERROR
    assert capfd.readouterr().err == "engine: no such file\n"
    assert not (tmp_path / "logs").exists()


def test_what_would_fail_again_is_not_started_again(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = launcher._loopback_store()
    store.set(FINAL_EXIT_CODE, "1")
    monkeypatch.setattr(launcher, "_loopback_store", lambda: store)
    assert launch("sys.exit(1)") == EXIT_FAILED
    assert starts(tmp_path) == [0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_all_and_a_second_one_changes_nothing(
    number: signal.Signals, launch: Launch, tmp_path: Path
) -> None:
    send_when_both_wait(tmp_path, number, signal.SIGTERM)
    assert launch("leaves(130, after=0.1 + rank)\nwait()") == EXIT_INTERRUPTED
    assert starts(tmp_path) == [0]


def test_a_signal_before_the_processes_heed_it(
    launch: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    send_when_both_wait(tmp_path, signal.SIGTERM)
    assert launch("wait()") == EXIT_INTERRUPTED
    assert capfd.readouterr().err == "engine: interrupted; what was saved before is whole\n"


def test_a_signal_to_each_process_stops_all(launch: Launch, tmp_path: Path) -> None:
    """The launcher signals none again: a second signal would interrupt its saving."""
    script = """
def stop(number, frame):
    (folder / f"told-{rank}-{time.monotonic()}").touch()
    time.sleep(0.1 + rank)
    sys.exit(130)

signal.signal(signal.SIGTERM, stop)
os.kill(os.getpid(), signal.SIGTERM)
"""
    assert launch(script) == EXIT_INTERRUPTED
    assert len(list(tmp_path.glob("told-*"))) == 2


def test_a_run_that_ends_in_spite_of_a_signal_is_done(launch: Launch, tmp_path: Path) -> None:
    send_when_both_wait(tmp_path, signal.SIGTERM)
    assert launch("leaves(0)\nwait()") == 0


def test_who_does_not_end_is_killed(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "SECONDS_TO_END", 0.2)
    script = "if rank: sys.exit(1)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwait()"
    assert launch(script, max_restarts=0) == EXIT_FAILED


def test_who_does_not_heed_a_signal_is_killed(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "SECONDS_TO_SAVE", 0.2)
    send_when_both_wait(tmp_path, signal.SIGTERM)
    assert launch("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwait()") == EXIT_INTERRUPTED


def test_cores_are_shared_unless_the_user_shares_them(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert launcher._environment(0, 2, 1, 0)["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launcher._environment(0, 2, 1, 0)["OMP_NUM_THREADS"] == "3"


# ---------------------------------------------------------------- which engine


HOSTILE = ("yaml", "torch", "numpy", "click", "rich", "pathlib", "typing", "config", "kernels")


def plant(folder: Path, package: bool = True) -> Path:
    """Modules, and where wanted a package `engine`, that tell when they are run."""
    folder.mkdir()
    told = folder / "told"
    text = f"from os import open, O_CREAT\nopen({str(told)!r}, O_CREAT)\n"
    for name in HOSTILE:
        (folder / f"{name}.py").write_text(text)
    if package:
        (folder / "engine").mkdir()
        (folder / "engine" / "__init__.py").write_text(text)
    return told


def test_a_child_runs_no_file_of_the_current_folder(tmp_path: Path) -> None:
    told = plant(tmp_path / "folder")
    command = launcher.command("train", "--dataset", "nowhere")
    done = subprocess.run(command, cwd=told.parent, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("engine: dataset: 'nowhere' is not known"), done.stderr
    assert not told.exists()


def test_a_child_is_the_engine_that_started_it(tmp_path: Path) -> None:
    """A checkout that is not installed, where another engine is, called from a folder with a third."""
    told = plant(tmp_path / "folder")
    shown = "import sys; print(sys.modules['engine'].__file__, sys.path[0])\nraise SystemExit"
    checkout = tmp_path / "checkout" / "engine"
    (checkout / "commands").mkdir(parents=True)
    (checkout / "__init__.py").touch()
    (checkout / "commands" / "__init__.py").touch()
    (checkout / "commands" / "cli.py").write_text(shown)
    (checkout / "__main__.py").write_bytes(Path(launcher.command()[1]).read_bytes())
    for cwd, command in (
        (told.parent, [sys.executable, str(checkout / "__main__.py")]),
        (checkout.parent, [sys.executable, "-m", "engine"]),
    ):
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
        found, first = done.stdout.split()
        assert found == str(checkout / "__init__.py")
        assert first not in {str(checkout), str(checkout.parent), str(told.parent), ""}
    assert not told.exists()


def test_as_a_module_the_engine_looks_for_no_other_in_the_current_folder(tmp_path: Path) -> None:
    """Modules that Python itself imports before (-m), such as `typing.py`, are not tested."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("yaml", "torch", "numpy", "click", "rich"):
        (folder / f"{name}.py").write_text("raise SystemExit('executed')")
    command = [sys.executable, "-m", "engine", "train", "--dataset", "nowhere"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("engine: dataset: 'nowhere' is not known"), done.stderr
