"""A run that is stopped and resumed equals one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import config, methods, trainer
from engine.evaluate import evaluate
from engine.reporter import Reporter
from engine.stopping import Interrupted

_CLOCKS = ("seconds", "images_per_second", "share_of_peak")


class StopAt(Reporter):
    """Asks the run to stop after that many steps, as a user or a scheduler would."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.step_to_stop = step
        self.number = number

    def advance(self, done: int) -> None:
        if done == self.step_to_stop:
            signal.raise_signal(self.number)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what a clock decides."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in _CLOCKS} for row in rows]


def assert_same_bits(left: Any, right: Any) -> None:
    """Both are the same nested structure of equal tensors and values; times do not count."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            if key not in (*_CLOCKS, "rows_size", "out"):
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
    ],
    ids=["ema", "swa", "weights attacked"],
)
@pytest.mark.parametrize("step", [4, 6, 9])
def test_what_people_add_resumes_too(step: int, keys: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    whole = trainer.train(tiny.config(method="iad1", out=str(tmp_path / "whole"), **keys))
    with pytest.raises(Interrupted):
        trainer.train(tiny.config(method="iad1", out=str(tmp_path / "parts"), **keys), StopAt(step))
    assert_same_run(whole.path, trainer.resume(tmp_path / "parts").path)


@pytest.mark.parametrize("method", list(methods.TABLE))
def test_stopped_in_the_middle_of_an_epoch(method: str, tiny: Any, tmp_path: Path) -> None:
    whole = trainer.train(tiny.config(method=method, out=str(tmp_path / "whole")))
    with pytest.raises(Interrupted):
        # Step 9 of 12: in the second epoch, after the warm-up, inside a log interval.
        trainer.train(tiny.config(method=method, out=str(tmp_path / "parts")), StopAt(9))
    stopped = torch.load(tmp_path / "parts" / "last.pt", weights_only=True)
    assert stopped["progress"]["step"] == 9
    parts = trainer.resume(tmp_path / "parts")
    assert_same_run(whole.path, parts.path)


@pytest.mark.parametrize("step", [1, 4, 6, 12], ids=["first", "log", "end of epoch", "last"])
@pytest.mark.parametrize("semantics", ["paper", "official"])
def test_stopped_at_every_kind_of_step(step: int, semantics: str, tiny: Any, tmp_path: Path) -> None:
    keys = {"method": "iad1", "semantics": semantics}
    whole = trainer.train(tiny.config(**keys, out=str(tmp_path / "whole")))
    with pytest.raises(Interrupted):
        trainer.train(tiny.config(**keys, out=str(tmp_path / "parts")), StopAt(step, signal.SIGINT))
    assert_same_run(whole.path, trainer.resume(tmp_path / "parts").path)


def test_stopped_twice_and_while_evaluating(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer.train(tiny.config(method="at", out=str(tmp_path / "whole")))
    parts = tmp_path / "parts"
    with pytest.raises(Interrupted):
        trainer.train(tiny.config(method="at", out=str(parts)), StopAt(2))

    def interrupted(*args: Any, **keys: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **keys)

    monkeypatch.setattr(trainer, "evaluate", interrupted)
    with pytest.raises(Interrupted):
        trainer.resume(parts)
    monkeypatch.setattr(trainer, "evaluate", evaluate)
    assert torch.load(parts / "last.pt", weights_only=True)["progress"]["step_in_epoch"] == 6
    assert_same_run(whole.path, trainer.resume(parts).path)


def test_mixed_precision_resumes_too(tiny: Any, tmp_path: Path, bf16: None) -> None:
    whole = trainer.train(tiny.config(method="iad2", amp=True, out=str(tmp_path / "whole")))
    with pytest.raises(Interrupted):
        trainer.train(tiny.config(method="iad2", amp=True, out=str(tmp_path / "parts")), StopAt(7))
    assert_same_run(whole.path, trainer.resume(tmp_path / "parts").path)


def test_signals_are_as_before_after_a_run(tiny: Any, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    trainer.train(tiny.config(method="st", epochs=1, out=str(tmp_path / "run")))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_finished_run_says_so(tiny: Any, tmp_path: Path, cli: Any) -> None:
    run = tmp_path / "run"
    trainer.train(tiny.config(method="st", epochs=1, out=str(run)))
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    outcome = cli("train", "--resume", str(run))
    assert outcome.code == 0
    assert "finished" in outcome.out
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_data_that_changed_are_refused(tiny: Any, tmp_path: Path, cli: Any) -> None:
    import shutil

    from PIL import Image

    shutil.copytree(tiny.folder, tmp_path / "data")
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        trainer.train(tiny.config(method="st", data=str(tmp_path / "data"), out=str(run)), StopAt(2))
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "train" / "circle" / "0000.png")
    outcome = cli("train", "--resume", str(run))
    assert outcome.code == 2
    assert "changed" in outcome.err


def test_a_teacher_that_changed_is_refused(tiny: Any, tmp_path: Path, cli: Any) -> None:
    teacher, run = tmp_path / "teacher.pt", tmp_path / "run"
    teacher.write_bytes(tiny.teacher.read_bytes())
    keys = {"method": "ard", "teacher": {"checkpoint": str(teacher)}}
    with pytest.raises(Interrupted):
        trainer.train(tiny.config(**keys, out=str(run)), StopAt(2))
    teacher.write_bytes(tiny.teacher_st.read_bytes())
    outcome = cli("train", "--resume", str(run))
    assert outcome.code == 2
    assert "teacher is another than before" in outcome.err


def test_the_same_teacher_in_another_file_is_the_same(tiny: Any, tmp_path: Path) -> None:
    teacher, run = tmp_path / "teacher.pt", tmp_path / "run"
    teacher.write_bytes(tiny.teacher.read_bytes())
    keys = {"method": "ard", "teacher": {"checkpoint": str(teacher)}}
    with pytest.raises(Interrupted):
        trainer.train(tiny.config(**keys, out=str(run)), StopAt(2))
    torch.save(torch.load(teacher, weights_only=True) | {"metrics": {"seconds": 3}}, teacher)
    assert trainer.resume(run).summary["last"]["epoch"] == 2


def test_a_run_has_one_process(tiny: Any, tmp_path: Path, cli: Any) -> None:
    import fcntl

    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        trainer.train(tiny.config(method="st", out=str(run)), StopAt(2))
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
        trainer.train(tiny.config(method="st", out=str(run)), StopAt(7))
    (run / "metrics.jsonl").write_text("")
    outcome = cli("train", "--resume", str(run))
    assert (outcome.code, "metrics.jsonl is shorter" in outcome.err) == (2, True)


def test_a_moved_run_finds_its_data(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.folder.parent)
    with pytest.raises(Interrupted):
        trainer.train(tiny.config(method="st", data=tiny.folder.name, out=str(tmp_path / "a")), StopAt(2))
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert trainer.resume(Path("b")).path == Path("b")


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
    whole = trainer.train(tiny.config(**keys, out=str(tmp_path / "whole")))
    run = tmp_path / "killed"
    process = start(tiny.flags(**keys, out=str(run)))
    wait_for_step(run, step, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    trainer.resume(run)
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
    whole = trainer.train(tiny.config(**keys, out=str(tmp_path / "whole")))
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
    whole = trainer.train(tiny.config(**keys, out=str(tmp_path / "whole")))
    run = tmp_path / "full"
    with pytest.raises(Interrupted):
        trainer.train(tiny.config(**keys, out=str(run)), StopAt(5))
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
    trainer.resume(run)
    assert_same_run(whole.path, run)


def test_interrupted_teacher_training_goes_on(tiny: Any, tmp_path: Path) -> None:
    keys = {"method": "iad1", "teacher": {"checkpoint": None}}
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        trainer.train(tiny.config(**keys, out=str(run)), StopAt(4))
    assert torch.load(run / "teacher" / "last.pt", weights_only=True)["progress"]["step"] == 4
    assert not (run / "last.pt").exists()
    result = trainer.resume(run)
    assert result.summary["method"] == "iad1"
    assert json.loads((run / "teacher" / "summary.json").read_text())["method"] == "at"


def test_config_of_a_run_is_rerunnable(tiny: Any, tmp_path: Path) -> None:
    first = trainer.train(tiny.config(method="akd2", out=str(tmp_path / "first")))
    again = config.load(config.read_file(first.path / "config.yaml"), {"out": str(tmp_path / "again")})
    assert_same_run(first.path, trainer.train(again).path)
