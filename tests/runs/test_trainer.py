"""Epochs of a run, and the files that it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor

import engine
from engine import config, models
from engine.attacks import pgd
from engine.common.console import Reporter
from engine.common.stopping import RunFailed
from engine.evaluation.measure import Result
from engine.kernels import dispatch
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Split, limited
from engine.pipelines.tensor import TensorPipeline
from engine.runs import assemble, lifecycle, trainer
from engine.runs.assemble import Parts
from engine.runs.checkpoints import Progress
from engine.runs.session import Session
from engine.system import precision
from engine.training.learner import Learner
from tests.runs.helpers import rows_of


@pytest.mark.parametrize("amp", [False, True])
def test_what_amp_leaves_in_float32_is_trained_without_tf32(
    amp: bool, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flags exist without a GPU. Without AMP torch's own default holds."""
    seen = set()
    learn = Learner.learn

    def noting(*args: Any, **kwargs: Any) -> None:
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        seen.add((matmul.allow_tf32, cudnn.allow_tf32, cudnn.conv.fp32_precision))  # type: ignore[attr-defined]
        learn(*args, **kwargs)

    monkeypatch.setattr(Learner, "learn", noting)
    engine.train(tiny.config(method="st", epochs=1, amp=amp, out=str(tmp_path / "run")))
    assert seen == {(False, False, "ieee") if amp else (False, True, "tf32")}


# ---------------------------------------------------------------- the run directory


