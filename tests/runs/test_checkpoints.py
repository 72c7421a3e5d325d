"""Checkpoints are written beside the training, one at a time, and believed only where they fit."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine import config, models
from engine.common import tensor_files
from engine.common.stopping import Interrupted
from engine.common.tensor_files import write_tensors
from engine.methods import get
from engine.models import weights
from engine.runs import checkpoints, lifecycle
from engine.system import precision
from engine.training.learner import Learner
from tests.runs.test_resume import StopAt


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has the state at the call, the second call waits for the first, and errors come later."""
    go, begun, written = threading.Event(), threading.Event(), tensor_files.write_tensors

    def slow(path: Path, value: Any) -> None:
        begun.set()
        assert go.wait(60)
        written(path, value)

    monkeypatch.setattr(checkpoints, "write_tensors", slow)
    weight = torch.zeros(3)
    with checkpoints.Saver() as saver:
        saver.save((tmp_path / "first.pt", {"weight": weight, "nested": [{"again": weight}]}))
        assert begun.wait(60)
        weight += 1  # the training goes on
        assert not (tmp_path / "first.pt").exists()
        second = threading.Thread(target=saver.save, args=((tmp_path / "second.pt", {"weight": weight}),))
        second.start()
        second.join(0.2)
        assert second.is_alive(), "the second call does not wait for the first to be written"
        go.set()
        second.join(60)
    saved = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("first", "second")]
    assert saved[0]["weight"].tolist() == saved[0]["nested"][0]["again"].tolist() == [0, 0, 0]
    assert saved[1]["weight"].tolist() == [1, 1, 1]


def test_a_checkpoint_that_cannot_be_written_is_told_by_the_next_call(tmp_path: Path) -> None:
    saver = checkpoints.Saver()
    saver.save((tmp_path / "absent" / "last.pt", {}))
    with pytest.raises(FileNotFoundError):
        saver.wait()


# What last.pt and best.pt hold

STEPS = 6


@pytest.fixture(scope="module")
def stopped(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an average that was stopped in its second epoch."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(method="at", averaging={"kind": "ema"}, out=str(run)), StopAt(8))
    return run


@pytest.fixture(scope="module")
def learner(stopped: Path) -> Learner:
    complete = config.load(config.read_file(stopped / "config.yaml"))
    student = models.build(complete.model, 3)
    return Learner(student, {}, get("at", loss=complete.loss), complete, precision.choose(complete))


def check(path: Path, learner: Learner) -> None:
    """All that a resumed run asks of last.pt before it goes on."""
    saved = checkpoints.read(path)
    checkpoints.check_fit(path, saved, learner, STEPS)
    learner.load_state_dict(saved)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in nested dicts and lists."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*at, key)
        yield from places(inner, (*at, key))


def holder(value: Any, at: tuple[Any, ...]) -> Any:
    for key in at[:-1]:
        value = value[key]
    return value


ODD: list[Callable[[], object]] = [
    lambda: None,
    lambda: -1,
    lambda: True,
    lambda: "text",
    lambda: float("nan"),
    lambda: 10**5000,
    lambda: {},
    lambda: [],
    lambda: {3: 1},
    lambda: [None],
    lambda: torch.zeros(2, 3),
    lambda: torch.tensor(1),
    lambda: torch.ones(1).expand(10**12),
    lambda: torch.empty(3, device="meta"),
    lambda: torch.eye(3).to_sparse(),
    lambda: torch.zeros(3, dtype=torch.complex64),
    lambda: torch.zeros(3).to(torch.float8_e4m3fn),
]


def test_a_whole_checkpoint_is_believed(stopped: Path, learner: Learner) -> None:
    check(stopped / "last.pt", learner)
    checkpoints.load_best(stopped / "best.pt", models.build("resnet8", 3), 1)


@pytest.mark.parametrize("seed", range(4))
def test_any_other_content_is_refused_in_a_line_or_changes_nothing(
    seed: int, stopped: Path, learner: Learner, tmp_path: Path
) -> None:
    """A key dropped, or something else in its place, wherever it is nested, in a file whose seal fits."""
    path, draw = tmp_path / "last.pt", random.Random(seed)
    whole = torch.load(stopped / "last.pt", weights_only=True)
    everywhere, said = list(places(whole)), list[str]()
    required = ("model", "progress", "optimizer", "telemetry", "teachers_sha256", "scaler", "config")
    chosen = [(key,) for key in whole] + [at for at in everywhere if at[0] in required and len(at) == 2]
    for at in [*chosen, *draw.sample(everywhere, 40)]:
        content = copy.deepcopy(whole)
        inside = holder(content, at)
        if draw.random() < 0.4:
            del inside[at[-1]]
        else:
            inside[at[-1]] = draw.choice(ODD)()
        write_tensors(path, content)
        try:
            check(path, learner)
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 40
    for line in said:
        assert line.startswith(f"--resume: {path}: ")
        assert "\n" not in line
        assert len(line) < 500


@pytest.mark.parametrize(
    "key",
    [
        "format", "model", "dataset", "class_names", "config", "student", "progress", "metrics", "optimizer",
        "scaler", "micro_batch", "telemetry", "pipeline", "data_sha256", "teachers_sha256",
    ],
)  # fmt: skip
def test_each_key_is_needed(key: str, stopped: Path, tmp_path: Path) -> None:
    content = torch.load(stopped / "last.pt", weights_only=True)
    del content[key]
    write_tensors(tmp_path / "last.pt", content)
    with pytest.raises(ValueError, match=rf"^--resume: [^\n]*last\.pt: [^\n]*key '{key}'[^\n]*$"):
        checkpoints.read(tmp_path / "last.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda c: c["progress"].update(step=7),
            "'progress' holds step 7, epoch 1 and 2 steps in it, and an epoch has 6",
        ),
        (lambda c: c["progress"].update(step_in_epoch=9, step=15), "and an epoch has 6"),
        (lambda c: c["progress"].update(best={}), "no rows that fit"),
        (lambda c: c["progress"]["totals"].update(other=1.0), "'progress.totals' holds"),
        (lambda c: c["student"].pop("bn1.num_batches_tracked"), "'student.bn1.num_batches_tracked' is missing"),
        (lambda c: c["student"].update(more=torch.ones(1)), "'student.more' is unknown"),
        (lambda c: c["averaged"].pop("n_averaged"), "'averaged.n_averaged' is missing"),
        (lambda c: c.pop("averaged"), "'averaged.n_averaged' is missing"),
        (lambda c: c["student"].update({"linear.bias": torch.ones(4)}), "'student.linear.bias' is of shape (4,)"),
        (
            lambda c: c["student"].update({"linear.bias": torch.ones(3).double()}),
            "'student.linear.bias' is of shape (3,)",
        ),
        (
            lambda c: c["student"]["linear.bias"].fill_(torch.nan),
            "'student.linear.bias' holds values that are not finite",
        ),
        (lambda c: c["optimizer"]["state"].update({99: {"momentum_buffer": None}}), "'optimizer.state.99' holds"),
        (lambda c: c["optimizer"]["state"][0].update(other=None), "'optimizer.state.0' holds"),
        (
            lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.ones(2)),
            "'optimizer.state.0.momentum_buffer' is of shape (2,)",
        ),
        (lambda c: c["telemetry"].update(sums=torch.zeros(1, 3)), "'telemetry.sums' holds no table of"),
        (lambda c: c.update(pipeline="other"), "'pipeline' holds 'other'"),
        (lambda c: c["class_names"].pop(), "'class_names' holds"),
        (lambda c: c.update(format=torch.ones(2)), "'format' holds Tensor,"),
        (lambda c: c.update(format="2"), "'format' holds '2', and this version reads 1 and 2"),
        (lambda c: c.update(format=True), "'format' holds True"),
    ],
)
def test_what_does_not_fit_is_named(
    change: Callable[[Any], object], words: str, stopped: Path, learner: Learner, tmp_path: Path
) -> None:
    content = torch.load(stopped / "last.pt", weights_only=True)
    change(content)
    write_tensors(tmp_path / "last.pt", content)
    with pytest.raises(ValueError, match=r"^--resume: [^\n]*last\.pt: [^\n]*$") as error:
        check(tmp_path / "last.pt", learner)
    assert words in str(error.value)


