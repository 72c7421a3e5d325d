"""Real processes that are killed, find a full disk, or are started twice: nothing is lost, the result is the same.

What several processes of one run survive stands in test_survival.py, signals in test_resume.py.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_resume import assert_same_run

KILLS, EVALUATION_KILLS = 24, 8
FILE_SIZES, DISK_SIZES = 8, 4
PAIRS = 5
PATIENCE = 300.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@dataclass(frozen=True)
class Ended:
    """End of a command, and the seconds until then."""

    code: int
    out: str
    err: str
    seconds: float


def start(arguments: list[str], cache: Path, **keys: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ENGINE_CACHE": str(cache)}
    command = [sys.executable, "-m", "engine", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **keys
    )


def finish(process: subprocess.Popen[str], began: float) -> Ended:
    out, err = process.communicate(timeout=PATIENCE)
    return Ended(process.returncode, out, err, time.monotonic() - began)


def undisturbed(arguments: list[str], cache: Path, **keys: Any) -> Ended:
    began = time.monotonic()
    ended = finish(start(arguments, cache, **keys), began)
    assert ended.code == 0, ended
    return ended


def training(out: Path, *further: str) -> list[str]:
    """Two teachers and a student, each of a few steps, and a final evaluation."""
    keys = {"attack.num_steps": 3, "eval.final": "[natural, pgd20]", "eval.probe_size": 16, "checkpoint_every": 2}
    command = ["train", "--method", "iad2", "--dataset", "digits", "--model", "resnet8", "--device", "cpu"]
    command += ["--limit-train", "100", "--limit-test", "50", "--batch-size", "20", "--epochs", "2"]
    command += [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    return [*command, "--out", str(out), *further]


def evaluation(checkpoint: Path, out: Path) -> list[str]:
    return [
        "eval", str(checkpoint), "--attacks", "natural,fgsm,pgd20", "--batch-size", "50", "--limit", "200",
        "--device", "cpu", "--out", str(out),
    ]  # fmt: skip


def accuracies(out: Path) -> dict[str, float]:
    """Accuracies in the report below a folder, by attack; of several of one attack the newest."""
    (report,) = out.rglob("*.eval.json")
    return {result["attack"]: result["accuracy"] for result in json.loads(report.read_text())["results"]}


def assert_whole(out: Path, whole: Path) -> None:
    """The run is the undisturbed one, to the bit, and nothing is missing or left over."""
    assert_same_run(whole, out)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert (out / "config.yaml").read_bytes() == (whole / "config.yaml").read_bytes()


def temporary(out: Path) -> set[str]:
    """Files that are being written."""
    return {str(path) for path in out.rglob(".*.tmp")}


def is_killed(process: subprocess.Popen[str], out: Path, chance: random.Random, seconds: float) -> bool:
    """Kill a process at a random moment of so many seconds, or in the middle of a random one of its writes.

    False where it ended before.
    """
    until = time.monotonic() + chance.uniform(0, seconds)
    writes = chance.randint(1, 6) if chance.random() < 0.3 else 0
    seen: set[str] = set()
    while process.poll() is None:
        if writes:
            seen |= temporary(out)
        if (writes and len(seen) >= writes) or (not writes and time.monotonic() >= until):
            process.kill()
            return process.wait() != 0
        time.sleep(0.0005 if writes else 0.01)
    return False


def survive(command: list[str], out: Path, cache: Path, chance: random.Random, seconds: float) -> int:
    """Give one command again and again until it ends by itself; how often it was killed."""
    kills = 0
    while True:
        began = time.monotonic()
        process = start(command, cache)
        if is_killed(process, out, chance, seconds):
            process.communicate()
            kills += 1
            continue
        ended = finish(process, began)
        assert ended.code == 0, ended
        return kills


def test_a_run_that_is_killed_wherever_it_is(tmp_path: Path) -> None:
    """In the training of its teachers, in steps, evaluations and writes; by the same command it goes on."""
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    seconds = undisturbed(training(whole), cache).seconds
    chance, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        out, runs = tmp_path / f"killed-{runs}", runs + 1
        kills += survive(training(out, "--resume", "auto"), out, tmp_path / f"cache-{runs}", chance, seconds)
        assert_whole(out, whole)


def test_an_evaluation_that_is_killed_wherever_it_is(tiny: Any, tmp_path: Path) -> None:
    cache, checkpoint = tmp_path / "cache", trained(tmp_path)
    whole, out = tmp_path / "whole", tmp_path / "out"
    seconds = undisturbed(evaluation(checkpoint, whole), cache).seconds
    chance, kills = random.Random(1), 0
    while kills < EVALUATION_KILLS:
        kills += survive(evaluation(checkpoint, out), out, cache, chance, seconds)
        assert accuracies(out) == accuracies(whole)
        shutil.rmtree(out)


def trained(folder: Path) -> Path:
    """A checkpoint of a short training."""
    out = folder / "trained"
    undisturbed([*training(out), "--method", "at", "--set", "eval.final=[]"], folder / "cache")
    return out / "best.pt"


# ---------------------------------------------------------------- full disks


def assert_one_line(ended: Ended, code: int) -> None:
    assert ended.code == code, ended
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert "Traceback" not in ended.out + ended.err


def goes_on_after(ended: Ended, out: Path, whole: Path, cache: Path) -> None:
    """A run that found no room said so, and the same command ends as if there had been room."""
    if ended.code != 0:
        assert_one_line(ended, 2 if not (out / "config.yaml").exists() else 1)
    undisturbed(training(out, "--resume", "auto"), cache)
    assert_whole(out, whole)


def test_files_that_cannot_grow(tmp_path: Path) -> None:
    """Each size is a limit on every file that the process writes; checkpoints are the largest."""
    whole, chance = tmp_path / "whole", random.Random(2)
    undisturbed(training(whole), tmp_path / "cache")
    largest = (whole / "last.pt").stat().st_size
    for number in range(FILE_SIZES):
        size = int(largest ** chance.uniform(0, 1.01))

        def limit(size: int = size) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        out, cache, began = tmp_path / f"small-{number}", tmp_path / f"cache-{number}", time.monotonic()
        ended = finish(start(training(out, "--resume", "auto"), cache, preexec_fn=limit), began)
        goes_on_after(ended, out, whole, cache)


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Callable[[], None]]:
    """A file system of so many bytes; given to the function, it grows."""

    def mount(option: str) -> None:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(place)], check=True, capture_output=True
        )

    place.mkdir()
    try:
        mount(f"size={size}")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system")
    try:
        yield lambda: mount("remount,size=64m")
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_disks_that_are_full(tmp_path: Path) -> None:
    whole, chance = tmp_path / "whole", random.Random(3)
    undisturbed(training(whole), tmp_path / "cache")
    needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    for number in range(DISK_SIZES):
        with small_disk(tmp_path / f"disk-{number}", int(needed * chance.uniform(0.02, 0.9))) as grow:
            out, cache = tmp_path / f"disk-{number}" / "run", tmp_path / f"disk-{number}" / "cache"
            began = time.monotonic()
            ended = finish(start(training(out, "--resume", "auto"), cache), began)
            assert ended.code != 0, "it had room"
            grow()
            goes_on_after(ended, out, whole, cache)


# ---------------------------------------------------------------- two at once


@pytest.mark.parametrize("further", [(), ("--resume", "auto")], ids=["new", "auto"])
def test_two_identical_trainings_at_once(further: tuple[str, ...], tmp_path: Path) -> None:
    """One of the two trains; the other leaves with a line, and leaves everything as it is."""
    whole = tmp_path / "whole"
    undisturbed(training(whole), tmp_path / "cache")
    for number in range(PAIRS):
        out, cache, began = tmp_path / f"pair-{number}", tmp_path / f"cache-{number}", time.monotonic()
        pair = [start(training(out, *further), cache) for _ in range(2)]
        ended = sorted((finish(process, began) for process in pair), key=lambda one: one.code)
        assert ended[0].code == 0, ended
        if ended[1].code != 0:  # else it came when all was done
            assert_one_line(ended[1], 2)
            assert out.name in ended[1].err
        assert_whole(out, whole)


def test_two_identical_evaluations_at_once(tmp_path: Path) -> None:
    checkpoint, cache, whole = trained(tmp_path), tmp_path / "cache", tmp_path / "whole"
    undisturbed(evaluation(checkpoint, whole), cache)
    for number in range(PAIRS):
        out, began = tmp_path / f"pair-{number}", time.monotonic()
        pair = [start(evaluation(checkpoint, out), cache) for _ in range(2)]
        for ended in [finish(process, began) for process in pair]:
            if ended.code != 0:
                assert_one_line(ended, 2)
        assert accuracies(out) == accuracies(whole)
