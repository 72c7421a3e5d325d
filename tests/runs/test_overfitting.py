"""The guard against catastrophic overfitting: it warns, stops the run, or goes back and on with more steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.attacks import overfitting
from engine.common.stopping import Interrupted, RunFailed
from engine.common.tensor_files import write_tensors
from engine.config import AttackSpec
from engine.plugins.builtin_loggers.numbers_of import TIMINGS
from engine.runs import lifecycle
from engine.runs.reporting import html_report, plots
from engine.runs.run_directory import RunDir
from engine.system.distributed import World
from tests.processes import together
from tests.runs.helpers import Listener, rows_of
from tests.runs.test_resume import StopAt, assert_same_bits, assert_same_run


def overfits(least_steps: int, from_epoch: int) -> Any:
    """A network that overfits from that epoch on, where the attack has fewer steps."""

    def complaint(row: Mapping[str, Any], before: Mapping[str, Any]) -> str:
        return (
            "as told" if row["epoch"] >= from_epoch and row.get("attack_steps", least_steps) < least_steps else ""
        )

    return complaint


def keys_of(tiny: Any, out: Path, **keys: Any) -> dict[str, Any]:
    """A one-step training of three epochs of 6 steps each."""
    given: dict[str, Any] = tiny.config(
        method="fgsm-rs", epochs=3, attack={"num_steps": 1}, eval={"final": []}, loss={"warmup": 0}, out=str(out)
    )
    return given | keys


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rollbacks are due, both from the second epoch."""
    monkeypatch.setattr(overfitting, "complaint", overfits(4, from_epoch=2))


@pytest.mark.usefixtures("twice")
@pytest.mark.parametrize("guard", ["warn", "off"])
def test_a_warning_changes_nothing(guard: str, tiny: Any, tmp_path: Path) -> None:
    listener = Listener()
    run = lifecycle.train(keys_of(tiny, tmp_path / "run", overfitting_guard=guard), listener)
    warnings = [line for line in listener.lines if "overfits" in line]
    assert warnings == [
        f"Warning: epoch {epoch} overfits to the attack of the training: as told"
        for epoch in ((2, 3) if guard == "warn" else ())
    ]
    rows = rows_of(run.path, "epoch")
    assert [row.get("overfitting") for row in rows] == [None, "as told", "as told"]
    assert [row["attack_steps"] for row in rows] == [1, 1, 1]
    assert not (run.path / "good.pt").exists()