def test_the_run_directory_answers_questions(tiny: Any, tmp_path: Path) -> None:
    result = engine.train(tiny.config(method="iad1", out=str(tmp_path / "run"), epochs=3))
    run = result.path
    assert yaml.safe_load((run / "config.yaml").read_text())["loss"]["warmup"] == 1
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.yaml", "provenance.json", "metrics.jsonl", "tensorboard", "last.pt", "best.pt", "summary.json",
        "loss.png", "accuracy.png", "reliability.png",
    }  # fmt: skip
    for name in ("loss.png", "accuracy.png", "reliability.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) >= 300
            colours = picture.convert("RGB").getcolors(10**6)
            assert colours is not None
            assert len(colours) > 10  # something is drawn

    record = json.loads((run / "provenance.json").read_text())
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record["seeds"] == {"run": 0}
    assert len(record["data"]["sha256"]) == 64
    assert record["teachers"]["teacher"]["source"] == f"checkpoint {tiny.teacher}"
    assert set(record["precision"]) == {"training", "attack", "choosing", "evaluation"}
    assert record["kernels"].keys() == dispatch.SERVED_BY.keys()
    assert record["hardware"]["processor"]

    steps, epochs = rows_of(run, "step"), rows_of(run, "epoch")
    # A row per log interval of 4 steps, and one where an epoch of 6 ends inside an interval.
    assert [row["step"] for row in steps] == [4, 6, 8, 12, 16, 18]
    assert [row["epoch"] for row in epochs] == [1, 2, 3]
    assert [row["step"] for row in epochs] == [6, 12, 18]
    assert [row["phase"] for row in epochs] == ["ard", "iad1", "iad1"]
    for row in epochs:
        assert 0 <= row["natural_accuracy"] <= 1
        assert 0 <= row["robust_accuracy"] <= 1
        assert row["measured_n"] == 18  # the test images, since none are held out
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        assert 10**8 < row["peak_memory"] <= 1.01 * most  # the kernel counts both in parts, not at one moment
    assert epochs[0].keys() < epochs[1].keys()
    assert {"kl_at_nat"} <= epochs[0].keys()
    assert {"kl_at_nat", "kl_self", "alpha", "train_cases"} <= epochs[1].keys()
    for row in (*steps, *epochs):
        assert 0 <= row["attack_zero_gradients"] < 0.5
        assert row["attack_non_finite_gradients"] == 0

    summary = json.loads((run / "summary.json").read_text())
    assert summary == result.summary
    assert summary["last"] == epochs[-1]
    assert summary["best"] == max(epochs, key=lambda row: row["robust_accuracy"])
    assert summary["selected_on"] == "test"
    assert summary["test_of_last"]["pgd10"]["accuracy"] == epochs[-1]["robust_accuracy"]
    for name, row in (("last.pt", summary["last"]), ("best.pt", summary["best"])):
        checkpoint = torch.load(run / name, weights_only=True)
        assert checkpoint["metrics"] == row
        models.build("resnet8", 3).load_state_dict(checkpoint["student"])


def test_step_rows_average_to_the_epoch_row(tiny: Any, tmp_path: Path) -> None:
    result = lifecycle.train(tiny.config(method="iad1", epochs=2, out=str(tmp_path / "run")))
    sizes = {4: 32, 6: 10, 8: 16, 12: 26}  # images in each interval: batches of 8, and of 2 at an epoch's end
    for epoch in rows_of(result.path, "epoch"):
        rows = [row for row in rows_of(result.path, "step") if row["epoch"] == epoch["epoch"]]
        for key in {
            "loss",
            "kl_at_nat",
            "kl_self",
            "alpha",
            "train_student_adversarial_accuracy",
            "attack_zero_gradients",
        } & epoch.keys():
            mean = sum(sizes[row["step"]] * row[key] for row in rows) / 42
            assert epoch[key] == pytest.approx(mean, rel=1e-12)


def test_tensorboard_holds_the_rows(tiny: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = lifecycle.train(tiny.config(method="at", out=str(tmp_path / "run")))
    events = EventAccumulator(str(result.path / "tensorboard"))
    events.Reload()
    for event in ("step", "epoch"):
        points = [(point.step, point.value) for point in events.Scalars(f"{event}/loss")]
        assert points == [(row["step"], pytest.approx(row["loss"])) for row in rows_of(result.path, event)]


def test_same_seed_same_bits_other_seed_other_bits(tiny: Any, tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> dict[str, Tensor]:
        run = lifecycle.train(tiny.config(method="iad2", seed=seed, out=str(tmp_path / name)))
        student: dict[str, Tensor] = torch.load(run.path / "last.pt", weights_only=True)["student"]
        return student

    first, again, other = weights("first", 5), weights("again", 5), weights("other", 6)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_the_global_random_state_is_left_alone(tiny: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    lifecycle.train(tiny.config(method="iad1", epochs=1, out=str(tmp_path / "run")))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_loss_that_is_not_finite_stops_the_run(tiny: Any, tmp_path: Path, cli: Any) -> None:
    run = tmp_path / "run"
    keys = {"method": "at", "lr": 1e30, "checkpoint_every": 1, "log_every": 1}
    outcome = cli(*tiny.flags(**keys, out=str(run)))
    assert outcome.code == 1
    (line,) = outcome.err.strip().splitlines()
    assert "step 2 is not finite: ce_adv" in line
    assert str(run / "last.pt") in line
    assert torch.load(run / "last.pt", weights_only=True)["progress"]["step"] == 1
    (row,) = rows_of(run, "step")
    assert math.isfinite(row["loss"])


def test_a_bad_loss_inside_an_interval_is_named_and_never_saved(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"step 2 is not finite: kl_at_nat.*no checkpoint yet"):
        lifecycle.train(
            tiny.config(method="ard", lr=1e30, log_every=5, checkpoint_every=4, out=str(tmp_path / "run"))
        )
    assert not (tmp_path / "run" / "last.pt").exists()


# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("keys", "epochs", "rates"),
    [
        ({"method": "ard"}, 4, [0.1, 0.1, 0.01, 0.001]),
        ({"method": "ard", "semantics": "official"}, 4, [0.1, 0.1, 0.01, 0.01]),
        ({"method": "at", "semantics": "official"}, 10, [0.1] * 2 + [0.01] * 3 + [0.001] * 5),
        ({"method": "st", "optim": {"milestones": [2, 3]}}, 5, [0.1, 0.1, 0.01, 0.001, 0.001]),
        ({"method": "st", "optim": {"milestones": [], "lr_factors": []}, "lr": 0.2}, 2, [0.2, 0.2]),
    ],
    ids=["paper", "official student", "official teacher", "epochs given", "constant"],
)
def test_learning_rates(keys: dict[str, Any], epochs: int, rates: list[float], tiny: Any, tmp_path: Path) -> None:
    run = lifecycle.train(tiny.config(**keys, epochs=epochs, out=str(tmp_path / "run"), attack={"num_steps": 0}))
    assert [row["lr"] for row in rows_of(run.path, "epoch")] == pytest.approx(rates)


def test_the_optimizer_is_sgd_as_the_paper_gives_it(tiny: Any, tmp_path: Path) -> None:
    """One epoch in float64 of standard training equals a loop written out by hand."""
    keys = {"method": "st", "dtype": "float64", "epochs": 1, "augment": False, "model": "resnet8", "seed": 4}
    run = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "run")))
    trained = torch.load(run.path / "last.pt", weights_only=True)["student"]

    complete = config.load(tiny.config(**keys))
    dataset = assemble.load_data(complete, Reporter())
    model = assemble.build_student(complete, dataset, precision.choose(complete))
    momentum = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    assert isinstance(dataset.train, Split)
    sampling = Sampling(len(dataset.train), 8, seed=4)
    pipeline = TensorPipeline(
        dataset.train, sampling, augment=False, flip=False, device="cpu", dtype=torch.float64
    )
    for batch in pipeline.epoch(0):
        loss = F.cross_entropy(model(batch.x_nat), batch.labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, value), gradient in zip(model.named_parameters(), gradients, strict=True):
                momentum[name] = 0.9 * momentum[name] + gradient + 2e-4 * value
                value.copy_(value - 0.1 * momentum[name])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-11, atol=1e-13)


