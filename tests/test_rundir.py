"""Which run `--resume auto` goes on with."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine import config, trainer
from engine.rundir import RunDir
from engine.stopping import Interrupted
from tests.test_resume import StopAt, assert_same_run

WANTED: dict[str, Any] = {"method": "at", "dataset": "digits", "model": "resnet8", "epochs": 2}


def begun(name: str, age: float, **keys: Any) -> RunDir:
    """A run below runs/ that was configured so many seconds ago."""
    run = RunDir.create(config.load(WANTED, keys, {"out": f"runs/{name}"}))
    now = run.config.stat().st_mtime
    os.utime(run.config, (now - age, now - age))
    return run


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_without_a_place_it_is_the_latest_unfinished_one_of_the_same_settings() -> None:
    wanted = config.load(WANTED)
    assert RunDir.find(wanted) is None
    begun("older", 20)
    begun("latest", 10)
    begun("finished", 5).summary.write_text("{}")
    begun("of another seed", 4, seed=1)
    begun("damaged", 3).config.write_text("method: [")
    begun("of another version", 2).config.write_text("method: at\nno_such_key: 1\n")
    found = RunDir.find(wanted)
    assert found is not None
    assert found.path == Path("runs/latest")


def test_runs_that_begin_at_once_have_places_of_their_own() -> None:
    with ThreadPoolExecutor(8) as pool:  # as the jobs of an array, one for each seed
        runs = list(pool.map(lambda seed: RunDir.create(config.load(WANTED, {"seed": seed})), range(8)))
    assert len({run.path for run in runs}) == 8
    for seed, run in enumerate(runs):
        assert RunDir.existing(run.path)[1].seed == seed


def test_in_its_place_it_must_have_the_same_settings() -> None:
    run = begun("mine", 0)
    same = config.load(WANTED, {"out": str(run.path)})
    found = RunDir.find(same)
    assert found is not None
    assert found.path == run.path
    with pytest.raises(ValueError, match="holds a run of another configuration, which differs in lr, seed$"):
        RunDir.find(config.load(WANTED, {"out": str(run.path), "seed": 1, "lr": 0.2}))
    assert RunDir.find(config.load(WANTED, {"out": "runs/none"})) is None


def test_the_same_call_goes_on_and_then_begins_anew(tiny: Any, tmp_path: Path) -> None:
    keys = tiny.config(method="at")
    whole = trainer.train(keys | {"out": str(tmp_path / "whole")})
    with pytest.raises(Interrupted):
        trainer.train(keys, StopAt(4), again=True)
    (stopped,) = Path("runs").iterdir()
    result = trainer.train(keys, again=True)
    assert result.path.resolve() == stopped.resolve()
    assert_same_run(whole.path, result.path)
    later = trainer.begin(config.load(keys), again=True)
    assert later != result.path, "what is finished is not the one to go on with"
