"""A student's first weights from a file, and snapshots of it: what a comparison with another program needs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import config, methods, models
from engine.attacks.pgd import started
from engine.common.stopping import Interrupted
from engine.common.tensor_files import read_tensors
from engine.models.weights import load_model
from engine.pipelines import datasets
from engine.pipelines.sampling import Sampling
from engine.pipelines.tensor import TensorPipeline
from engine.runs import lifecycle, teachers
from engine.system import precision
from engine.training import schedule
from engine.training.learner import Learner
from tests.conftest import CLASSES
from tests.runs.helpers import Listener
from tests.runs.test_resume import StopAt, assert_same_bits, assert_same_run

EVERY = {"snapshot_every": 4, "eval": {"final": [], "probe_size": 8}}


def snapshot(run: Path, step: int) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / "snapshots" / f"step-{step}.pt", weights_only=True)
    return content


def steps(run: Path) -> set[str]:
    return {path.name for path in (run / "snapshots").iterdir()}


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Weights as another program saved them."""
    torch.manual_seed(11)
    network = models.build("resnet8", 3)
    path = tmp_path / "foreign.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in network.state_dict().items()}}, path)
    return path


def test_a_student_starts_from_the_weights_of_a_file(tiny: Any, foreign: Path, tmp_path: Path) -> None:
    run = lifecycle.train(tiny.config(**EVERY, method="at", init=str(foreign), out=str(tmp_path / "run"))).path
    digest = hashlib.sha256(foreign.read_bytes()).hexdigest()
    assert_same_bits(snapshot(run, 0)["student"], load_model(foreign).module.state_dict())
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["init"] == {"source": str(foreign), "sha256": digest}
    assert torch.load(run / "last.pt", weights_only=True)["init_sha256"] == digest
    other = lifecycle.train(tiny.config(**EVERY, method="at", out=str(tmp_path / "other"))).path
    assert "init" not in json.loads((other / "provenance.json").read_text())
    assert torch.load(other / "last.pt", weights_only=True)["init_sha256"] is None
    first = "conv1.weight"
    assert not torch.equal(snapshot(run, 0)["student"][first], snapshot(other, 0)["student"][first])


def test_the_seed_draws_all_but_the_weights(tiny: Any, foreign: Path, tmp_path: Path) -> None:
    """The same first weights, and another order of the images."""
    keys = {**EVERY, "method": "at", "init": str(foreign)}
    left, right = (lifecycle.train(tiny.config(**keys, seed=s, out=str(tmp_path / str(s)))).path for s in (1, 2))
    assert_same_bits(snapshot(left, 0)["student"], snapshot(right, 0)["student"])
    assert not torch.equal(
        snapshot(left, 4)["student"]["conv1.weight"], snapshot(right, 4)["student"]["conv1.weight"]
    )


def test_a_run_from_a_file_is_resumed_without_it(tiny: Any, foreign: Path, tmp_path: Path) -> None:
    keys = {**EVERY, "method": "iad1", "init": str(foreign)}
    whole = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "whole"))).path
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(**keys, out=str(tmp_path / "parts")), StopAt(5))
    foreign.unlink()
    parts = lifecycle.resume(tmp_path / "parts").path
    assert_same_run(whole, parts)
    assert json.loads((parts / "provenance.json").read_text())["init"]["source"] == str(foreign)


@pytest.mark.parametrize("flag", ["--init", "--set"])
def test_the_command_takes_it(flag: str, tiny: Any, foreign: Path, tmp_path: Path, cli: Any) -> None:
    given = str(foreign) if flag == "--init" else f"init={foreign}"
    keys = {**EVERY, "method": "st", "epochs": 1, "out": str(tmp_path / "run")}
    outcome = cli(*tiny.flags(**keys), flag, given)
    assert outcome.code == 0, outcome.err
    assert "Initial weights: resnet8 of" in outcome.out


def bare(path: Path, network: nn.Module, **beside: Any) -> Path:
    torch.save({"state_dict": network.state_dict(), **beside}, path)
    return path


