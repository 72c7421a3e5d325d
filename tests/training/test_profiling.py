"""`engine train --profile N`: the table and the trace of a run, its ranges, and the arithmetic of lanes."""

from __future__ import annotations

import ast
import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.common.stopping import Interrupted
from engine.config import load
from engine.pipelines.splits import Split
from engine.runs import assemble, lifecycle
from engine.system import precision
from engine.training.performance import profiling
from engine.training.performance.profiling import DETAILS, PHASES
from tests.processes import ROOT
from tests.runs.test_resume import StopAt


def test_a_run_is_profiled(tiny: Any, tmp_path: Path, cli: Any) -> None:
    run = tmp_path / "run"
    keys = {"method": "iad2", "epochs": 1, "loss": {"warmup": 0}, "awp": {"gamma": 0.01}, "out": str(run)}
    outcome = cli(*tiny.flags(**keys), "--profile", "2")
    assert outcome.code == 0, outcome.err
    with (run / "profile.csv").open() as file:
        lines = {row["name"]: row for row in csv.DictReader(file)}
    assert list(lines) == list(PHASES)
    calls = {name: float(row["calls"]) for name, row in lines.items()}
    assert calls == {
        "data": 1, "attack": 1, "attack: forward": 2, "attack: backward": 2, "attack: update": 2, "teachers": 2,
        "student": 2, "loss": 2, "backward": 1, "weight attack": 1, "optimizer": 1,
    }  # fmt: skip
    times = {name: float(row["host_ms"]) for name, row in lines.items()}
    assert min(times.values()) > 0
    assert times["attack"] > times["attack: forward"] + times["attack: backward"] + times["attack: update"]
    assert all(float(row["device_ms"]) == 0 for row in lines.values())
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    named = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert named.count("student") == 4
    assert "Profile of 2 steps" in outcome.out
    assert "% of the device's measured matrix-product speed" in outcome.out


def test_the_share_of_the_peak_is_shown_with_a_profile_alone(tiny: Any, tmp_path: Path, cli: Any) -> None:
    run = tmp_path / "run"
    outcome = cli(*tiny.flags(method="st", epochs=1, out=str(run)))
    assert "images/s" in outcome.out
    assert "matrix-product speed" not in outcome.out
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["share_of_peak"] > 0 for row in rows if row["event"] == "step")


def test_a_run_shorter_than_the_profile_leaves_none(tiny: Any, tmp_path: Path, cli: Any) -> None:
    run = tmp_path / "run"
    outcome = cli(*tiny.flags(method="st", epochs=1, out=str(run)), "--profile", "50")
    assert outcome.code == 0, outcome.err
    assert not (run / "profile.csv").exists()
    assert "There is no profile: it takes 53 steps, and the run had 6" in outcome.out


@pytest.mark.parametrize(
    ("streams", "share"),
    [
        ([], None),
        ([[(0, 10)]], None),
        ([[(0, 10)], [(2, 4), (8, 12)]], 4 / 6),
        ([[(2, 4), (3, 5)], [(0, 2), (1, 10)]], 1.0),  # touching and overlapping kernels are one interval
        ([[(0, 10)], [(20, 22)], [(5, 6)]], 1 / 3),
    ],
)
def test_overlap_of_streams(streams: Any, share: float | None) -> None:
    assert profiling.overlap(streams) == (None if share is None else pytest.approx(share))


def test_a_run_that_goes_on_can_be_traced(tiny: Any, tmp_path: Path, cli: Any) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(method="at", out=str(run)), StopAt(2))
    assert cli("train", "--resume", str(run), "--profile", "3").code == 0
    assert (run / "trace.json").exists()


# ---------------------------------------------------------------- the table of ranges


def ranges_of_the_source() -> set[str]:
    """Names of all ranges in engine/, which are written where they are opened."""
    found = set()
    for path in (ROOT / "engine").glob("*/**/*.py"):  # kernels/ and pipelines/ by their links
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("record_function"):
                (name,) = node.args
                assert isinstance(name, ast.Constant), f"{path}: a range without a fixed name"
                assert isinstance(name.value, str)
                found.add(name.value)
    return found


def test_every_range_has_a_row_and_every_row_a_range() -> None:
    assert ranges_of_the_source() == set(PHASES) | set(DETAILS)
    assert not set(PHASES) & set(DETAILS)


def test_a_step_runs_every_range_of_the_table() -> None:
    run = load(
        {
            "method": "iad2",
            "model": "resnet8",
            "device": "cpu",
            "batch_size": 4,
            "mixup": 1,
            "awp": {"gamma": 0.01},
        }
    )
    cpu = precision.choose(run)
    images = Split(torch.zeros(8, 8, 8, 3, dtype=torch.uint8), torch.arange(8) % 4, tuple("abcd"))
    student, at, st = (assemble.build_student(run, images, cpu) for _ in range(3))
    learner = assemble.build_learner(run, student, {"teacher": at.eval(), "teacher_st": st.eval()}, cpu)
    batches = learner.batches(assemble.build_pipeline(run, images, cpu, kind="tensor").epoch(0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        learner.learn(next(batches), learner.method, run.lr)
    found = {event.name for event in profile.events() or () if event.is_user_annotation}
    of_torch = {name for name in found if name.startswith("Optimizer.")}
    assert found - of_torch == set(PHASES) | set(DETAILS)


def test_the_documentation_lists_the_phases() -> None:
    lines = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| phase | contents |") + 2
    documented = dict(line.strip("| ").split(" | ") for line in lines[start : start + len(PHASES)])
    assert documented == {f"`{name}`": what for name, what in PHASES.items()}
    assert lines[start + len(PHASES) :][:1] in ([], [""])  # and no others