# ---------------------------------------------------------------- mixed precision


def test_steps_in_mixed_precision_stay_near(tiny: Any, tmp_path: Path, bf16: None) -> None:
    """The loss of the first step with AMP is that without, up to bfloat16's rounding."""
    losses = []
    for amp in (False, True):
        keys = {"method": "iad2", "loss": {"warmup": 0}, "epochs": 1, "log_every": 1, "attack": {"num_steps": 0}}
        run = lifecycle.train(tiny.config(**keys, amp=amp, out=str(tmp_path / str(amp))))
        losses.append(rows_of(run.path, "step")[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


# ---------------------------------------------------------------- held-out images


def test_validation_images_are_held_out_of_training(tiny: Any, tmp_path: Path) -> None:
    run = lifecycle.train(tiny.config(method="st", validation=0.2, epochs=1, out=str(tmp_path / "run")))
    (row,) = rows_of(run.path, "epoch")
    assert row["step"] == math.ceil((42 - 8) / 8)
    assert row["measured_on"] == "validation"
    assert row["measured_in"] == "float32"
    assert run.summary["selected_on"] == "validation"
    assert run.summary["test_of_best"]["natural"]["n"] == 18


def test_the_probe_equals_its_definition(tiny: Any, tmp_path: Path) -> None:
    run = lifecycle.train(tiny.config(method="ard", epochs=1, out=str(tmp_path / "run"), seed=3))
    (row,) = rows_of(run.path, "epoch")
    complete = config.load(tiny.config(method="ard", seed=3))
    dataset = assemble.load_data(complete, Reporter())
    chosen = limited(dataset.train.labels, 8, 0, "n")
    x_nat = dataset.train.images[chosen].permute(0, 3, 1, 2).float() / 255
    labels = dataset.train.labels[chosen]
    student, teacher = models.build("resnet8", 3).eval(), models.build("resnet8", 3).eval()
    student.load_state_dict(torch.load(run.path / "last.pt", weights_only=True)["student"])
    teacher.load_state_dict(torch.load(tiny.teacher, weights_only=True)["student"])
    spec = pgd.preset("pgd10", 8 / 255)
    x_adv = pgd.pgd(student, x_nat.to(memory_format=torch.channels_last), labels, spec, seed=3)
    with torch.no_grad():
        nat, adv = teacher(x_nat).argmax(1) == labels, teacher(x_adv).argmax(1) == labels
        alpha = teacher(x_adv).softmax(1)[torch.arange(8), labels] ** 0.1
    assert row["probe_cases"] == {
        "both_right": (nat & adv).double().mean().item(),
        "only_natural_right": (nat & ~adv).double().mean().item(),
        "both_wrong": (~nat & ~adv).double().mean().item(),
        "only_adversarial_right": (~nat & adv).double().mean().item(),
    }
    assert sum(row["probe_cases"].values()) == pytest.approx(1)
    assert row["probe_alpha"] == pytest.approx(alpha.mean().item(), rel=1e-5)
    assert sum(row["probe_alpha_histogram"]) == pytest.approx(1)


# ---------------------------------------------------------------- the best epoch


@pytest.mark.parametrize(("method", "best"), [("st", 3), ("at", 1)])
def test_the_best_epoch(
    method: str, best: int, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a standard network learns, natural accuracy rises, and what robustness it had by chance is lost."""
    measured = iter([(0.3, 0.2), (0.5, 0.1), (0.7, 0.0)])

    def evaluated(*args: Any, **keys: Any) -> dict[str, Result]:
        return {
            name: Result(name, round(100 * accuracy), 100, "", 0.0)
            for name, accuracy in zip(("natural", "pgd10"), next(measured), strict=True)
        }

    monkeypatch.setattr(trainer, "evaluate", evaluated)
    run = lifecycle.train(tiny.config(method=method, epochs=3, out=str(tmp_path / "run"), eval={"final": []}))
    assert run.summary["selected_by"] == {"st": "natural_accuracy", "at": "robust_accuracy"}[method]
    assert run.summary["best"]["epoch"] == best
    assert torch.load(run.path / "best.pt", weights_only=True)["metrics"]["epoch"] == best


# ---------------------------------------------------------------- the constructor


class Untouchable:
    """A part that nothing may be asked of."""

    def __getattribute__(self, name: str) -> object:
        raise AssertionError(f"{name} was asked for")


def untouchable(kind: Any) -> Any:
    return kind(**{field.name: Untouchable() for field in dataclasses.fields(kind)})


def test_constructing_a_trainer_does_no_work() -> None:
    session, parts, progress = untouchable(Session), untouchable(Parts), Progress()
    made = trainer.Trainer(session, parts, progress)
    assert (made.session, made.parts, made.progress) == (session, parts, progress)
    with pytest.raises(AssertionError, match="was asked for"):
        made.fit()