@pytest.mark.parametrize(
    ("made", "keys", "words"),
    [
        (lambda p: bare(p, models.build("preactresnet18", 3)), {}, "these are no weights of resnet8"),
        (lambda p: bare(p, models.build("resnet8", 3, normalize=True)), {}, "normalize is false"),
        (lambda p: bare(p, models.build("resnet8", 3)), {"normalize": True}, "normalize is true"),
        (lambda p: p, {}, "cannot be read"),
        (lambda p: (p.write_bytes(b"PK\x03\x04"), p)[1], {}, "damaged"),
    ],
    ids=["architecture", "normalises", "does not normalise", "missing", "damaged"],
)
def test_what_does_not_fit_is_refused(made: Any, keys: Any, words: str, tiny: Any, tmp_path: Path) -> None:
    path = made(tmp_path / "given.pth")
    with pytest.raises(ValueError, match=rf"^init: {path}.*{words}") as refusal:
        lifecycle.train(tiny.config(method="st", init=str(path), out=str(tmp_path / "run"), **keys))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_classes_in_another_order_are_put_into_the_data_s(tiny: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = models.build("resnet8", 3)
    path = bare(tmp_path / "given.pth", network, classes=["triangle", "circle", "square"])
    keys = {**EVERY, "method": "st", "epochs": 1}
    run = lifecycle.train(tiny.config(**keys, init=str(path), out=str(tmp_path / "run"))).path
    started_from = snapshot(run, 0)["student"]
    assert CLASSES == ("circle", "square", "triangle")
    assert torch.equal(started_from["linear.weight"], network.state_dict()["linear.weight"][[1, 2, 0]])
    assert torch.equal(started_from["conv1.weight"], network.state_dict()["conv1.weight"])


@pytest.mark.parametrize(
    ("classes", "names", "words"),
    [
        (4, None, "the head is a new one: the checkpoint's head has 4 classes, the data set has 3"),
        (
            3,
            ["circle", "star", "square"],
            "the head is a new one: its 3 classes are not the 3 of the data: it has 'star'",
        ),
        (1000, [f"n{index:08}" for index in range(1000)], "the head is a new one: its 1000 classes are not the 3"),
    ],
    ids=["number", "names", "ImageNet"],
)
def test_for_other_classes_the_head_is_drawn_from_the_seed(
    classes: int, names: list[str] | None, words: str, tiny: Any, tmp_path: Path
) -> None:
    """It is the one that the run would have without `init`; all else is the file's."""
    torch.manual_seed(3)
    network = models.build("resnet8", classes)
    path = bare(tmp_path / "given.pth", network, **({} if names is None else {"classes": names}))
    keys, listener = {**EVERY, "method": "st", "epochs": 1, "seed": 6}, Listener()
    run = lifecycle.train(tiny.config(**keys, init=str(path), out=str(tmp_path / "run")), listener).path
    drawn = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "drawn"))).path
    assert any(line.startswith(words) for line in listener.lines)
    first, own, theirs = snapshot(run, 0)["student"], snapshot(drawn, 0)["student"], network.state_dict()
    for name, value in first.items():
        if "num_batches" not in name:
            assert torch.equal(value, (own if name.startswith("linear.") else theirs)[name]), name


