"""A training by several processes that is killed within an epoch and goes on, beside one that is not killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine import config
from engine.runs import checkpoints

_SECONDS_BETWEEN_LOOKS = 0.05


class KilledRun(NamedTuple):
    """steps: of the whole run. killed_after: steps that the last checkpoint had; 0: it ended before it was killed.

    is_same: weights, momentum and statistics of both runs are equal to the bit. seconds: of the undisturbed run.
    """

    steps: int
    killed_after: int
    is_same: bool
    seconds: float


def outcome(keys: dict[str, Any], processes: int, folder: Path) -> KilledRun:
    """Train twice, into `folder`, the second time killed. Raises RuntimeError where a run fails."""
    whole, killed = folder / "whole", folder / "killed"
    begin = time.perf_counter()
    _wait(_start(_training(keys, processes, whole), folder / "whole.log"), folder / "whole.log")
    seconds = time.perf_counter() - begin
    steps = checkpoints.read(whole / "last.pt")["progress"]["step"]
    killed_after = _kill_in_the_middle(keys, processes, killed, steps)
    if killed_after:
        command = ["train", "--resume", str(killed), *_processes(processes)]
        _wait(_start(command, folder / "resumed.log"), folder / "resumed.log")
    ends = [checkpoints.read(path / "last.pt") for path in (whole, killed)]
    is_same = all(_is_same(*(end[part] for end in ends)) for part in ("student", "optimizer"))
    return KilledRun(steps, killed_after, is_same, seconds)


def _kill_in_the_middle(keys: dict[str, Any], processes: int, path: Path, steps: int) -> int:
    """Steps of the checkpoint that a killed run has left: some, and not all."""
    run = _start(_training(keys, processes, path), path.with_suffix(".log"))
    while run.poll() is None:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        if (path / "last.pt").exists():
            family = [run.pid, *_below(run.pid)]  # the launcher first: it would start its processes anew
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            run.wait()
            done: int = checkpoints.read(path / "last.pt")["progress"]["step"]
            return done if done < steps else 0
    _wait(run, path.with_suffix(".log"))
    return 0


def _training(keys: dict[str, Any], processes: int, out: Path) -> list[str]:
    complete = config.load(keys | {"checkpoint_every": 1, "out": str(out)})
    return ["train", *config.assignments(config.explicit(complete.tree())), *_processes(processes)]


def _processes(count: int) -> list[str]:
    return ["--procs", str(count)] if count > 1 else []


def _start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        command = [sys.executable, "-m", "engine", *arguments]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)  # noqa: S603  # no shell


def _wait(run: subprocess.Popen[bytes], log: Path) -> None:
    if run.wait():
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"a run of the benchmark failed: {' '.join(last)}")


def _below(pid: int) -> list[int]:
    """Processes that a process has started, and those that these have."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [each for child in map(int, text.split()) for each in (child, *_below(child))]


def _is_same(left: object, right: object) -> bool:
    """True if both are the same structure of equal tensors and values."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_is_same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_is_same, left, right))
    return bool(left == right)
