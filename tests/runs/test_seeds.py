"""Runs of several seeds, side by side: real processes on a CPU; GPUs by what a process would be told."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import config
from engine.common import stopping
from engine.common.console import Reporter
from engine.common.stopping import Interrupted, Stop, graceful_stop
from engine.runs import lifecycle, seeds, teachers
from engine.runs.run_directory import RunDir
from engine.runs.session import Session
from engine.system import distributed, precision
from engine.system.distributed import World

PATIENCE = 240.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0..7", tuple(range(8))), ("0,3,5", (0, 3, 5)), ("4, 0..2,9", (4, 0, 1, 2, 9)), ("7", (7,)), ("3..3", (3,))],
)
def test_lists_of_seeds(text: str, expected: tuple[int, ...]) -> None:
    assert seeds.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "'' is no seed and no range"),
        ("0,", "'' is no seed and no range"),
        ("-1", "'-1' is no seed and no range"),
        ("0...3", "'0...3' is no seed and no range"),
        ("0..", "'0..' is no seed and no range"),
        ("1.5", "'1.5' is no seed and no range"),
        ("9" * 30, "is no seed and no range"),
        ("3..1", "the range 3..1 runs backwards"),
        ("0..3,2", "2 is given twice"),
        ("0..1000", "more than 1,000 seeds"),
        ("0..999999999999", "more than 1,000 seeds"),
        ("9223372036854775808", "9223372036854775808 is too large"),
    ],
)
def test_what_is_no_list_of_seeds(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        seeds.parse(text)


def test_a_thousand_seeds_are_taken() -> None:
    assert seeds.parse("0..999") == tuple(range(1000))


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, ["0", "1", "2"]), ("5,4,7,6", ["5", "4", "7"]), ("GPU-a, GPU-b,GPU-c", None)]
)
def test_each_process_sees_a_gpu_of_its_own(
    visible: str | None, expected: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    told = [place["CUDA_VISIBLE_DEVICES"] for place in seeds.slots(3, gpus=True)]
    assert told == (expected or ["GPU-a", "GPU-b", "GPU-c"])


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(9)))
    assert [place.get("OMP_NUM_THREADS") for place in seeds.slots(4, gpus=False)] == ["2"] * 4
    assert "OMP_NUM_THREADS" not in seeds.slots(1, gpus=False)[0]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in seeds.slots(4, gpus=False)[0]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--seeds", "0..1", "--seed", "0"], "--seed and --seeds exclude each other"),
        (["--seeds", "0..1", "--set", "seed=3"], "--set seed and --seeds exclude each other"),
        (["--seeds", "0..1", "--resume", "somewhere"], "--resume DIR and --seeds exclude each other"),
        (["--seeds", "1..0", "--device", "cpu"], "the range 1..0 runs backwards"),
        (["--seeds", "0..1", "--gpus", "999"], "--gpus 999: this machine has"),
    ],
)
def test_what_excludes_each_other(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "engine", "train", *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert found.returncode == 2
    assert complaint in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_the_table_has_means_and_sample_deviations() -> None:
    values = {0: 0.50, 3: 0.54, 5: 0.61}
    summaries = {
        seed: {"best": {"epoch": seed + 1}, "test_of_best": {"natural": {"accuracy": value}}}
        for seed, value in values.items()
    }
    table = seeds.table(summaries, "best")
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["0", "3", "5", "mean +- std, n = 3"]
    assert cells[1] == ["1", "4", "6", ""]
    assert cells[2] == ["50.00%", "54.00%", "61.00%", "55.00% +- 5.57"]
    assert 100 * statistics.stdev(values.values()) == pytest.approx(5.57, abs=0.005)
    alone = seeds.table({0: summaries[0]}, "best")
    assert [list(column.cells)[-1] for column in alone.columns] == ["mean, n = 1", "", "50.00%"]


def test_without_final_attacks_the_table_shows_held_out_images() -> None:
    row = {"natural_accuracy": 0.5, "robust_accuracy": 0.25, "measured_on": "validation"}
    found = seeds.accuracies({"last": row}, "last")
    assert found == {"natural on validation images": 0.5, "robust on validation images": 0.25}


def test_the_parent_s_signal_beside_another_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(stopping.RELAYED, "1")
    with graceful_stop(lambda said: None) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested


def test_the_warning_says_what_to_do_below_64_images() -> None:
    assert distributed.small_batch_warning(64) == ""
    warning = distributed.small_batch_warning(63)
    assert "63 images a GPU" in warning
    assert all(word in warning for word in ("--batch-size", "--lr-scale linear", "fewer GPUs", "--seeds"))


# ---------------------------------------------------------------- one teacher for several runs


def session(path: Path, console: Reporter, stop: Stop) -> Session:
    settings = config.load({"device": "cpu"})
    return Session(settings, precision.choose(settings), World(), console, stop, RunDir(path))


def test_a_run_waits_for_a_teacher_that_another_one_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "_SECONDS_BETWEEN_LOOKS", 0.01)
    cached, said, waits = tmp_path / "cache" / "at.pt", list[str](), threading.Event()

    class Said(Reporter):
        def message(self, text: str) -> None:
            said.append(text)
            waits.set()

    waiting = session(tmp_path, Said(), Stop())

    def second() -> None:
        with teachers._reserved(cached, waiting):
            said.append("kept" if cached.exists() else "absent")

    with teachers._reserved(cached, waiting):
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(PATIENCE)
        cached.write_bytes(b"weights")
    thread.join(PATIENCE)
    assert said == ["Another run trains this teacher: waiting for it", "kept"]


def test_a_run_that_waits_for_a_teacher_can_be_stopped(tmp_path: Path) -> None:
    stop = Stop()
    stop.requested = True
    with (tmp_path / ".at.pt.lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with (
            pytest.raises(Interrupted),
            teachers._reserved(tmp_path / "at.pt", session(tmp_path, Reporter(), stop)),
        ):
            pass


# ---------------------------------------------------------------- real processes


def command(tiny: Any, **keys: Any) -> list[str]:
    quick = {"method": "at", "epochs": 1, "eval": {"final": ["natural"]}, "limit_train": 16, "limit_test": 6}
    return [sys.executable, "-m", "engine", *tiny.flags(**config.merge(quick, keys))]


def run(arguments: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, env=environment)


def before(text: str, first: str, second: str) -> bool:
    """True if all that the one pattern finds stands before all that the other one finds."""
    places = [[match.start() for match in re.finditer(pattern, text)] for pattern in (first, second)]
    return max(places[0]) < min(places[1])


def student(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(path / "last.pt", weights_only=True)["student"]
    return found


def test_a_failing_run_does_not_stop_the_others_and_all_are_single_runs(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "all" / "seed-1").mkdir(parents=True)
    (tmp_path / "all" / "seed-1" / "config.yaml").write_text("method: st\n")
    found = run([*command(tiny), "--procs", "3", "--seeds", "0..2", "--out", "all"], tmp_path)
    assert found.returncode == 2, found.stdout + found.stderr
    assert "seed 1: failed: --out all/seed-1 holds a run already" in found.stdout
    assert "1 of 3 runs failed: seed 1" in found.stderr
    assert "mean +- std, n = 2" in found.stdout
    assert before(found.stdout, r"seed [02]: begins", r"seed [02]: ended")  # side by side
    assert (tmp_path / "all" / "seed-1" / "config.yaml").read_text() == "method: st\n"
    assert "Next: engine report all" in found.stdout
    assert "Next: engine eval all/seed-*" in found.stdout
    assert "engine train --resume all" in found.stderr
    refused = run([*command(tiny)[:3], "train", "--resume", "all"], tmp_path)
    assert refused.returncode == 2
    assert "all is no group of one configuration: seed-1 differs from seed-0 in " in refused.stderr
    single = run([*command(tiny), "--seed", "2", "--out", "single"], tmp_path)
    assert single.returncode == 0, single.stderr
    ours, theirs = student(tmp_path / "all" / "seed-2"), student(tmp_path / "single")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    other = student(tmp_path / "all" / "seed-0")
    assert not all(torch.equal(ours[name], other[name]) for name in ours)
    configurations = [(tmp_path / name / "config.yaml").read_text() for name in ("all/seed-2", "single")]
    assert configurations[0] == configurations[1]


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_sigterm_saves_all_and_resume_auto_goes_on(tiny: Any, tmp_path: Path) -> None:
    long = command(tiny, epochs=20)
    arguments = [*long, "--procs", "2", "--seeds", "0,1,4", "--out", "all"]
    process = subprocess.Popen(
        arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_until(lambda: all((tmp_path / "all" / f"seed-{n}" / "last.pt").exists() for n in (0, 1)), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, out + err
    assert "0 of 3 runs are finished; to continue: engine train --resume all" in err
    assert [path.name for path in (tmp_path / "all" / "seed-4").iterdir()] == ["config.yaml"]
    begun = {
        n: torch.load(tmp_path / f"all/seed-{n}/last.pt", weights_only=True)["progress"]["step"] for n in (0, 1)
    }
    assert all(0 < step < 40 for step in begun.values())
    again = run([*command(tiny)[:3], "train", "--resume", "all", "--procs", "2"], tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "mean +- std, n = 3" in again.stdout
    last = RunDir(tmp_path / "all" / "seed-0").last.stat().st_mtime_ns
    third = run([*arguments, "--resume", "auto"], tmp_path)
    assert third.stdout.count("finished before") == 3
    assert RunDir(tmp_path / "all" / "seed-0").last.stat().st_mtime_ns == last
    whole = lifecycle.train(tiny.config(
        method="at", epochs=20, eval={"final": ["natural"]}, limit_train=16, limit_test=6, seed=1,
        out=str(tmp_path / "whole"),
    ))  # fmt: skip
    ours, theirs = student(tmp_path / "all" / "seed-1"), student(whole.path)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_crashes_is_named_and_the_rest_goes_on(tiny: Any, tmp_path: Path) -> None:
    arguments = [*command(tiny, epochs=40), "--procs", "2", "--seeds", "0,1", "--out", "all"]
    process = subprocess.Popen(
        arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_until((tmp_path / "all" / "seed-0" / "last.pt").exists, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (victim,) = [n for n in children if b"all/seed-0" in Path(f"/proc/{n}/cmdline").read_bytes()]
    os.kill(int(victim), signal.SIGKILL)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, out + err
    assert re.search(r"seed 0: failed after .* s, killed by SIGKILL", out)
    assert "seed 1: ended" in out
    assert "1 of 2 runs failed: seed 0" in err


def test_a_group_without_a_place_is_one_directory_and_is_found_again(tiny: Any, tmp_path: Path) -> None:
    """Its seeds share a teacher, which is trained once; killed and resumed, it has the same numbers."""
    cache = {"ENGINE_CACHE": str(tmp_path / "cache")}
    shared = {
        "method": "ard",
        "teacher": {"checkpoint": None, "method": "st", "seed": 7, "epochs": 1},
        "epochs": 2,
    }
    arguments = [*command(tiny, **shared), "--seeds", "0..1", "--procs", "2"]
    first = run(arguments, tmp_path, **cache)
    assert first.returncode == 0, first.stdout + first.stderr
    (group,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"ard-folder-resnet8-\d{8}-\d{6}", group.name)
    assert sorted(path.name for path in group.iterdir()) == ["seed-0", "seed-1"]
    assert "teacher: all seeds learn from the same one, of seed 7" in first.stdout
    logs = [(group / f"seed-{seed}" / "log.txt").read_text() for seed in range(2)]
    assert sum("training one first" in log for log in logs) == 1
    assert len(list((tmp_path / "cache" / "teachers").glob("*.pt"))) == 1
    assert sum((group / f"seed-{seed}" / "teacher").exists() for seed in range(2)) == 1
    whole = {seed: student(group / f"seed-{seed}") for seed in range(2)}
    measured = {seed: RunDir(group / f"seed-{seed}").read_summary() for seed in range(2)}

    again = run([*arguments, "--resume", "auto"], tmp_path, **cache)
    assert again.stdout.count("finished before") == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [group.name]

    killed = killed_group(arguments, tmp_path, cache)
    resumed = run([*command(tiny)[:3], "train", "--resume", str(killed), "--procs", "2"], tmp_path, **cache)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"Next: engine eval {killed}/seed-*" in resumed.stdout
    for seed in range(2):
        ours, summary = student(killed / f"seed-{seed}"), RunDir(killed / f"seed-{seed}").read_summary()
        assert all(torch.equal(ours[name], whole[seed][name]) for name in whole[seed])
        assert results(summary) == results(measured[seed])


def results(summary: dict[str, Any] | None) -> list[Any]:
    assert summary is not None
    found = [summary[f"test_of_{which}"]["natural"]["correct"] for which in ("best", "last")]
    return [*found, *(summary[which]["robust_accuracy"] for which in ("best", "last"))]


def killed_group(arguments: list[str], folder: Path, cache: dict[str, str]) -> Path:
    """A group whose processes are all killed once both runs have saved something."""
    place = folder / "killed"
    process = subprocess.Popen(
        [*arguments, "--out", str(place), "--set", "checkpoint_every=1"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | cache | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_until(lambda: any((place / f"seed-{n}" / "last.pt").exists() for n in (0, 1)), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for number in (process.pid, *map(int, children)):
        os.kill(number, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    return place


def test_a_group_and_a_single_run_do_not_share_a_place(tiny: Any, tmp_path: Path, cli: Any) -> None:
    (tmp_path / "group" / "seed-3").mkdir(parents=True)
    for name in ("single", "group/seed-3"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.yaml").write_text("method: st\n")
    outcome = cli(*tiny.flags(), "--seeds", "0..1", "--out", str(tmp_path / "single"))
    assert (outcome.code, "holds a single run" in outcome.err) == (2, True)
    outcome = cli(*tiny.flags(), "--out", str(tmp_path / "group"))
    assert (outcome.code, "holds a group of seeds" in outcome.err) == (2, True)
    assert not (tmp_path / "group" / "config.yaml").exists()


def test_a_group_of_which_no_run_has_begun_is_removed(tiny: Any, tmp_path: Path) -> None:
    broken = [*command(tiny), "--set", "data=nowhere", "--seeds", "0,1"]
    found = run(broken, tmp_path)
    assert found.returncode == 2, found.stdout
    assert "2 of 2 runs failed: seed 0, 1" in found.stderr
    assert "--resume" not in found.stderr
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        ({"checkpoint": "t.pt"}, "teacher: all seeds learn from t.pt"),
        ({"seed": 5}, "teacher: all seeds learn from the same one, of seed 5"),
        ({}, "teacher: every seed has its own, of seed + 1"),
    ],
)
def test_it_is_said_whether_seeds_share_a_teacher(teacher: dict[str, Any], told: str) -> None:
    (line,) = seeds._teachers(config.load({"method": "iad1", "teacher": teacher, "seed": 3}))
    assert line.startswith(told)
    assert seeds._teachers(config.load({"method": "at"})) == []


def test_a_group_is_evaluated_and_described_as_a_whole(tiny: Any, tmp_path: Path, cli: Any) -> None:
    for seed, checkpoint in enumerate((tiny.teacher, tiny.teacher_st)):
        folder = tmp_path / "group" / f"seed-{seed}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"method: at\nseed: {seed}\n")
        (folder / "best.pt").write_bytes(checkpoint.read_bytes())
    (tmp_path / "group" / "seed-x").mkdir()
    group = str(tmp_path / "group")
    data = ("--dataset", "folder", "--data", str(tiny.folder))
    outcome = cli("eval", group, *data, "--attacks", "natural,fgsm")
    assert outcome.code == 0, outcome.err
    accuracies = [
        json.loads((tmp_path / "group" / f"seed-{seed}" / "best.pt.eval.json").read_text())["results"][0][
            "accuracy"
        ]
        for seed in (0, 1)
    ]
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    told = f"{group}: mean +- standard deviation of 2 seeds: Natural {mean:.2%} +- {100 * deviation:.2f}, FGSM"
    assert told in outcome.out
    outcome = cli("inspect", group, "--json")
    found = json.loads(outcome.out)
    assert found["kind"] == "group of seeds"
    assert [row[:2] for row in found["rows"]] == [[0, False], [1, False]]
    assert found["next"] == [f"engine train --resume {group}"]
    (tmp_path / "group" / "seed-1" / "best.pt").unlink()
    outcome = cli("eval", group, *data)
    assert outcome.code == 2
    assert f"seed-1/best.pt is not there yet: engine train --resume {group}" in outcome.err