def test_weights_in_float64_stay_so_where_the_run_is(tiny: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = models.build("resnet8", 3).double()
    with torch.no_grad():
        network.get_parameter("conv1.weight").add_(1e-12)
    keys = {**EVERY, "method": "st", "epochs": 1, "dtype": "float64"}
    path = bare(tmp_path / "given.pth", network)
    run = lifecycle.train(tiny.config(**keys, init=str(path), out=str(tmp_path / "run"))).path
    assert torch.equal(snapshot(run, 0)["student"]["conv1.weight"], network.state_dict()["conv1.weight"])


def test_a_teacher_has_no_part_in_it(tiny: Any, foreign: Path) -> None:
    def teacher(**keys: Any) -> Path:
        complete = config.load(tiny.config(method="iad1", teacher={"checkpoint": None}), keys)
        wanted = teachers.run_config(complete, "teacher")
        assert (wanted.init, wanted.snapshot_every) == (None, 0)
        return teachers.cache_path(wanted, datasets.load("folder", str(tiny.folder)))

    assert teacher(init=str(foreign), snapshot_every=5) == teacher()


def test_a_relative_path_is_kept_whole(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(foreign.parent)
    assert config.with_absolute_paths(config.load({"init": foreign.name})).init == str(foreign)
    for word in ("timm", "torchvision"):  # pretrained weights of that library; a file of that name is ./timm
        assert config.with_absolute_paths(config.load({"init": word})).init == word
        path = config.with_absolute_paths(config.load({"init": f"./{word}"})).init
        assert path == str(foreign.parent / word)


# ---------------------------------------------------------------- snapshots


def test_snapshots_are_kept_every_so_many_steps(tiny: Any, tmp_path: Path) -> None:
    run = lifecycle.train(tiny.config(**EVERY, method="at", out=str(tmp_path / "run"))).path
    assert steps(run) == {"step-0.pt", "step-4.pt", "step-8.pt", "step-12.pt"}
    for step in (0, 4, 8, 12):
        content = read_tensors(run / "snapshots" / f"step-{step}.pt")
        assert content.sealed
        assert content.value["step"] == step
    last = torch.load(run / "last.pt", weights_only=True)
    assert_same_bits(snapshot(run, 12)["student"], last["student"])
    loaded = load_model(run / "snapshots" / "step-4.pt")
    assert (loaded.name, loaded.class_names) == ("resnet8", CLASSES)
    none = lifecycle.train(tiny.config(method="at", epochs=1, out=str(tmp_path / "none"))).path
    assert not (none / "snapshots").exists()


@pytest.mark.parametrize("stop", [3, 4, 7, 11])
def test_snapshots_of_a_resumed_run_are_those_of_a_whole_one(stop: int, tiny: Any, tmp_path: Path) -> None:
    keys = {**EVERY, "method": "iad2", "checkpoint_every": 3}
    whole = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "whole"))).path
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(**keys, out=str(tmp_path / "parts")), StopAt(stop))
    parts = lifecycle.resume(tmp_path / "parts").path
    assert steps(parts) == steps(whole)
    for name in steps(whole):
        assert (parts / "snapshots" / name).read_bytes() == (whole / "snapshots" / name).read_bytes(), name


def test_a_run_can_be_repeated_step_by_step(tiny: Any, tmp_path: Path) -> None:
    """From its first snapshot, by the public step, over the batches that the pipeline gives for (seed, epoch)."""
    keys = {**EVERY, "method": "iad1", "dtype": "float64", "augment": True}
    run = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "run"))).path
    complete = config.load(config.read_file(run / "config.yaml"))
    at, data = precision.choose(complete), datasets.load("folder", str(tiny.folder)).train
    student = at.place(models.build("resnet8", 3))
    student.load_state_dict(snapshot(run, 0)["student"])
    teacher = at.place(load_model(tiny.teacher).module).eval()
    method = methods.get("iad1", loss=complete.loss)
    learner = Learner(student.train(), {"teacher": teacher}, method, complete, at)
    pipeline = TensorPipeline(
        data, Sampling(len(data), 8, complete.seed), augment=True, flip=True, device="cpu", dtype=torch.float64
    )
    step = 0
    for epoch in range(2):
        row = method.warmup if epoch < 1 else method
        assert row is not None
        for batch in pipeline.epoch(epoch):
            learner.learn(batch, row, schedule.learning_rate(complete, step, 6), epoch=epoch)
            step += 1
            if step % 4 == 0:
                assert_same_bits(student.state_dict(), snapshot(run, step)["student"])


def test_the_start_of_a_step_is_a_function_that_can_be_called() -> None:
    """Another program can be given it, as it could not be given a generator."""
    spec = config.load({"method": "ard"}).attack
    images = torch.rand(4, 3, 8, 8)
    sample = torch.tensor([9, 2, 7, 4])
    whole = started(images, spec, seed=3, counter=2, sample=sample)
    part = started(images[1:3], spec, seed=3, counter=2, sample=sample[1:3])
    assert torch.equal(whole[1:3], part)
    assert 0 < (whole - images).abs().max() <= spec.epsilon + 1e-6
