"""Begin and end of runs: what a caller may give, and what is closed when a run ends early."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine import config
from engine.common.stopping import Interrupted, RunFailed
from engine.runs import assemble, checkpoints, lifecycle, provenance, trainer
from engine.runs.reporting import plots
from engine.runs.run_directory import RunDir
from engine.runs.session import Session
from engine.system import precision
from engine.training.learner import Learner
from tests.runs.helpers import Bar, rows_of
from tests.runs.test_resume import StopAt

# ---------------------------------------------------------------- what a caller may give


def test_keys_may_be_given_by_name(tiny: Any, tmp_path: Path) -> None:
    keys = tiny.config(method="st", limit_train=16)
    run = engine.train(keys, epochs=1, out=str(tmp_path / "run"))
    assert [row["epoch"] for row in rows_of(run.path, "epoch")] == [1]
    assert engine.train(**keys | {"epochs": 1, "out": str(tmp_path / "other")}).summary["last"]["epoch"] == 1
    assert config.read_file(run.path / "config.yaml") == config.read_file(tmp_path / "other" / "config.yaml")
    with pytest.raises(ValueError, match="unknown key 'epoch'; did you mean 'epochs'"):
        engine.train(keys, epoch=1)


@pytest.mark.parametrize("given", ["path/to/config.yaml", 3, ["method"], Path("x"), object()])
def test_what_is_no_configuration_is_said(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^run_config: a RunConfig or a mapping of its keys is expected, got "):
        engine.train(given)


# ---------------------------------------------------------------- what is closed


class Resources:
    """Resources of a run that are open, in the order in which they were opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open: list[str] = []
        self._monkeypatch = monkeypatch
        for owner, maker, name in (
            (assemble, "build_pipeline", "pipeline"),
            (lifecycle, "MetricsWriter", "rows"),
            (lifecycle, "Profiler", "profile"),
        ):
            self._watch(owner, maker, name)

    def _watch(self, owner: object, maker: str, name: str) -> None:
        make: Callable[..., Any] = getattr(owner, maker)

        def opened(*args: Any, **keys: Any) -> Any:
            made = make(*args, **keys)
            close = made.close

            def closed() -> None:
                self.open.remove(name)
                close()

            made.close = closed
            self.open.append(name)
            return made

        self._monkeypatch.setattr(owner, maker, opened)

    def fail_at(self, owner: object, name: str) -> list[list[str]]:
        """Make a function raise; the resources that are open at its calls."""
        found: list[list[str]] = []

        def fail(*args: Any, **keys: Any) -> None:
            found.append(list(self.open))
            raise ZeroDivisionError(name)

        self._monkeypatch.setattr(owner, name, fail)
        return found


PIPELINE = ["pipeline"]
EVERY = ["pipeline", "rows", "profile"]
STAGES: dict[str, tuple[object, str, list[str]]] = {
    "provenance is read": (RunDir, "sessions", []),
    "precision": (precision, "choose", []),
    "data": (assemble, "load_data", []),
    "pipeline": (assemble, "build_pipeline", []),
    "probe images": (assemble, "batch_of", PIPELINE),
    "teacher": (assemble, "obtain", PIPELINE),
    "teacher card": (assemble, "card", PIPELINE),
    "provenance": (provenance, "write", PIPELINE),
    "student": (assemble, "build_student", PIPELINE),
    "learner": (assemble, "build_learner", PIPELINE),
    "config.yaml": (RunDir, "update", PIPELINE),
    "rows": (lifecycle, "MetricsWriter", PIPELINE),
    "profile": (lifecycle, "Profiler", ["pipeline", "rows"]),
    "step": (Learner, "learn", EVERY),
    "evaluation": (trainer, "evaluate", EVERY),
    "checkpoint": (checkpoints, "write_tensors", EVERY),
    "pictures": (plots, "draw", EVERY),
}
"""Functions of a run in the order of their calls, and the resources that are open then."""


@pytest.mark.parametrize("stage", STAGES)
def test_everything_is_closed_when_a_stage_fails(
    stage: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, held = STAGES[stage]
    resources, bar, run = Resources(monkeypatch), Bar(), RunDir(tmp_path / "run")
    found = resources.fail_at(owner, name)
    before = signal.getsignal(signal.SIGTERM), torch.backends.cudnn.deterministic
    with pytest.raises(ZeroDivisionError, match=name):
        lifecycle.train(tiny.config(method="ard", epochs=1, out=str(run.path)), bar, profile=1)
    assert found[0] == held
    assert resources.open == []
    assert not bar.is_shown
    assert before == (signal.getsignal(signal.SIGTERM), torch.backends.cudnn.deterministic)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoints")]
    with run.locked():
        pass


@pytest.mark.parametrize("stage", ["student", "step", "pictures"])
def test_everything_is_closed_when_a_teacher_s_run_fails(
    stage: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, held = STAGES[stage]
    resources, bar = Resources(monkeypatch), Bar()
    found = resources.fail_at(owner, name)
    keys = tiny.config(method="ard", teacher={"checkpoint": None}, out=str(tmp_path / "run"))
    with pytest.raises(ZeroDivisionError, match=name):
        lifecycle.train(keys, bar, profile=1)
    # The teacher's own beside its student's pipeline; the profile is the student's.
    assert found[0] == PIPELINE + [each for each in held if each != "profile"]
    assert resources.open == []
    assert not bar.is_shown
    for path in (tmp_path / "run", tmp_path / "run" / "teacher"):
        with RunDir(path).locked():
            pass


@pytest.mark.parametrize("stage", ["check", "load"])
def test_everything_is_closed_when_a_checkpoint_cannot_be_gone_on_from(
    stage: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(method="at", out=str(run.path)), StopAt(2))
    resources, bar = Resources(monkeypatch), Bar()
    owner, name = {"check": (checkpoints, "check_fit"), "load": (Learner, "load_state_dict")}[stage]
    found = resources.fail_at(owner, name)
    with pytest.raises(ZeroDivisionError, match=name):
        lifecycle.resume(run.path, bar)
    assert found == [PIPELINE]
    assert resources.open == []
    with run.locked():
        pass


def test_a_full_disk_closes_everything_and_is_told(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = Resources(monkeypatch)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device", "last.pt")

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with pytest.raises(RunFailed, match=r"^last.pt: No space left on device; what was saved before is whole$"):
        lifecycle.train(tiny.config(method="at", out=str(tmp_path / "run")))
    assert resources.open == []


# ---------------------------------------------------------------- the session


@pytest.mark.parametrize("field", dataclasses.fields(Session), ids=lambda field: field.name)
def test_a_session_is_frozen(field: dataclasses.Field[Any]) -> None:
    session = Session(**{each.name: None for each in dataclasses.fields(Session)})  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(session, field.name, None)
