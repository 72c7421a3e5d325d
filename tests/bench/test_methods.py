"""bench.methods: one protocol for all methods, what is run again, and what the numbers mean."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from scipy import stats

from bench import methods
from bench.lib.machine import Facts
from bench.lib.output import csv_rows
from bench.lib.output.csv_rows import MeasuredRow, MethodRow
from bench.methods import Protocol
from engine import config
from engine.common.stopping import RunFailed
from engine.config.semantics import NAMES
from engine.pipelines.splits import Split
from tests.bench.readme import documented

FACTS = Facts(
    date="2026-01-02T03:04:05", commit="abc", device="cpu", processor="P", cores=2, threads=1, python="3",
    torch="2", triton="",
)  # fmt: skip
KEYS = {"model": "resnet8", "epochs": 3, "batch_size": 16, "lr": 0.05, "limit_train": 40, "device": "cpu"}


def row(method: str, settings: str = "s") -> MethodRow:
    return MethodRow(
        **FACTS, settings=settings, method=method, semantics="paper", model="resnet8", images=40, epochs=3,
        batch_size=16, seed=0, epoch_s=1.25, relative_to_at=1.5, test_images=200,
        attacked_images=50, natural=0.25, pgd20=0.125, chance=0.1, p_value=1e-9, above_chance=True,
    )  # fmt: skip


# ---------------------------------------------------------------- the protocol


@pytest.mark.parametrize("semantics", NAMES)
@pytest.mark.parametrize("name", methods.EVERY)
def test_attack_loss_and_forwards_are_the_method_s_and_the_rest_is_common(name: str, semantics: str) -> None:
    run, own = Protocol(KEYS, "code").of(name, semantics), config.load({"method": name, "semantics": semantics})
    assert (run.loss, run.attack, run.forwards) == (own.loss, own.attack, own.forwards)
    common = Protocol(KEYS, "code").of("at")
    for key in ("model", "dataset", "epochs", "batch_size", "lr", "limit_train", "normalize", "averaging", "eval"):
        assert getattr(run, key) == getattr(common, key)
    assert (run.optim.schedule, run.optim.weight_decay) == ("one-cycle", 5e-4)


def test_settings_and_sources_have_names_of_their_own() -> None:
    one = Protocol(KEYS, "code")
    names = [one.name(one.of(name, semantics)) for name in methods.EVERY for semantics in NAMES]
    longer, changed = Protocol(KEYS | {"epochs": 4}, "code"), Protocol(KEYS, "changed code")
    names += [other.name(other.of("iad1")) for other in (longer, changed)]
    assert len({*names}) == len(names)
    assert one.name(one.of("iad1")) == Protocol(KEYS, "code").name(Protocol(KEYS, "code").of("iad1"))


# ---------------------------------------------------------------- what the numbers mean


@pytest.mark.parametrize(
    ("correct", "n", "classes"), [(0, 7, 10), (7, 7, 10), (73, 500, 10), (60, 500, 10), (3, 9, 2)]
)
def test_the_probability_of_guessing_as_well(correct: int, n: int, classes: int) -> None:
    expected = stats.binom.sf(correct - 1, n, 1 / classes)
    assert methods.chance_of(correct, n, classes) == pytest.approx(expected, rel=1e-9)


def test_a_step_is_timed_beside_one_of_at_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is slower in each round, for both alike: the ratio is that of the steps."""
    taken: list[str] = []

    class Step:
        def __init__(self, run: config.RunConfig, images: Split) -> None:
            self.method = run.method
            assert run.loss.warmup == 0

        def __call__(self) -> None:
            taken.append(self.method)

    class Clock:
        def __init__(self, device: torch.device) -> None:
            self.calls = 0

        def seconds(self, call: Step, count: int) -> float:
            self.calls += 1
            call()
            return {"iad1": 3.0, "at": 2.0}[call.method] * (1 + (self.calls - 1) // 2)

    monkeypatch.setattr(methods, "EngineStep", Step)
    monkeypatch.setattr(methods, "SynchronisedClock", Clock)
    protocol, data = Protocol(KEYS, "code"), SimpleNamespace(train=None)
    assert methods.relative_to(protocol.of("at"), protocol.of("iad1"), data) == 1.5  # type: ignore[arg-type]
    assert taken[2:6] == ["iad1", "at", "at", "iad1"]  # after a step of each that is not counted


# ---------------------------------------------------------------- the command


def invoke(*arguments: str) -> Result:
    found = CliRunner().invoke(methods.main, ["--model", "resnet8", "--device", "cpu", *arguments])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


def test_what_was_measured_is_not_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def measured(facts: Any, protocol: Protocol, run: config.RunConfig, *arguments: Any) -> MethodRow:
        asked.append(run.method)
        if run.method == "mtard" and asked.count("mtard") == 1:
            raise RunFailed("the loss is not finite")
        return dataclasses.replace(row(run.method, protocol.name(run)), epochs=run.epochs)

    monkeypatch.setattr(methods, "measured", measured)
    monkeypatch.setattr("engine.pipelines.datasets.load", lambda *arguments, **keys: None)
    chosen = ("--method", "mtard", "--method", "at", "--out", str(tmp_path))
    first = invoke(*chosen)
    assert (first.exit_code, asked) == (1, ["mtard", "at"])
    assert "mtard: the loss is not finite" in first.output
    again = invoke(*chosen)
    assert (again.exit_code, asked) == (0, ["mtard", "at", "mtard"])
    assert "at: measured before" in again.output
    assert [one.method for one in csv_rows.read(tmp_path / "methods.csv", MethodRow)] == ["at", "mtard"]
    invoke(*chosen, "--epochs", "7")
    assert asked[3:] == ["mtard", "at"]
    assert [one.epochs for one in csv_rows.read(tmp_path / "methods.csv", MethodRow)] == [7, 7]


def test_a_method_is_trained_and_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On digits, with the teachers that it needs; a second call finds them, and the student, trained."""
    monkeypatch.setattr(methods, "RUNS", tmp_path / "runs")
    monkeypatch.setitem(methods.COMMON, "dataset", "digits")
    small = ("--limit-train", "20", "--limit-test", "10", "--epochs", "1", "--batch-size", "10")
    chosen = ("--method", "mtard", *small)
    done = invoke(*chosen, "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert [name in done.output for name in ("at, epoch 1/1", "st, epoch 1/1", "mtard, epoch 1/1")] == [True] * 3
    (found,) = csv_rows.read(tmp_path / "out" / "methods.csv", MethodRow)
    assert (found.method, found.images, found.test_images, found.attacked_images) == ("mtard", 20, 10, 10)
    assert found.above_chance == (found.p_value < methods.LEVEL)
    assert found.p_value == pytest.approx(methods.chance_of(round(10 * found.natural), 10, 10), rel=1e-5)
    assert found.epoch_s > 0
    assert "epoch 1/1" not in invoke(*chosen, "--out", str(tmp_path / "other")).output


def test_without_the_data_set_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(*arguments: Any, **keys: Any) -> None:
        raise ValueError("dataset: cifar10 not found")

    monkeypatch.setattr("engine.pipelines.datasets.load", load)
    done = invoke("--out", str(tmp_path / "out"))
    assert (done.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert "cifar10 not found" in done.output


# ---------------------------------------------------------------- what is written


def test_rows_are_written_read_and_documented(tmp_path: Path) -> None:
    rows = [row("at"), dataclasses.replace(row("iad1"), above_chance=False)]
    csv_rows.write(tmp_path / "methods.csv", rows)
    assert csv_rows.read(tmp_path / "methods.csv", MethodRow) == rows
    own = [field.name for field in dataclasses.fields(MethodRow)][len(dataclasses.fields(MeasuredRow)) :]
    assert documented("methods.csv") == own


def test_columns_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "methods.csv").write_text("date,commit\n2026,abc\n")
    with pytest.raises(ValueError, match="settings"):
        csv_rows.read(tmp_path / "methods.csv", MethodRow)
