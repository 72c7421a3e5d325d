"""What a training run does and what it leaves behind."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor, nn

import engine
from engine.attacks import pgd
from engine import config, methods, models
from engine.training import networks, step
from engine.system import precision
from engine.runs import teachers, trainer
from engine.evaluation.measure import Result
from engine.training.learner import Learner
from engine.pipelines.base import Batch
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Split, limited
from engine.pipelines.tensor import TensorPipeline
from engine.common.console import Reporter
from engine.training.step import training_loss
from engine.common.stopping import RunFailed
from engine.system.streams import Lanes
from engine.attacks.twin import Twin


def rows_of(path: Path, event: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == event]


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


class Listener(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


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
    assert set(record["precision"]) == {"training", "attack", "evaluation"}
    assert record["kernels"].keys() == {"distill_loss", "random_start", "pgd_update", "crop_flip"}
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
    result = trainer.train(tiny.config(method="iad1", epochs=2, out=str(tmp_path / "run")))
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

    result = trainer.train(tiny.config(method="at", out=str(tmp_path / "run")))
    events = EventAccumulator(str(result.path / "tensorboard"))
    events.Reload()
    for event in ("step", "epoch"):
        points = [(point.step, point.value) for point in events.Scalars(f"{event}/loss")]
        assert points == [(row["step"], pytest.approx(row["loss"])) for row in rows_of(result.path, event)]


def test_same_seed_same_bits_other_seed_other_bits(tiny: Any, tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> dict[str, Tensor]:
        run = trainer.train(tiny.config(method="iad2", seed=seed, out=str(tmp_path / name)))
        student: dict[str, Tensor] = torch.load(run.path / "last.pt", weights_only=True)["student"]
        return student

    first, again, other = weights("first", 5), weights("again", 5), weights("other", 6)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_the_global_random_state_is_left_alone(tiny: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    trainer.train(tiny.config(method="iad1", epochs=1, out=str(tmp_path / "run")))
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
        trainer.train(
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
    run = trainer.train(tiny.config(**keys, epochs=epochs, out=str(tmp_path / "run"), attack={"num_steps": 0}))
    assert [row["lr"] for row in rows_of(run.path, "epoch")] == pytest.approx(rates)


def test_the_optimizer_is_sgd_as_the_paper_gives_it(tiny: Any, tmp_path: Path) -> None:
    """One epoch in float64 of standard training equals a loop written out by hand."""
    keys = {"method": "st", "dtype": "float64", "epochs": 1, "augment": False, "model": "resnet8", "seed": 4}
    run = trainer.train(tiny.config(**keys, out=str(tmp_path / "run")))
    trained = torch.load(run.path / "last.pt", weights_only=True)["student"]

    complete = config.load(tiny.config(**keys))
    dataset = trainer.load_data(complete, Reporter())
    model = trainer.build_student(complete, dataset, precision.choose(complete))
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


# ---------------------------------------------------------------- the step


class Recorder(nn.Module):
    """A network that notes what passes through it: which images, in which mode, with or without a gradient."""

    def __init__(self, x_nat: Tensor) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
        self.net(x_nat)
        self.x_nat = x_nat
        self.calls: list[str] = []

    def forward(self, images: Tensor) -> Tensor:
        kind = "nat" if torch.equal(images, self.x_nat) else "adv"
        out: Tensor = self.net(images)
        self.calls.append(kind + ("" if out.requires_grad else "_no_grad"))
        return out


def run_step(name: str, semantics: str, in_warmup: bool) -> tuple[list[str], list[str], list[str], list[str]]:
    """Forwards of student, robust and standard teacher in one step, and those of its attack."""
    torch.manual_seed(0)
    batch = Batch(torch.rand(6, 3, 6, 6), torch.arange(6) % 5, torch.arange(6))
    student, at, st = (Recorder(batch.x_nat) for _ in range(3))
    complete = config.load({"method": name, "semantics": semantics})
    method = methods.get(name, semantics=semantics, loss=complete.loss)
    row = method.warmup if in_warmup and method.warmup else method
    at_precision = precision.Precision(torch.device("cpu"), torch.float32)
    built = networks.build(student, {"teacher": at, "teacher_st": st}, row, complete, at_precision)
    output = training_loss(
        built,
        batch,
        row,
        complete.forwards,
        at_precision,
        Lanes(at_precision.device),
        epoch=0,
        in_warmup=in_warmup,
    )
    output.loss.loss.backward()
    attacked = [] if built.adversary is None else calls(built.adversary.twin)
    assert len(attacked) == (complete.attack.num_steps + (complete.attack.loss == "kl") if row.needs_x_adv else 0)
    return student.calls, calls(built.teacher_at), calls(built.teacher_st), attacked


def calls(twin: Twin | None) -> list[str]:
    assert twin is not None
    assert isinstance(twin.module, Recorder)
    return twin.module.calls


@pytest.mark.parametrize(
    ("name", "semantics", "in_warmup", "student", "at", "st"),
    [
        ("st", "paper", False, ["nat"], [], []),
        ("at", "paper", False, ["adv"], [], []),
        ("trades", "paper", False, ["nat_no_grad", "adv", "nat"], [], []),
        ("ard", "paper", False, ["adv", "nat_no_grad"], ["nat_no_grad"], []),
        ("ard", "official", False, ["adv", "nat"], ["nat_no_grad"], []),
        ("iad1", "paper", True, ["adv", "nat_no_grad"], ["nat_no_grad"], []),
        ("iad1", "paper", False, ["adv", "nat"], ["nat_no_grad", "adv_no_grad"], []),
        ("iad1", "official", True, ["adv", "adv_no_grad", "nat"], ["nat_no_grad"], []),
        (
            "iad1", "official", False,
            ["adv", "adv_no_grad", "nat_no_grad", "nat"], ["nat_no_grad", "adv_no_grad"], [],
        ),
        ("akd2", "paper", False, ["adv"], ["adv_no_grad"], ["adv_no_grad"]),
        ("akd2", "official", False, ["adv"], ["adv_no_grad"], ["adv_no_grad"]),
        ("iad2", "paper", True, ["adv"], ["adv_no_grad"], ["adv_no_grad"]),
        ("iad2", "paper", False, ["adv", "nat"], ["adv_no_grad"], ["adv_no_grad"]),
        ("iad2", "official", False, ["adv", "nat"], ["adv_no_grad"], ["adv_no_grad"]),
    ],
)  # fmt: skip
def test_a_step_runs_what_its_row_needs_in_the_published_order(
    name: str, semantics: str, in_warmup: bool, student: list[str], at: list[str], st: list[str]
) -> None:
    assert run_step(name, semantics, in_warmup)[:3] == (student, at, st)


@pytest.mark.parametrize(
    ("name", "in_warmup", "share"),
    [("ard", False, 0.139), ("iad1", True, 0.134), ("iad1", False, 0.246), ("akd2", False, 0.0)],
)
def test_share_of_clean_batches_in_the_published_running_statistics(
    name: str, in_warmup: bool, share: float
) -> None:
    trained, _, _, attacked = run_step(name, "official", in_warmup)
    # A forward in train mode moves a running mean m to 0.9 m + 0.1 (its batch's mean); repeat until it settles.
    clean = 0.0
    for _ in range(100):
        for call in (*attacked, *trained):
            clean = 0.9 * clean + 0.1 * call.startswith("nat")
    assert clean == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize("name", list(methods.TABLE))
@pytest.mark.parametrize("semantics", ["paper", "official"])
def test_a_step_equals_its_transcription(name: str, semantics: str) -> None:
    """Gradients and running statistics of one step in float64, written out by hand from the formulas."""
    torch.manual_seed(1)
    x_nat, labels = torch.rand(5, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    nets = [models.build("resnet8", 4).double() for _ in range(3)]
    student, at, st = nets[0].train(), nets[1].eval(), nets[2].eval()
    twin = models.build("resnet8", 4).double()
    twin.load_state_dict(student.state_dict())

    complete = config.load({"method": name, "semantics": semantics, "attack": {"num_steps": 3}, "seed": 7})
    method = methods.get(name, semantics=semantics, loss=complete.loss)
    batch = Batch(x_nat, labels, torch.arange(5))
    at_precision = precision.Precision(torch.device("cpu"), torch.float64)
    built = networks.build(student, {"teacher": at, "teacher_st": st}, method, complete, at_precision)
    output = training_loss(
        built, batch, method, complete.forwards, at_precision, Lanes(at_precision.device), epoch=2
    )
    output.loss.loss.backward()

    x_adv = pgd.pgd(twin, x_nat, labels, complete.attack, seed=7, counter=2)

    def kl(target: Tensor, logits: Tensor) -> Tensor:
        p, q = target.softmax(1), logits.softmax(1)
        return (p * (p.log() - q.log())).sum(1)

    def ce(logits: Tensor) -> Tensor:
        return -logits.softmax(1)[torch.arange(5), labels].log()

    with torch.no_grad():
        t_nat, t_adv, t_st = at(x_nat), at(x_adv), st(x_adv)
        alpha = t_adv.softmax(1)[torch.arange(5), labels] ** 0.1
    reads_nat = name not in ("at", "akd2")
    if name == "trades":
        twin(x_nat)
    s_adv = twin(x_adv) if name != "st" else x_adv[:, 0, 0, :4]
    if semantics == "official" and name in ("iad1", "iad1-down"):
        twin(x_adv), twin(x_nat)
    s_nat = twin(x_nat) if reads_nat else s_adv
    gamma = {"paper": 1 - alpha, "official": 0.5 * (1 - alpha)}[semantics]
    losses: dict[str, Callable[[], Tensor]] = {
        "st": lambda: ce(s_nat),
        "at": lambda: ce(s_adv),
        "trades": lambda: ce(s_nat) + 6 * kl(s_nat, s_adv),
        "ard": lambda: kl(t_nat, s_adv),
        "akd2": lambda: 0.25 * ce(s_adv) + 0.5 * kl(t_adv, s_adv) + 0.25 * kl(t_st, s_adv),
        "iad1": lambda: kl(t_nat, s_adv) + (1 - alpha) * kl(s_nat, s_adv),
        "iad1-down": lambda: alpha * kl(t_nat, s_adv) + (1 - alpha) * kl(s_nat, s_adv),
        "iad2": lambda: 0.25 * ce(s_adv) + 0.5 * alpha * kl(t_adv, s_adv) + 0.25 * kl(t_st, s_adv)
        + gamma * kl(s_nat, s_adv),
    }  # fmt: skip
    loss = losses[name]()
    loss.mean().backward()
    torch.testing.assert_close(output.loss.loss.detach(), loss.mean().detach(), rtol=1e-11, atol=0)
    for (key, value), parameter in zip(student.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(value.grad, parameter.grad, rtol=1e-8, atol=1e-12, msg=key)
    for (key, moved), buffer in zip(student.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(moved, buffer, rtol=1e-11, atol=1e-13, msg=key)


def test_steps_in_mixed_precision_stay_near(tiny: Any, tmp_path: Path, bf16: None) -> None:
    """The loss of the first step with AMP is that without, up to bfloat16's rounding."""
    losses = []
    for amp in (False, True):
        keys = {"method": "iad2", "loss": {"warmup": 0}, "epochs": 1, "log_every": 1, "attack": {"num_steps": 0}}
        run = trainer.train(tiny.config(**keys, amp=amp, out=str(tmp_path / str(amp))))
        losses.append(rows_of(run.path, "step")[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


# ---------------------------------------------------------------- held-out images


def test_validation_images_are_held_out_of_training(tiny: Any, tmp_path: Path) -> None:
    run = trainer.train(tiny.config(method="st", validation=0.2, epochs=1, out=str(tmp_path / "run")))
    (row,) = rows_of(run.path, "epoch")
    assert row["step"] == math.ceil((42 - 8) / 8)
    assert row["measured_on"] == "validation"
    assert run.summary["selected_on"] == "validation"
    assert run.summary["test_of_best"]["natural"]["n"] == 18


def test_the_probe_equals_its_definition(tiny: Any, tmp_path: Path) -> None:
    run = trainer.train(tiny.config(method="ard", epochs=1, out=str(tmp_path / "run"), seed=3))
    (row,) = rows_of(run.path, "epoch")
    complete = config.load(tiny.config(method="ard", seed=3))
    dataset = trainer.load_data(complete, Reporter())
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


# ---------------------------------------------------------------- teachers


def test_a_teacher_is_trained_once_and_kept(tiny: Any, tmp_path: Path) -> None:
    keys = {"method": "iad2", "teacher": {"checkpoint": None}, "teacher_st": {"checkpoint": None}}
    first, second = Listener(), Listener()
    run = trainer.train(tiny.config(**keys, out=str(tmp_path / "a")), first)
    assert json.loads((run.path / "teacher" / "summary.json").read_text())["method"] == "at"
    assert json.loads((run.path / "teacher_st" / "summary.json").read_text())["method"] == "st"
    again = trainer.train(tiny.config(**keys, out=str(tmp_path / "b"), seed=0), second)
    assert not (again.path / "teacher").exists()
    assert any("training one first" in line for line in first.lines)
    assert any("teacher cache" in line for line in second.lines)
    records = [json.loads((path / "provenance.json").read_text())["teachers"] for path in (run.path, again.path)]
    assert records[0]["teacher"]["sha256"] == records[1]["teacher"]["sha256"]
    cards = [line for line in second.lines if "PGD-10" in line and "held-out" in line]
    assert len(cards) == 2


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
    run = trainer.train(tiny.config(method=method, epochs=3, out=str(tmp_path / "run"), eval={"final": []}))
    assert run.summary["selected_by"] == {"st": "natural_accuracy", "at": "robust_accuracy"}[method]
    assert run.summary["best"]["epoch"] == best
    assert torch.load(run.path / "best.pt", weights_only=True)["metrics"]["epoch"] == best


def test_another_teacher_s_run_is_not_taken_for_ours(tiny: Any, tmp_path: Path) -> None:
    keys = {"method": "ard", "teacher": {"checkpoint": None}, "out": str(tmp_path / "run")}
    trainer.train(tiny.config(**keys))
    (tmp_path / "run" / "teacher").rename(tmp_path / "teacher")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "teacher").rename(tmp_path / "run" / "teacher")
    with pytest.raises(ValueError, match="holds the run of another teacher"):
        trainer.train(config.merge(tiny.config(**keys), {"teacher": {"epochs": 3}}))


def test_a_cache_that_cannot_be_written_loses_nothing(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ENGINE_CACHE", str(tmp_path / "file" / "cache"))
    listener = Listener()
    keys = {"method": "ard", "teacher": {"checkpoint": None}, "out": str(tmp_path / "run")}
    run = trainer.train(tiny.config(**keys), listener)
    assert any("cannot be kept" in line and "file" in line for line in listener.lines)
    record = json.loads((run.path / "provenance.json").read_text())
    assert record["teachers"]["teacher"]["source"].endswith(str(Path("teacher") / "best.pt"))


def test_test_images_do_not_make_another_teacher_where_validation_is_held_out(tiny: Any) -> None:
    def path(**keys: Any) -> Path:
        complete = config.load(tiny.config(method="ard", **keys))
        return teachers.cache_path(
            teachers.run_config(complete, "teacher"), trainer.load_data(complete, Reporter())
        )

    assert path(validation=0.2) == path(validation=0.2, limit_test=6)
    assert path(validation=0) != path(validation=0, limit_test=6)


def test_a_trades_teacher(tiny: Any, tmp_path: Path) -> None:
    keys = {"method": "ard", "teacher": {"checkpoint": None, "method": "trades", "epochs": 1}}
    run = trainer.train(tiny.config(**keys, out=str(tmp_path / "run")))
    teacher = config.load(config.read_file(run.path / "teacher" / "config.yaml"))
    assert (teacher.method, teacher.epochs, teacher.seed) == ("trades", 1, 1)
    assert (teacher.attack.loss, teacher.attack.random_start, teacher.attack.bn) == ("kl", "gaussian", "eval")
    assert teacher.attack.num_steps == 2  # the threat model and the length are the student's


def test_other_data_or_another_recipe_is_another_teacher(tiny: Any) -> None:
    def path(**keys: Any) -> Path:
        complete = config.load(tiny.config(method="ard", **keys))
        dataset = trainer.load_data(complete, Reporter())
        return teachers.cache_path(teachers.run_config(complete, "teacher"), dataset)

    base = path()
    assert path() == base
    assert path(out="elsewhere", log_every=7, loss={"beta": 0.5}, checkpoint_every=3) == base
    different = [
        path(epochs=3), path(limit_train=30), path(seed=1), path(attack={"epsilon": 0.1}), path(batch_size=4),
        path(teacher={"method": "trades"}), path(semantics="official"), path(optim={"weight_decay": 0}),
        path(model="resnet18"), path(amp=True), path(lr=0.05), path(augment=False), path(normalize=True),
    ]  # fmt: skip
    assert len({base, *different}) == 1 + len(different)


CACHED: dict[str, tuple[dict[str, Any], str]] = {
    "aa9e1373ce46": ({"method": "iad1"}, "teacher"),
    "4ea0c7819aab": ({"method": "iad2", "semantics": "official", "lr": 0.05, "validation": 0.1}, "teacher_st"),
    "9b7073db7ee0": (
        {"method": "akd2", "attack": {"epsilon": 0.1, "bn": "batch"}, "optim": {"schedule": "cosine"},
         "workers": 3},
        "teacher",
    ),
    "0ff456114d8e": (
        {"method": "iad1", "semantics": "official", "averaging": {"kind": "ema"}, "compile": "off", "seed": 4,
         "pipeline": "tensor", "eval": {"probe_size": 8, "batch_size": 3}},
        "teacher",
    ),
}  # fmt: skip
"""Places in the cache, with the student they were trained for, as version 0.1.0 had them when it was new."""


@pytest.mark.parametrize("digest", CACHED)
def test_teachers_of_before_are_still_found(digest: str) -> None:
    keys, section = CACHED[digest]
    dataset = SimpleNamespace(sha256="a" * 64, train_sha256="b" * 64)
    wanted = teachers.run_config(config.load(keys), section)
    assert teachers.cache_path(wanted, dataset).stem.endswith(digest)  # type: ignore[arg-type]


def test_a_key_that_came_later_makes_another_teacher_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset: Any = SimpleNamespace(sha256="a" * 64, train_sha256="b" * 64)
    before, after = (config.load({"method": "at", "loss": {"label_smoothing": value}}) for value in (0.0, 0.1))
    old = teachers.cache_path(before, dataset)
    assert teachers.cache_path(after, dataset) != old
    key = config.Key(decides=True, later=True)
    without = config.part(before.tree(), lambda known: known.decides and not known.later)
    monkeypatch.setitem(config.KEYS, "loss.label_smoothing", key)
    found = config.part(before.tree(), lambda known: known.decides and not known.later)
    assert "label_smoothing" in without["loss"]
    assert "label_smoothing" not in found["loss"]
    new = teachers.cache_path(before, dataset)
    assert new != old, "as if the key had not been there when the first teachers were kept"
    assert teachers.cache_path(after, dataset) not in (new, old)


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


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"batch_size": 41}, True),  # 42 images: the last batch has one
        ({"batch_size": 1}, True),
        ({"micro_batch": 1}, True),
        ({"batch_size": 41, "model": "resnet8"}, False),  # its last map is 2x2
        ({"batch_size": 40, "micro_batch": 3}, False),
    ],
    ids=str,
)
def test_one_image_of_which_batch_norm_has_no_variance(
    keys: dict[str, Any], says: bool, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before the training, and only where a map has one pixel: torch refuses the step itself."""
    monkeypatch.setattr(trainer.Trainer, "fit", lambda self: {})
    run = tiny.config(**{"method": "st", "model": "resnet18", "teacher": {"checkpoint": None}} | keys)
    if not says:
        engine.train(run, out=str(tmp_path / "run"))
        return
    with pytest.raises(ValueError, match="^batch_size: a batch or a part of one has a single image, and resnet18"):
        engine.train(run, out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_official_standard_teachers_are_resnet18(tiny: Any) -> None:
    complete = config.load(tiny.config(method="akd2", semantics="official"))
    assert teachers.run_config(complete, "teacher_st").model == "resnet18"
    assert teachers.run_config(complete, "teacher").model == "resnet8"


def test_step_module_is_short() -> None:
    """The step reads like Algorithm 1: a reader sees all of it at once."""
    source = Path(step.__file__).read_text()
    halves = source[source.index("def attack_and_teach") : source.index("def _given")]
    assert len(halves.splitlines()) <= 70
