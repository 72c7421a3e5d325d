"""Runs of several processes that are killed, stopped, or left without an answer: real processes, real signals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.common.stopping import EXIT_INTERRUPTED
from engine.runs import lifecycle
from tests.processes import free_port
from tests.runs.test_resume import assert_same_run
from tests.system.test_distributed import assert_same_trajectory

PATIENCE = 240.0


def wait_until(ready: Callable[[], bool], what: str, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE
    while not ready():
        assert process.poll() is None, f"ended before {what}: {process.communicate()}"
        assert time.monotonic() < until, what
        time.sleep(0.02)


@dataclass
class Launched:
    """`engine train --procs N` at work."""

    process: subprocess.Popen[str]
    out: Path

    def workers(self) -> list[int]:
        """Process numbers by rank, of those that are there."""
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        except OSError:  # it has ended
            return []
        found: dict[int, int] = {}
        for child in map(int, children):
            try:
                told = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ranks = [int(text.removeprefix(b"RANK=")) for text in told if text.startswith(b"RANK=")]
            found |= dict.fromkeys(ranks, child)
        return [found[rank] for rank in sorted(found)]

    def steps(self) -> int:
        """Steps up to the last row of metrics.jsonl."""
        rows = (
            (self.out / "metrics.jsonl").read_text().splitlines() if (self.out / "metrics.jsonl").exists() else []
        )
        return int(json.loads(rows[-1])["step"]) if rows else 0

    def reaches(self, step: int) -> None:
        wait_until(lambda: self.steps() >= step and (self.out / "last.pt").exists(), f"step {step}", self.process)

    def ends(self) -> tuple[int, str]:
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out + err


@contextmanager
def launched(arguments: list[str], out: Path, processes: int = 2, *further: str) -> Iterator[Launched]:
    command = [sys.executable, "-m", "engine", *arguments, "--procs", str(processes), *further]
    process = subprocess.Popen(  # the tests' own command
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    running = Launched(process, out)
    try:
        yield running
    finally:
        if process.poll() is None:
            for worker in running.workers():
                os.kill(worker, signal.SIGKILL)
            process.kill()
            process.communicate()


def slow_keys(out: Path, **keys: Any) -> dict[str, Any]:
    """Keys of a run of 18 steps that take a tenth of a second each, saved at every second."""
    base = {"epochs": 3, "checkpoint_every": 2, "log_every": 1, "attack": {"num_steps": 20}, "out": str(out)}
    return {"method": "iad1", **base, **keys}


def slow_run(tiny: Any, out: Path, **keys: Any) -> list[str]:
    """The same as arguments of the command line."""
    arguments: list[str] = tiny.flags(**slow_keys(out, **keys))
    return arguments


def undisturbed(arguments: list[str], out: Path) -> None:
    with launched(arguments, out) as running:
        code, printed = running.ends()
        assert code == 0, printed


def test_a_killed_process_is_replaced_and_the_result_is_the_same(tiny: Any, tmp_path: Path) -> None:
    """To the bit with two processes, wherever the kill falls."""
    undisturbed(slow_run(tiny, tmp_path / "whole"), tmp_path / "whole")
    with launched(slow_run(tiny, tmp_path / "killed"), tmp_path / "killed") as running:
        running.reaches(5)
        os.kill(running.workers()[1], signal.SIGKILL)
        code, printed = running.ends()
    assert code == 0, printed
    told = "engine: process 1 of 0..1 was killed by SIGKILL; starting all again, 1 of 3 times"
    assert [line for line in printed.splitlines() if line.startswith("engine: ")] == [told]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    sessions = json.loads((tmp_path / "killed" / "provenance.json").read_text())
    assert sessions["processes"] == 2
    assert "Processes: 2, 4 images each; BatchNorm in each by its own 4 images" in printed
    assert len(sessions["earlier_sessions"]) == 1
    assert sessions["from_step"] >= 4


@pytest.mark.slow
def test_processes_are_killed_at_twenty_one_random_points(tiny: Any, tmp_path: Path) -> None:
    """Within steps, between them, in evaluations, while a run starts; up to three kills to a run."""
    undisturbed(slow_run(tiny, tmp_path / "whole"), tmp_path / "whole")
    chance, kills, runs = random.Random(0), 0, 0
    while kills < 21:
        out, runs = tmp_path / f"killed-{runs}", runs + 1
        with launched(slow_run(tiny, out), out) as running:
            for _ in range(3):  # as often as the launcher starts again
                target = chance.randint(running.steps(), 18)
                while running.process.poll() is None and (running.steps() < target or len(running.workers()) < 2):
                    time.sleep(0.01)
                time.sleep(chance.uniform(0, 5) if chance.random() < 0.3 else chance.uniform(0, 0.2))
                if running.process.poll() is None and len(victims := running.workers()) == 2:
                    os.kill(chance.choice(victims), signal.SIGKILL)
                    kills += 1
                    while running.process.poll() is None and set(victims) & set(running.workers()):
                        time.sleep(0.01)
            code, printed = running.ends()
        assert code == 0, printed
        assert_same_run(tmp_path / "whole", out)


def test_a_process_that_hangs_is_named_and_replaced(tiny: Any, tmp_path: Path) -> None:
    with launched(slow_run(tiny, tmp_path / "run"), tmp_path / "run", 2, "--timeout", "5") as running:
        running.reaches(5)
        os.kill(running.workers()[1], signal.SIGSTOP)
        code, printed = running.ends()
    assert code == 0, printed
    assert "process 1 of 0..1 did not answer: it hangs (limit 5 s) or is gone" in printed, printed
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("later", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_with_another_number_of_processes(later: int, tiny: Any, tmp_path: Path) -> None:
    """SIGTERM to the launcher saves and exits with 130; no sample is seen twice or missed afterwards."""
    keys: dict[str, Any] = {"dtype": "float64", "sync_bn": "on"}
    whole = lifecycle.train(tiny.config(**slow_keys(tmp_path / "whole", **keys)))
    arguments = slow_run(tiny, tmp_path / "run", **keys)
    with launched(arguments, tmp_path / "run", 2, "--resume", "auto") as running:
        running.reaches(4)
        # Some clusters tell the launcher, some every process, which then hears it twice.
        for told in (*(running.workers() if later == 4 else ()), running.process.pid):
            os.kill(told, signal.SIGTERM)
        code, printed = running.ends()
    assert code == EXIT_INTERRUPTED, printed
    assert "interrupted, all saved; to continue: engine train --resume" in printed
    stopped = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["progress"]["step"]
    assert 4 <= stopped < 18
    with launched(arguments, tmp_path / "run", later, "--resume", "auto") as running:
        code, printed = running.ends()
    assert code == 0, printed
    assert_same_trajectory(whole.path, tmp_path / "run")


@pytest.mark.parametrize(
    ("keys", "expected", "said"),
    [({"lr": 1e30}, 1, "is not finite"), ({"data": "/nowhere"}, 2, "/nowhere")],
    ids=["loss", "data"],
)
def test_what_would_fail_again_is_not_started_again(
    keys: dict[str, Any], expected: int, said: str, tiny: Any, tmp_path: Path
) -> None:
    with launched(slow_run(tiny, tmp_path / "run", **keys), tmp_path / "run") as running:
        code, printed = running.ends()
    assert code == expected, printed
    assert printed.count("engine: ") == printed.count(said) == 1, printed
    others = [
        line
        for line in printed.splitlines()
        if not line.startswith(("student: Kernels: ", "student: Processes: "))
    ]
    assert len(others) == 1 or expected != 2, printed
    assert (tmp_path / "run" / "config.yaml").exists() == (expected == 1), "a run that never began is removed"


def test_two_machines_train_as_one(tiny: Any, tmp_path: Path) -> None:
    """Two launchers that find each other, as torchrun is started on every machine."""
    keys: dict[str, Any] = {"dtype": "float64", "sync_bn": "on"}
    out = tmp_path / "run"
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "both"]
    command += ["-m", "engine", *slow_run(tiny, out, **keys), "--resume", "auto"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen(  # the tests' own command
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    printed = [machine.communicate(timeout=PATIENCE)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(printed)
    assert sum(text.count("epoch 3/3: loss") for text in printed) == 1, "one process speaks for all"
    run_config = tiny.config(**slow_keys(tmp_path / "alone", **keys))
    assert_same_trajectory(lifecycle.train(run_config).path, out)
