"""A run that is stopped and resumed equals one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from engine import config, methods, register
from engine.commands.completion import values_of
from engine.common.console import Reporter
from engine.common.stopping import Interrupted, Stop
from engine.common.tensor_files import write_tensors
from engine.config import sections
from engine.evaluation.measure import evaluate
from engine.plugins.builtin_loggers.numbers_of import TIMINGS
from engine.runs import assemble, lifecycle, resuming, trainer
from engine.runs.run_directory import RunDir
from engine.runs.session import Session
from engine.system import precision
from engine.system.distributed import World
from tests.runs.helpers import Listener


class StopAt(Reporter):
    """Asks the run to stop after that many steps, once, as a user or a scheduler would."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.step_to_stop = step
        self.number = number
        self.has_asked = False

    def advance(self, done: int) -> None:
        if done == self.step_to_stop and not self.has_asked:
            self.has_asked = True  # an evaluation tells of the same step more than once
            signal.raise_signal(self.number)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what a clock decides."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def assert_same_bits(left: Any, right: Any) -> None:
    """Both are the same nested structure of equal tensors and values; times do not count."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            if key not in (*TIMINGS, "rows_size", "out"):
                assert_same_bits(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for first, second in zip(left, right, strict=True):
            assert_same_bits(first, second)
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    else:
        assert left == right


def assert_same_run(left: Path, right: Path) -> None:
    """Same checkpoints and rows."""
    for name in ("last.pt", "best.pt"):
        assert_same_bits(torch.load(left / name, weights_only=True), torch.load(right / name, weights_only=True))
    assert rows_of(left) == rows_of(right)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (left, right)]
    assert_same_bits(*summaries)


@pytest.mark.parametrize(
    "keys",
    [
        {"averaging": {"kind": "ema"}, "optim": {"schedule": "cosine", "lr_warmup": 1, "clip_norm": 1.0}},
        {"averaging": {"kind": "swa", "start": 0}, "optim": {"schedule": "one-cycle"}, "micro_batch": 3},
        {"averaging": {"kind": "ema", "start": 1}, "awp": {"gamma": 0.005}, "micro_batch": "auto"},
        {
            "optim": {
                "implementation": "adamw",
                "layer_decay": 0.7,
                "clip_norm": 1.0,
                "schedule": "cosine",
                "lr_warmup": 1,
            },
            "attack": {"epsilon_warmup": 2, "steps_warmup": 2, "num_steps": 3},
        },
    ],
    ids=["ema", "swa", "weights attacked", "adamw"],
)
@pytest.mark.parametrize("step", [4, 6, 9])
def test_what_people_add_resumes_too(step: int, keys: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    whole = lifecycle.train(tiny.config(method="iad1", out=str(tmp_path / "whole"), **keys))
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(method="iad1", out=str(tmp_path / "parts"), **keys), StopAt(step))
    assert_same_run(whole.path, lifecycle.resume(tmp_path / "parts").path)


@pytest.mark.parametrize("method", list(methods.METHODS))
def test_stopped_in_the_middle_of_an_epoch(method: str, tiny: Any, tmp_path: Path) -> None:
    whole = lifecycle.train(tiny.config(method=method, out=str(tmp_path / "whole")))
    with pytest.raises(Interrupted):
        # Step 9 of 12: in the second epoch, after the warm-up, inside a log interval.
        lifecycle.train(tiny.config(method=method, out=str(tmp_path / "parts")), StopAt(9))
    stopped = torch.load(tmp_path / "parts" / "last.pt", weights_only=True)
    assert stopped["progress"]["step"] == 9
    parts = lifecycle.resume(tmp_path / "parts")
    assert_same_run(whole.path, parts.path)


@pytest.mark.parametrize("step", [1, 4, 6, 12], ids=["first", "log", "end of epoch", "last"])
@pytest.mark.parametrize("semantics", ["paper", "official"])
def test_stopped_at_every_kind_of_step(step: int, semantics: str, tiny: Any, tmp_path: Path) -> None:
    keys = {"method": "iad1", "semantics": semantics}
    whole = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "whole")))
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(**keys, out=str(tmp_path / "parts")), StopAt(step, signal.SIGINT))
    assert_same_run(whole.path, lifecycle.resume(tmp_path / "parts").path)


def test_stopped_twice_and_while_evaluating(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lifecycle.train(tiny.config(method="at", out=str(tmp_path / "whole")))
    parts = tmp_path / "parts"
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(method="at", out=str(parts)), StopAt(2))

    def interrupted(*args: Any, **keys: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **keys)

    monkeypatch.setattr(trainer, "evaluate", interrupted)
    with pytest.raises(Interrupted):
        lifecycle.resume(parts)
    monkeypatch.setattr(trainer, "evaluate", evaluate)
    assert torch.load(parts / "last.pt", weights_only=True)["progress"]["step_in_epoch"] == 6
    assert_same_run(whole.path, lifecycle.resume(parts).path)


class Dropping(nn.Sequential):
    """Drops out before a BatchNorm, whose statistics depend on what was drawn."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3), nn.Dropout(), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, num_classes)
        )