def test_a_copy_of_best_is_no_last(stopped: Path, tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes((stopped / "best.pt").read_bytes())
    with pytest.raises(ValueError, match=r"the key 'optimizer' is missing$"):
        checkpoints.read(tmp_path / "last.pt")


def test_the_best_of_another_epoch_is_not_the_best(stopped: Path) -> None:
    with pytest.raises(ValueError, match=r"best\.pt: is of epoch 1, and the best is 2$"):
        checkpoints.load_best(stopped / "best.pt", models.build("resnet8", 3), 2)
    with pytest.raises(ValueError, match=r"best\.pt: the key 'student.linear.weight' is of shape \(3, 64\)"):
        checkpoints.load_best(stopped / "best.pt", models.build("resnet8", 4), 1)


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_one_flipped_bit_of_a_checkpoint_is_found(name: str, stopped: Path, tmp_path: Path) -> None:
    """At 400 places, and in the whole seal."""
    data, draw = (stopped / name).read_bytes(), random.Random(name)
    kind = checkpoints.LastCheckpoint if name == "last.pt" else checkpoints.BestCheckpoint
    path = tmp_path / name
    for bit in [
        *(draw.randrange(8 * len(data)) for _ in range(400)),
        *range(8 * (len(data) - 80), 8 * len(data), 3),
    ]:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"^--resume: [^\n]* damaged[^\n]*$"):
            checkpoints.read(path, kind)


def test_a_run_from_before_checksums_goes_on_and_says_so(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from engine.common.console import ConsoleReporter

    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    for name in ("last.pt", "best.pt"):
        torch.save(torch.load(run / name, weights_only=True) | {"format": 1}, run / name)
    lifecycle.resume(run, ConsoleReporter())
    assert "last.pt is a checkpoint from before they had a checksum of the whole file" in capsys.readouterr().out
    assert torch.load(run / "last.pt", weights_only=True)["format"] == 2


def test_what_other_code_wrote_is_said(stopped: Path, tmp_path: Path) -> None:
    content = torch.load(stopped / "best.pt", weights_only=True)
    assert weights.origin(content) == ()
    write_tensors(
        tmp_path / "best.pt", content | {"made_by": content["made_by"] | {"torch": "2.0", "code": "0" * 12}}
    )
    note = f"written by engine {engine.__version__}, code {'0' * 12}, torch 2.0, and read by engine "
    assert any(told.startswith(note) for told in weights.load_model(tmp_path / "best.pt").notes)