@pytest.mark.usefixtures("twice")
def test_a_stop_saves_everything_and_a_rollback_goes_on_from_it(tiny: Any, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    with pytest.raises(
        RunFailed, match=r"^epoch 2 overfits .*: as told; everything is saved, and .*=rollback goes"
    ):
        lifecycle.train(keys_of(tiny, run, overfitting_guard="stop"))
    progress = {name: torch.load(run / f"{name}.pt", weights_only=True)["progress"] for name in ("last", "good")}
    assert {name: value["epoch"] for name, value in progress.items()} == {"last": 2, "good": 1}
    assert progress["last"]["best"]["epoch"] == 1  # whatever its robust accuracy, not the one that overfits

    whole = lifecycle.train(keys_of(tiny, tmp_path / "whole", overfitting_guard="rollback"))
    resumed = lifecycle.resume(run, overfitting_guard="rollback")
    last = [torch.load(path / "last.pt", weights_only=True) for path in (whole.path, resumed.path)]
    for checkpoint in last:
        checkpoint.pop("config")
    assert_same_bits(*last)


@pytest.mark.usefixtures("twice")
def test_a_rollback_goes_back_and_on_with_more_steps(tiny: Any, tmp_path: Path) -> None:
    listener = Listener()
    run = lifecycle.train(keys_of(tiny, tmp_path / "run", overfitting_guard="rollback"), listener).path
    said = [line for line in listener.lines if "overfits" in line]
    for line, steps in zip(said, ("2 steps of 5/255", "4 steps of 2.5/255"), strict=True):
        assert line.startswith("Epoch 2 overfits to the attack of the training: as told; rollback ")
        assert f"back to the end of epoch 1, and on with L-inf, epsilon 8/255, {steps}, random start" in line

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["event"], row["epoch"], row["attack_steps"]) for row in rows if row["event"] != "step"] == [
        ("epoch", 1, 1), ("rollback", 2, 1), ("rollback", 2, 2), ("epoch", 2, 4), ("epoch", 3, 4),
    ]  # fmt: skip
    assert [row["back_to_epoch"] for row in rows if row["event"] == "rollback"] == [1, 1]
    trained = [row["step"] for row in rows if row["event"] == "step"]
    assert trained == sorted(set(trained))
    for row in rows:
        assert 0 <= row["attack_zero_gradients"] < 0.5
    assert set(plots.draw(RunDir(run))) == {"loss.png", "accuracy.png"}
    html_report.write([run], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count("Epoch 2 was rolled back: as told") == 2


def test_the_steps_after_a_rollback_are_those_of_a_run_that_begins_with_them(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the beginning to the end: weights, momentum, and what the telemetry counts."""
    monkeypatch.setattr(overfitting, "complaint", overfits(2, from_epoch=1))
    back = lifecycle.train(keys_of(tiny, tmp_path / "back", overfitting_guard="rollback")).path
    given = {"num_steps": 2, "step_size": 1.25 * (8 / 255) / 2}
    plain = lifecycle.train(keys_of(tiny, tmp_path / "plain", attack=given)).path
    first, second = (torch.load(path / "last.pt", weights_only=True) for path in (back, plain))
    assert_same_bits(first["student"], second["student"])
    assert_same_bits(first["optimizer"], second["optimizer"])
    for one, other in zip(rows_of(back, "step"), rows_of(plain, "step"), strict=True):
        same = other.keys() - TIMINGS
        assert {key: one[key] for key in same} == {key: other[key] for key in same}
    best, _ = (torch.load(path / "best.pt", weights_only=True)["metrics"]["epoch"] for path in (back, plain))
    assert best == first["progress"]["best"]["epoch"]


@pytest.mark.usefixtures("twice")
@pytest.mark.parametrize("step", [4, 6, 9, 12, 16])
def test_a_run_that_is_stopped_around_its_rollbacks_is_the_same(step: int, tiny: Any, tmp_path: Path) -> None:
    keys = {"overfitting_guard": "rollback", "averaging": {"kind": "ema"}, "checkpoint_every": 4}
    whole = lifecycle.train(keys_of(tiny, tmp_path / "whole", **keys))
    stopped = 0
    while stopped < 4:  # at the same step of each pass over it
        try:
            stop = StopAt(step)
            if stopped:
                parts = lifecycle.resume(tmp_path / "parts", stop)
            else:
                parts = lifecycle.train(keys_of(tiny, tmp_path / "parts", **keys), stop)
            break
        except Interrupted:
            stopped += 1
    assert stopped == {4: 1, 6: 1, 9: 3, 12: 3, 16: 1}[step]
    assert_same_run(whole.path, parts.path)


class Killed(BaseException):
    """As SIGKILL: nothing after it is run."""


@pytest.mark.usefixtures("twice")
@pytest.mark.parametrize("place", ["before a rollback is saved", "before good.pt is written"])
def test_a_run_that_is_killed_in_a_rollback_is_the_same(
    place: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.runs import checkpoints, trainer

    keys = {"overfitting_guard": "rollback"}
    whole = lifecycle.train(keys_of(tiny, tmp_path / "whole", **keys))
    with monkeypatch.context() as patch:
        if place == "before a rollback is saved":
            patch.setattr(trainer, "describe", _killed)  # of what it tells after it went back
        else:
            files: list[str] = []

            def killed(path: Path, content: Any) -> None:
                files.append(path.name)
                if files.count("good.pt") == 2:
                    raise Killed
                write_tensors(path, content)

            patch.setattr(checkpoints, "write_tensors", killed)
        with pytest.raises(Killed):
            lifecycle.train(keys_of(tiny, tmp_path / "parts", **keys))
    assert_same_run(whole.path, lifecycle.resume(tmp_path / "parts").path)


def _killed(attack: AttackSpec) -> str:
    raise Killed


def test_no_more_rollbacks_than_are_allowed(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overfitting, "complaint", overfits(1000, from_epoch=2))
    run = tmp_path / "run"
    expected = (
        r"^epoch 2 overfits .*: as told; after 3 rollbacks there is no further one; everything is saved, and"
    )
    with pytest.raises(RunFailed, match=expected):
        lifecycle.train(keys_of(tiny, run, overfitting_guard="rollback"))
    assert [row["attack_steps"] for row in rows_of(run, "rollback")] == [1, 2, 4]
    with pytest.raises(RunFailed, match=expected):
        lifecycle.resume(run)
    assert torch.load(run / "last.pt", weights_only=True)["progress"]["epoch"] == 2
    assert lifecycle.resume(run, overfitting_guard="warn").summary["last"]["attack_steps"] == 8


@pytest.mark.usefixtures("twice")
def test_without_a_good_epoch_there_is_no_rollback(tiny: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        lifecycle.train(keys_of(tiny, run), StopAt(8))
    with pytest.raises(
        RunFailed, match=r"there is no checkpoint of a good epoch to go back to; everything is saved"
    ):
        lifecycle.resume(run, overfitting_guard="rollback")


@pytest.mark.parametrize(("method", "num_steps"), [("at", 2), ("st", 1)])
def test_other_trainings_are_not_measured(method: str, num_steps: int, tiny: Any, tmp_path: Path) -> None:
    given = {"method": method, "attack": {"num_steps": num_steps}, "overfitting_guard": "rollback", "epochs": 1}
    run = lifecycle.train(keys_of(tiny, tmp_path / "run", **given)).path
    (row,) = rows_of(run, "epoch")
    assert not {"probe_fgsm_accuracy", "probe_fgsm_pgd_gap", "attack_steps", "overfitting"} & row.keys()
    assert not (run / "good.pt").exists()


def test_a_measured_run_has_the_gap_in_its_rows(tiny: Any, tmp_path: Path) -> None:
    run = lifecycle.train(keys_of(tiny, tmp_path / "run", epochs=1)).path
    (row,) = rows_of(run, "epoch")
    assert row["attack_steps"] == 1
    assert row["probe_fgsm_accuracy"] - row["probe_fgsm_pgd_gap"] == pytest.approx(
        row["probe_student_adversarial_accuracy"]  # which is of PGD-10, too
    )


def test_two_processes_go_back_together(tiny: Any, tmp_path: Path) -> None:
    keys = keys_of(tiny, tmp_path / "run", overfitting_guard="rollback")
    together(2, train_with_rollbacks, keys)
    run = tmp_path / "run"
    assert [row["attack_steps"] for row in rows_of(run, "epoch")] == [1, 4, 4]
    assert [row["attack_steps"] for row in rows_of(run, "rollback")] == [1, 2]


def train_with_rollbacks(world: World, keys: dict[str, Any]) -> None:
    """A process of the test above; all hold the same weights at the end, or torch would say so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overfitting, "complaint", overfits(4, from_epoch=2))
        lifecycle.train(keys, world=world)