@pytest.mark.parametrize("kind", ["none", "ema", "swa"])
def test_what_a_network_draws_is_drawn_again(
    kind: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within an epoch, and while its end is evaluated."""
    register.model("dropping", Dropping, input_sizes=(8,))
    averaging = {"kind": kind, "start": 0}
    keys = tiny.config(method="trades", model="dropping", averaging=averaging, awp={"gamma": 0.005})
    whole = lifecycle.train(keys, out=str(tmp_path / "whole"))
    parts = tmp_path / "parts"
    with pytest.raises(Interrupted):
        lifecycle.train(keys, StopAt(3), out=str(parts))

    def interrupted(*args: Any, **keys: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **keys)

    monkeypatch.setattr(trainer, "evaluate", interrupted)
    torch.manual_seed(1)
    with pytest.raises(Interrupted):
        lifecycle.resume(parts)
    monkeypatch.setattr(trainer, "evaluate", evaluate)
    torch.manual_seed(2)
    assert_same_run(whole.path, lifecycle.resume(parts).path)


def test_mixed_precision_resumes_too(tiny: Any, tmp_path: Path, bf16: None) -> None:
    whole = lifecycle.train(tiny.config(method="iad2", amp=True, out=str(tmp_path / "whole")))
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(method="iad2", amp=True, out=str(tmp_path / "parts")), StopAt(7))
    assert_same_run(whole.path, lifecycle.resume(tmp_path / "parts").path)


def test_signals_are_as_before_after_a_run(tiny: Any, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    lifecycle.train(tiny.config(method="st", epochs=1, out=str(tmp_path / "run")))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_finished_run_says_so(tiny: Any, tmp_path: Path, cli: Any) -> None:
    run = tmp_path / "run"
    lifecycle.train(tiny.config(method="st", epochs=1, out=str(run)))
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    outcome = cli("train", "--resume", str(run))
    assert outcome.code == 0
    assert "finished" in outcome.out
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_data_that_changed_are_refused(tiny: Any, tmp_path: Path, cli: Any) -> None:
    shutil.copytree(tiny.folder, tmp_path / "data")
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(method="st", data=str(tmp_path / "data"), out=str(run)), StopAt(2))
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "train" / "circle" / "0000.png")
    outcome = cli("train", "--resume", str(run))
    assert outcome.code == 2
    assert "changed" in outcome.err


def test_a_teacher_that_changed_is_refused(tiny: Any, tmp_path: Path, cli: Any) -> None:
    teacher, run = tmp_path / "teacher.pt", tmp_path / "run"
    teacher.write_bytes(tiny.teacher.read_bytes())
    keys = {"method": "ard", "teacher": {"checkpoint": str(teacher)}}
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(**keys, out=str(run)), StopAt(2))
    teacher.write_bytes(tiny.teacher_st.read_bytes())
    outcome = cli("train", "--resume", str(run))
    assert outcome.code == 2
    assert "teacher is another than before" in outcome.err


def test_the_same_teacher_in_another_file_is_the_same(tiny: Any, tmp_path: Path) -> None:
    teacher, run = tmp_path / "teacher.pt", tmp_path / "run"
    teacher.write_bytes(tiny.teacher.read_bytes())
    keys = {"method": "ard", "teacher": {"checkpoint": str(teacher)}}
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(**keys, out=str(run)), StopAt(2))
    write_tensors(teacher, torch.load(teacher, weights_only=True) | {"metrics": {"seconds": 3}})
    assert lifecycle.resume(run).summary["last"]["epoch"] == 2


def test_a_run_has_one_process(tiny: Any, tmp_path: Path, cli: Any) -> None:
    import fcntl

    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(method="st", out=str(run)), StopAt(2))
    before = (run / "last.pt").read_bytes()
    other = os.open(run, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    outcome = cli("train", "--resume", str(run))
    os.close(other)
    assert (outcome.code, "another process" in outcome.err) == (2, True)
    assert (run / "last.pt").read_bytes() == before
    assert cli("train", "--resume", str(run)).code == 0


def test_rows_that_were_lost_are_noticed(tiny: Any, tmp_path: Path, cli: Any) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(method="st", out=str(run)), StopAt(7))
    (run / "metrics.jsonl").write_text("")
    outcome = cli("train", "--resume", str(run))
    assert (outcome.code, "metrics.jsonl is shorter" in outcome.err) == (2, True)


def test_a_moved_run_finds_its_data(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.folder.parent)
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(method="st", data=tiny.folder.name, out=str(tmp_path / "a")), StopAt(2))
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert lifecycle.resume(Path("b")).path == Path("b")


# ---------------------------------------------------------------- what may change when a run goes on


def test_the_documentation_lists_what_may_change() -> None:
    page = (Path(__file__).parents[2] / "docs" / "run-directory.md").read_text(encoding="utf-8")
    table = page.partition("| may change | |")[2].partition("| are no keys |")[0]
    named = re.findall(r"`([a-z_.]+)`", "".join(line.split("|")[1] for line in table.splitlines()[1:] if line))
    assert sorted(named) == sorted(
        name for name, key in config.KEYS.items() if key.resume != "fixed" and name != "out"
    )


VALUES = (True, False, "on", "off", 1, 2, 0.5, 0.25, "resnet8", "digits", ["fgsm"], [0.25, 0.75], [0.5, 0.25],
          {"ce_nat": 2.0})  # fmt: skip


NEEDS: dict[str, dict[str, Any]] = {
    "optim.betas": {"optim": {"implementation": "adamw"}},
    "optim.eps": {"optim": {"implementation": "adamw"}},
    "extra_fraction": {"extra_data": "/given.npz"},
    "extra_labels": {"extra_data": "/given.npz"},
}
"""What a key counts with alone."""


def another(begun: config.RunConfig, name: str) -> config.RunConfig:
    """The configuration with some other value that the key may have; of "epochs" a smaller one."""
    *groups, last = name.split(".")
    section = type(begun) if not groups else type(getattr(begun, groups[0]))
    named = [*values_of(config.KEYS[name]), *re.findall(r"'([\w-]+)'", str(section.model_fields[last].annotation))]
    for value in (*named, *VALUES):
        try:
            wanted = resuming.changed(begun, config.nested(name, value))
        except ValueError:
            continue
        if config.flat(wanted.tree())[name] != config.flat(begun.tree())[name]:
            return wanted
    raise AssertionError(f"no other value of {name} is known")


@pytest.mark.parametrize("name", [name for name in config.KEYS if name != "out"])
def test_every_key_may_change_or_may_not(name: str) -> None:
    given = {section: {"checkpoint": "/given.pt"} for section in ("teacher", "teacher_st")}
    begun = config.load({"method": "iad2", "epochs": 4, **given}, NEEDS.get(name, {}))
    wanted = another(begun, name)
    old, new = (config.flat(each.tree())[name] for each in (begun, wanted))
    free = {
        "data", "extra_data", "extra_labels", "teacher.checkpoint", "teacher_st.checkpoint",
        "workers", "batches_ahead", "lanes", "graphs", "fast",
        "checkpoint_activations", "masking_guard", "overfitting_guard", "device", "checkpoint_every",
        "snapshot_every", "log_every", "imports", "loggers",
        "amp_dtype",  # which a run that began with "auto" decided
        "winograd",  # "auto", that is as the run began
    }  # fmt: skip
    if name in free:
        assert resuming.carried_on(begun, wanted) == wanted
    else:
        with pytest.raises(ValueError, match=rf"^--resume: {name} was .* and would be ") as error:
            resuming.carried_on(begun, wanted)
        assert f"{name} was {old!r} and would be {new!r}" in str(error.value)
        assert "a run that has begun may change epochs (to more), data, " in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [{"lr": 0.3}, {"seed": 4}, {"batch_size": 6}, {"optim": {"momentum": 0.5, "nesterov": True}},
     {"attack": {"epsilon": 0.1}}, {"averaging": {"kind": "ema"}}, {"normalize": True}, {"dtype": "float64"},
     {"model": "resnet18"}, {"epochs": 1}, {"method": "at"}],
    ids=str,
)  # fmt: skip
def test_an_edited_configuration_is_refused_by_name(
    changes: dict[str, Any], stopped: Path, cli: Any, tmp_path: Path
) -> None:
    """Edited in config.yaml, where last.pt remembers what was, or given on the command line."""
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    before = (run / "config.yaml").read_text()
    names = list(config.flat(config.merge(changes)))
    outcomes = [cli("train", "--resume", str(run), *config.assignments(changes))]
    (run / "config.yaml").write_text(yaml.safe_dump(config.merge(yaml.safe_load(before), changes)))
    outcomes.append(cli("train", "--resume", str(run)))
    for outcome in outcomes:
        assert outcome.code == 2
        (line,) = outcome.err.strip().splitlines()
        assert all(f"{name} was " in line for name in names), line
    (run / "config.yaml").write_text(before)
    assert lifecycle.resume(run).summary["last"]["epoch"] == 2


@pytest.fixture(scope="module")
def stopped(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs that was stopped in the first."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(method="st", out=str(run)), StopAt(2))
    return run


@pytest.fixture(scope="module")
def moved(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose data and teachers have gone elsewhere since it was stopped, and one that was left alone."""
    root = tmp_path_factory.mktemp("moved")
    shutil.copytree(tiny.folder, root / "before" / "data")
    for name, path in (("at.pt", tiny.teacher), ("st.pt", tiny.teacher_st)):
        shutil.copy(path, root / "before" / name)
    keys = tiny.config(
        method="iad2",
        data=str(root / "before" / "data"),
        teacher={"checkpoint": str(root / "before" / "at.pt")},
        teacher_st={"checkpoint": str(root / "before" / "st.pt")},
    )
    lifecycle.train(keys, out=str(root / "whole"))
    with pytest.raises(Interrupted):
        lifecycle.train(keys, StopAt(7), out=str(root / "run"))
    (root / "before").rename(root / "after")
    return root


def follow(root: Path) -> list[str]:
    after = root / "after"
    return ["--data", str(after / "data"), "--teacher", str(after / "at.pt"), "--teacher-st", str(after / "st.pt")]


def test_a_run_follows_its_data_and_teachers(moved: Path, cli: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(moved / "run", tmp_path / "run"))
    outcome = cli("train", "--resume", str(run))
    assert outcome.code == 2
    assert f"{moved / 'before' / 'data'} " in outcome.err
    assert f"data that were moved: --resume {run} --data PATH" in outcome.err
    outcome = cli("train", "--resume", str(run), *follow(moved))
    assert outcome.code == 0, outcome.err
    found = config.read_file(run / "config.yaml")
    assert found["data"] == str(moved / "after" / "data")
    assert found["teacher"]["checkpoint"] == str(moved / "after" / "at.pt")
    weights = [torch.load(path / "last.pt", weights_only=True)["student"] for path in (moved / "whole", run)]
    assert_same_bits(*weights)
    assert rows_of(moved / "whole") == rows_of(run)


@pytest.mark.parametrize(("flag", "says"), [("--data", "changed since"), ("--teacher", "teacher is another"),
                                            ("--teacher-st", "teacher_st is another")])  # fmt: skip
def test_a_run_follows_to_nothing_else(flag: str, says: str, moved: Path, cli: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(moved / "run", tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    data = Path(shutil.copytree(moved / "after" / "data", tmp_path / "data"))
    Image.new("RGB", (8, 8)).save(data / "train" / "circle" / "0000.png")
    other = {"--data": data, "--teacher": moved / "after" / "st.pt", "--teacher-st": moved / "after" / "at.pt"}
    outcome = cli("train", "--resume", str(run), *follow(moved), flag, str(other[flag]))
    assert outcome.code == 2
    (line,) = outcome.err.strip().splitlines()
    assert says in line
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_resume_auto_follows_too(moved: Path, cli: Any, tmp_path: Path, tiny: Any) -> None:
    run = Path(shutil.copytree(moved / "run", tmp_path / "run"))
    arguments = [*tiny.flags(method="iad2", out=str(run)), "--resume", "auto", "--set", "log_every=5"]
    for key in ("data", "teacher.checkpoint", "teacher_st.checkpoint"):
        name = {"data": "data", "teacher.checkpoint": "at.pt", "teacher_st.checkpoint": "st.pt"}[key]
        arguments += ["--set", f"{key}={moved / 'after' / name}"]
    outcome = cli(*arguments)
    assert outcome.code == 0, outcome.err
    assert config.read_file(run / "config.yaml")["log_every"] == 5
    weights = [torch.load(path / "last.pt", weights_only=True)["student"] for path in (moved / "whole", run)]
    assert_same_bits(*weights)


def test_a_teacher_in_training_goes_on_elsewhere(tiny: Any, tmp_path: Path) -> None:
    """Data, device and intervals are the teacher's too; what it was trained on is compared with what is found."""
    data = Path(shutil.copytree(tiny.folder, tmp_path / "data"))
    keys = tiny.config(method="ard", teacher={"checkpoint": None}, data=str(data))
    whole = lifecycle.train(keys, out=str(tmp_path / "whole"))
    shutil.rmtree(os.environ["ENGINE_CACHE"])
    with pytest.raises(Interrupted):
        lifecycle.train(keys, StopAt(4), out=str(tmp_path / "run"))
    data.rename(tmp_path / "elsewhere")
    result = lifecycle.resume(tmp_path / "run", data=str(tmp_path / "elsewhere"), checkpoint_every=3)
    assert rows_of(result.path) == rows_of(whole.path)
    assert rows_of(result.path / "teacher") == rows_of(whole.path / "teacher")


def test_a_finished_teacher_of_other_data_is_refused(tiny: Any, tmp_path: Path) -> None:
    data, run = Path(shutil.copytree(tiny.folder, tmp_path / "data")), tmp_path / "run"
    lifecycle.train(tiny.config(method="ard", teacher={"checkpoint": None}, data=str(data)), out=str(run))
    for name in ("summary.json", "last.pt"):
        (run / name).unlink()
    Image.new("RGB", (8, 8)).save(data / "train" / "circle" / "0000.png")
    with pytest.raises(ValueError, match="holds a teacher of other data"):
        lifecycle.resume(run)


# ---------------------------------------------------------------- longer runs


@pytest.mark.parametrize("finished", [False, True])
def test_what_is_given_in_epochs_stays_and_a_longer_run_is_the_long_one(
    finished: bool, tiny: Any, tmp_path: Path, cli: Any
) -> None:
    """To the bit, where no key is a fraction of the epochs."""
    keys = tiny.config(
        method="iad1", loss={"warmup": 1}, optim={"milestones": [1, 3], "lr_factors": [0.5, 0.1]},
        averaging={"kind": "ema", "start": 1},
    )  # fmt: skip
    whole, run = lifecycle.train(keys, epochs=4, out=str(tmp_path / "whole")), tmp_path / "run"
    if finished:
        short = lifecycle.train(keys, epochs=2, out=str(run)).summary
    else:
        with pytest.raises(Interrupted):
            lifecycle.train(keys, StopAt(8), epochs=2, out=str(run))
    outcome = cli("train", "--resume", str(run), "--epochs", "4")
    assert outcome.code == 0, outcome.err
    assert "Extended from 2 to 4 epochs; from here on a part of the run is one of 4 epochs: none ch" in outcome.out
    for name in ("last.pt", "best.pt"):
        left, right = (torch.load(path / name, weights_only=True) for path in (whole.path, run))
        for each in (left, right):
            del each["config"]  # the teachers' epochs stand in it
        assert_same_bits(left, right)
    assert rows_of(whole.path) == rows_of(run)
    summary = json.loads((run / "summary.json").read_text())
    assert_same_bits(summary, whole.summary)
    if finished:
        assert json.loads((run / "summary-2.json").read_text()) == short
    assert "is finished: nothing to resume" in cli("train", "--resume", str(run), "--epochs", "4").out
    refused = cli("train", "--resume", str(run), "--epochs", "2")
    assert (refused.code, "epochs was 4 and would be 2" in refused.err) == (2, True)


def test_a_fraction_is_one_of_the_longer_run_from_there_on(tiny: Any, tmp_path: Path) -> None:
    """To the bit the training that is told, epoch by epoch, what the short run did, then the long one."""
    keys = tiny.config(method="iad1", loss={"warmup": 0.5}, optim={"milestones": [0.5, 0.75]})
    lifecycle.train(keys, epochs=2, out=str(tmp_path / "run"))
    said = Listener()
    run = lifecycle.resume(tmp_path / "run", said, epochs=6).path
    assert any(
        "optim.milestones at epoch 3, 5 (was 1, 2)" in line and "loss.warmup at epoch 3 (was 1)" in line
        for line in said.lines
    )
    epochs = [row for row in rows_of(run) if row["event"] == "epoch"]
    # Trained as of two epochs: rates and warm-up of 0.5 * 2 = 1; then as of six: 0.5 * 6 = 3, 0.75 * 6 = 4.5 -> 5.
    assert [row["lr"] for row in epochs] == pytest.approx([0.1, 0.01, 0.1, 0.01, 0.01, 0.001])
    assert [row["phase"] for row in epochs] == ["ard", "iad1", "ard", "iad1", "iad1", "iad1"]
    assert_same_bits(
        torch.load(run / "last.pt", weights_only=True)["student"], by_hand(tiny, tmp_path, keys, epochs)
    )


def by_hand(tiny: Any, tmp_path: Path, keys: dict[str, Any], epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """The student of a loop that trains those rows' phases at their rates, epoch by epoch."""
    complete = config.load(keys, {"epochs": len(epochs)})
    rates = iter([row["lr"] for row in epochs for _ in range(6)])
    run = RunDir.create(config.with_absolute_paths(config.load(keys, {"out": str(tmp_path / "hand")}))).run
    session = Session(complete, precision.choose(complete), World(), Reporter(), Stop(), run)

    def train_teacher(*_: Any) -> Path:
        raise AssertionError("the teacher is in a file")

    with ExitStack() as resources:
        parts = assemble.assemble(session, None, resources, train_teacher)
        learner = parts.learner
        for epoch, row in enumerate(epochs):
            learner.student.train()
            method = learner.method if row["phase"] == learner.method.name else learner.method.warmup
            assert method is not None
            for number, batch in enumerate(parts.data.pipeline.epoch(epoch)):
                size = parts.data.sampling.size_of(number)
                learner.learn(batch, method, next(rates), epoch=epoch, global_batch_size=size)
    student: dict[str, Any] = learner.student.state_dict()
    return student


@pytest.mark.parametrize(("kind", "short", "start"), [("swa", 4, 3.0), ("swa", 2, 1.0), ("ema", 3, 0.0)])
def test_an_average_that_has_begun_goes_on(kind: str, short: int, start: float, tiny: Any, tmp_path: Path) -> None:
    """In the longer run it is that from the epoch on in which it began, and not of a fraction anew."""
    keys = tiny.config(method="st", averaging={"kind": kind}, optim={"milestones": [], "lr_factors": []})
    whole = lifecycle.train(config.merge(keys, {"averaging": {"start": start}}), epochs=5, out=str(tmp_path / "w"))
    lifecycle.train(keys, epochs=short, out=str(tmp_path / "run"))
    run = lifecycle.resume(tmp_path / "run", epochs=5).path
    assert config.read_file(run / "config.yaml")["averaging"]["start"] == start
    left, right = (torch.load(path / "last.pt", weights_only=True)["averaged"] for path in (whole.path, run))
    assert_same_bits(left, right)


def test_an_average_that_has_not_begun_begins_where_the_longer_run_says() -> None:
    begun = config.load({"epochs": 4, "averaging": {"kind": "swa"}})
    longer = resuming.carried_on(begun, resuming.changed(begun, {"epochs": 8}), 3)
    assert longer.averaging.start is None
    assert "averaging.start at epoch 6 (was 3)" in resuming.describe(begun, longer)


def test_a_longer_run_keeps_its_teacher(tiny: Any, tmp_path: Path) -> None:
    keys = tiny.config(method="ard", teacher={"checkpoint": None})
    lifecycle.train(keys, out=str(tmp_path / "run"))
    said = Listener()
    run = lifecycle.resume(tmp_path / "run", said, epochs=3).path
    assert any("teacher cache" in line for line in said.lines)
    assert config.read_file(run / "config.yaml")["teacher"]["epochs"] == 2
    assert lifecycle.resume(run, epochs=4).summary["last"]["epoch"] == 4


def test_a_longer_run_that_was_killed_at_its_start(tiny: Any, tmp_path: Path) -> None:
    """config.yaml says more than last.pt: as if it had been edited by hand."""
    run = lifecycle.train(tiny.config(method="st", teacher={"checkpoint": None}), out=str(tmp_path / "run")).path
    (run / "summary.json").rename(run / "summary-2.json")
    found = config.read_file(run / "config.yaml")
    for change in ({"epochs": 3, "teacher": {"epochs": 2}}, {"epochs": 3}):
        copy = Path(shutil.copytree(run, tmp_path / str(len(change))))
        (copy / "config.yaml").write_text(yaml.safe_dump(config.merge(found, change)))
        assert lifecycle.resume(copy).summary["last"]["epoch"] == 3


def test_a_finished_run_without_its_state_is_not_begun_anew(tiny: Any, tmp_path: Path) -> None:
    run = lifecycle.train(tiny.config(method="st"), out=str(tmp_path / "run")).path
    (run / "last.pt").unlink()
    with pytest.raises(ValueError, match=r"last\.pt is gone"):
        lifecycle.resume(run, epochs=3)
    assert (run / "summary.json").exists()


def test_parts_of_the_run_are_all_known() -> None:
    source = Path(sections.__file__).read_text()
    fields = re.findall(r"^    (\w+): Annotated\[\s*(?:tuple\[)?PartOfRun", source, re.MULTILINE)
    assert sorted(fields) == sorted(name.rpartition(".")[2] for name in resuming.FRACTIONS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_callers_own_dtype_changes_no_bits(dtype: torch.dtype, tiny: Any, tmp_path: Path) -> None:
    keys = tiny.config(method="iad1")
    usual = lifecycle.train(keys, out=str(tmp_path / "usual"))
    torch.set_default_dtype(dtype)
    try:
        other = lifecycle.train(keys, out=str(tmp_path / "other"))
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_run(usual.path, other.path)


# ---------------------------------------------------------------- real processes


def start(arguments: list[str], **keys: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, "-m", "engine", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **keys,
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the checkpoint is that far."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        last = run / "last.pt"
        if last.exists() and torch.load(last, weights_only=True)["progress"]["step"] >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint of step {step}")


@pytest.mark.parametrize("step", [1, 5, 8])
def test_killed_at_any_moment(step: int, tiny: Any, tmp_path: Path) -> None:
    keys = {"method": "iad1", "checkpoint_every": 1, "epochs": 3}
    whole = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "whole")))
    run = tmp_path / "killed"
    process = start(tiny.flags(**keys, out=str(run)))
    wait_for_step(run, step, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lifecycle.resume(run)
    assert_same_run(whole.path, run)
    leftovers = [path.name for path in run.iterdir() if path.name.endswith(".tmp")]
    assert not leftovers  # what a kill left half-written is removed


@pytest.mark.slow
def test_killed_again_and_again(tiny: Any, tmp_path: Path) -> None:
    """Ten kills of one run, each at a random moment after its start, teacher training and evaluations included."""
    keys = {"method": "iad2", "checkpoint_every": 2, "epochs": 8, "teacher": {"checkpoint": None}}
    run, moments = tmp_path / "killed", random.Random(0)
    process = start(tiny.flags(**keys, out=str(run)))
    for _ in range(10):
        time.sleep(moments.uniform(2, 5))
        process.kill()
        process.communicate()
        process = start(["train", "--resume", str(run)] if run.exists() else tiny.flags(**keys, out=str(run)))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, (out, err)
    whole = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "whole")))
    assert_same_run(whole.path, run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_130(number: signal.Signals, tiny: Any, tmp_path: Path) -> None:
    keys = {"method": "ard", "checkpoint_every": 1, "epochs": 40, "attack": {"num_steps": 5}}
    run = tmp_path / "run"
    process = start(tiny.flags(**keys, out=str(run)))
    wait_for_step(run, 2, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert "Traceback" not in err
    assert "--resume" in err
    state = torch.load(run / "last.pt", weights_only=True)
    assert state["progress"]["step"] < 240
    assert len(err.strip().splitlines()) == 1


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tiny: Any, tmp_path: Path) -> None:
    import resource

    keys = {"method": "trades", "checkpoint_every": 3}
    whole = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "whole")))
    run = tmp_path / "full"
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(**keys, out=str(run)), StopAt(5))
    before = (run / "last.pt").read_bytes()

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    process = start(["train", "--resume", str(run)], preexec_fn=limit_files)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, (out, err)
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert (run / "last.pt").read_bytes() == before
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]
    lifecycle.resume(run)
    assert_same_run(whole.path, run)


def test_interrupted_teacher_training_goes_on(tiny: Any, tmp_path: Path) -> None:
    keys = {"method": "iad1", "teacher": {"checkpoint": None}}
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(**keys, out=str(run)), StopAt(4))
    assert torch.load(run / "teacher" / "last.pt", weights_only=True)["progress"]["step"] == 4
    assert not (run / "last.pt").exists()
    result = lifecycle.resume(run)
    assert result.summary["method"] == "iad1"
    assert json.loads((run / "teacher" / "summary.json").read_text())["method"] == "at"


def test_config_of_a_run_is_rerunnable(tiny: Any, tmp_path: Path) -> None:
    first = lifecycle.train(tiny.config(method="akd2", out=str(tmp_path / "first")))
    again = config.load(config.read_file(first.path / "config.yaml"), {"out": str(tmp_path / "again")})
    assert_same_run(first.path, lifecycle.train(again).path)


def test_a_run_goes_on_with_the_algorithm_that_it_began_with() -> None:
    begun = config.load({"winograd": "off"})
    with pytest.raises(ValueError, match="^--resume: winograd was 'off' and would be 'on'"):
        resuming.carried_on(begun, resuming.changed(begun, {"winograd": "on"}))
