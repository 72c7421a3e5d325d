"""bench.ablation: what is turned off, what is left out, and what the numbers mean."""

from __future__ import annotations

import csv
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bench import ablation, gate
from bench.lib.machine import Facts
from bench.lib.output import csv_rows
from bench.lib.output.csv_rows import AblationRow, MeasuredRow
from bench.lib.steps import variants
from engine.attacks.twin import Twin
from engine.common import host_memory
from engine.kernels import dispatch
from engine.runs import format_probe
from tests.bench.readme import documented

FACTS = Facts(
    date="2026-01-02T03:04:05", commit="abc", device="cpu", processor="P", cores=2, threads=2, python="3",
    torch="2", triton="",
)  # fmt: skip


def workload(device: str = "cpu") -> variants.Workload:
    return variants.Workload("iad1", "resnet8", 2, variants.images_of(variants.RANDOM, 2), torch.device(device))


def test_the_ratio_is_that_of_a_round() -> None:
    samples = {"nothing": [1.0, 2.0, 4.0], "lanes": [2.0, 3.0, 4.0]}
    peaks = {"nothing": 100.0, "lanes": 150.0}
    on, off = (csv_rows.ablation_row(FACTS, workload(), name, "nothing", samples, 1, peaks) for name in samples)
    assert (on.relative, on.relative_memory) == (1.0, 1.0)
    assert (off.relative, off.median_s, off.relative_memory) == (1.5, 3.0, 1.5)  # of 2, 1.5 and 1
    assert [off.q10_relative, off.q90_relative] == pytest.approx([1.1, 1.9])
    unknown = csv_rows.ablation_row(FACTS, workload(), "lanes", "nothing", samples, 1, dict.fromkeys(samples))
    assert (unknown.peak_mib, unknown.relative_memory) == (None, None)


def test_on_a_cpu_what_a_gpu_alone_has_is_left_out() -> None:
    taken, left_out = ablation.there(workload())
    assert next(iter(taken)) == ablation.ALL_ON
    assert {"amp", "folding", "ops", "kept memory"} <= taken.keys()
    assert not {"compile", "lanes", "graphs", "graph of the step"} & taken.keys()
    named = {line.split(": ")[1] for line in left_out}
    assert named | taken.keys() == ablation.features().keys()
    assert not named & taken.keys()


def test_where_amp_is_float32_it_cannot_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    gains = {"float32": 1.0, "winograd": 1.0, "bfloat16": 0.5}
    monkeypatch.setattr(format_probe, "gains_of", lambda run: gains)
    taken, left_out = ablation.there(workload(), ["amp", "folding"])
    assert list(taken) == ["nothing", "folding"]
    assert left_out == ["left out: amp: --amp is float32 here"]


def test_an_op_that_plain_torch_serves_anyway_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.SERVED_BY, "new_op", {"cpu": ("reference",), "cuda": ("reference",)})
    taken, left_out = ablation.there(workload(), ["op new_op"])
    assert list(taken) == ["nothing"]
    assert left_out == ["left out: op new_op: the reference serves it anyway"]


@pytest.mark.parametrize(("default", "absent"), [("off", True), ("auto", False)])
def test_a_key_that_is_off_by_itself_is_not_turned_off(default: str, absent: bool) -> None:
    run: Any = types.SimpleNamespace(key=default)
    assert bool(ablation._is_off("key")(workload(), run)) is absent


def test_ops_are_plain_torch_s_while_they_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGINE_KERNELS", raising=False)
    cpu = torch.device("cpu")
    with ablation.features()["ops"].off():
        assert {dispatch.choose(op, cpu) for op in dispatch.SERVED_BY} == {"reference"}
    assert "ENGINE_KERNELS" not in os.environ


def test_teachers_keep_batch_norm_where_folding_is_off(bf16: None) -> None:
    def norms(name: str) -> int:
        feature = ablation.features()[name]
        with feature.off():
            step: Any = workload().step(feature.variant)
        (teacher,) = step.learner.networks.teachers.values()
        assert isinstance(teacher, Twin)
        return sum(isinstance(module, torch.nn.BatchNorm2d) for module in teacher.module.modules())

    assert norms("folding") == 9
    assert norms("nothing") == 0


def test_autocast_converts_weights_and_the_attack_takes_the_whole_network_where_asked(bf16: None) -> None:
    def found(name: str) -> tuple[bool, bool]:
        feature = ablation.features()[name]
        with feature.off():
            step: Any = workload().step(feature.variant)
        return step.learner.halves is not None, step.learner.networks.adversary.twin.division is not None

    assert found("nothing") == (True, True)
    assert found("half weights") == (False, True)
    assert found("division") == (True, False)


def test_kept_memory_is_given_back_where_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda: said.append("keep"))
    monkeypatch.setattr(host_memory, "return_freed_memory", lambda: said.append("give back"))
    for name in ("nothing", "kept memory"):
        with ablation.features()[name].off():
            pass
    assert said == ["keep", "give back"]


def test_steps_take_turns_each_under_its_own_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str]] = []
    inside = [""]

    def feature(name: str) -> ablation.Feature:
        @contextmanager
        def without() -> Iterator[None]:
            inside[0] = name
            yield
            inside[0] = ""

        return ablation.Feature(name, without=without)

    taken = {name: feature(name) for name in ("nothing", "a", "b")}
    monkeypatch.setattr(
        ablation,
        "warmed_up",
        lambda work, one: ablation.Ready(lambda: ran.append((one.description, inside[0])), None),
    )
    rows = ablation.measure(workload(), taken, 2, FACTS)
    assert [name for name, _ in ran] == ["nothing", "a", "b", "a", "b", "nothing"]
    assert all(name == within for name, within in ran)
    assert [row.off for row in rows] == list(taken)
    assert rows[0].relative == 1.0


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: None) -> None:
    monkeypatch.setattr(gate, "tests_pass", lambda *given: True)
    few = ("--model", "resnet8", "--batch-size", "2", "--rounds", "2", "--device", "cpu")
    chosen = ("--method", "at", "--off", "amp", "--off", "lanes")
    done = CliRunner().invoke(ablation.main, [*few, *chosen, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "left out: lanes: it exists on a GPU alone" in done.output
    with (tmp_path / "ablation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    own = [field.name for field in fields(AblationRow)][len(fields(MeasuredRow)) :]
    assert documented("ablation.csv") == own == list(rows[0])[-len(own) :]
    assert [row["off"] for row in rows] == ["nothing", "amp"]
    assert float(rows[0]["relative"]) == 1
    assert all(float(row["relative"]) > 0 and row["peak_mib"] == "" for row in rows)


def test_nothing_is_timed_where_the_step_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "tests_pass", lambda *given: False)
    done = CliRunner().invoke(ablation.main, ["--model", "resnet8", "--batch-size", "2", "--device", "cpu"])
    assert done.exit_code == 1
    assert "nothing is timed" in done.output
