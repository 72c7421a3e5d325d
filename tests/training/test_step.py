"""One step: forwards that a row needs, gradients and statistics by hand, and the programs that run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import engine
from bench import profile
from bench.lib.steps import several_processes, variants
from bench.lib.steps.engine_step import EngineStep
from engine import config, methods, models
from engine.attacks import pgd
from engine.attacks.twin import Twin
from engine.pipelines.base import Batch
from engine.system.distributed import World
from engine.system.precision import Precision
from engine.training.learner import Learner
from engine.training.step import TrainingStep

CPU = torch.device("cpu")


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
    teachers = {"teacher": at, "teacher_st": st}
    learner = Learner(student, teachers, method, complete, Precision(CPU, torch.float32))
    learner.learn(batch, row, 0.1)
    run = learner.networks
    attacked = [] if run.adversary is None else calls(run.adversary.twin)
    assert len(attacked) == (complete.attack.num_steps + (complete.attack.loss == "kl") if row.needs_x_adv else 0)
    return student.calls, calls(run.teachers["teacher"]), calls(run.teachers["teacher_st"]), attacked


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


@pytest.mark.parametrize("name", ["st", "at", "trades", "ard", "akd2", "iad1", "iad1-down", "iad2"])
@pytest.mark.parametrize("semantics", ["paper", "official"])
def test_a_step_equals_its_transcription(name: str, semantics: str) -> None:
    """Gradients and running statistics of one step in float64, written out by hand from the formulas."""
    torch.manual_seed(1)
    x_nat, labels = torch.rand(5, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    nets = [models.build("resnet8", 4).double() for _ in range(3)]
    student, at, st = nets[0].train(), nets[1].eval(), nets[2].eval()
    twin = models.build("resnet8", 4).double()
    twin.load_state_dict(student.state_dict())

    keys = {"method": name, "semantics": semantics, "attack": {"num_steps": 3}, "seed": 7}
    complete = config.load(keys, {"optim": {"weight_decay": 0}})
    method = methods.get(name, semantics=semantics, loss=complete.loss)
    batch = Batch(x_nat, labels, torch.arange(5))
    learner = Learner(student, {"teacher": at, "teacher_st": st}, method, complete, Precision(CPU, torch.float64))
    losses: list[Tensor] = []
    learner.learn(batch, method, 0.1, epoch=2, on_output=lambda output, _: losses.append(output.loss.loss))

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
    formulas: dict[str, Callable[[], Tensor]] = {
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
    loss = formulas[name]().mean()
    loss.backward()
    torch.testing.assert_close(losses[0].detach(), loss.detach(), rtol=1e-11, atol=0)
    for (key, value), parameter in zip(student.named_parameters(), twin.parameters(), strict=True):
        gradient = learner.optimizer.state[value]["momentum_buffer"]  # of the first step, without decay
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-8, atol=1e-12, msg=key)
    for (key, moved), buffer in zip(student.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(moved, buffer, rtol=1e-11, atol=1e-13, msg=key)


# ---------------------------------------------------------------- who runs it


IMAGES = variants.images_of(variants.RANDOM, 2)
KEYS = {"method": "at", "model": "resnet8", "batch_size": 2, "device": "cpu", "attack": {"num_steps": 1}}

CALLERS: dict[str, tuple[int, Callable[[Any, Path], object]]] = {
    "engine.train": (6, lambda tiny, out: engine.train(tiny.config(method="st", epochs=1, out=str(out)))),
    "engine train --profile": (
        6,
        lambda tiny, out: engine.train(tiny.config(method="st", epochs=1, out=str(out)), profile=1),
    ),
    "bench.profile": (3, lambda tiny, out: profile.record(EngineStep(config.load(KEYS), IMAGES), CPU)),
    "bench.step": (
        1,
        lambda tiny, out: variants.Workload("at", "resnet8", 2, IMAGES, CPU).step(variants.VARIANTS["fp32"])(),
    ),
    "bench.scaling": (
        several_processes.WARMUP + 1,
        lambda tiny, out: several_processes.run(World(), config.load(KEYS), variants.RANDOM, 1),
    ),
}
"""Steps of each program, and a short run of it."""


@pytest.mark.parametrize("caller", CALLERS)
def test_trainer_profiler_and_benchmarks_run_the_same_step(
    caller: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[TrainingStep] = []
    step = TrainingStep.__call__

    def noted(self: TrainingStep, *given: Any, **keys: Any) -> None:
        done.append(self)
        step(self, *given, **keys)

    monkeypatch.setattr(TrainingStep, "__call__", noted)
    steps, run = CALLERS[caller]
    run(tiny, tmp_path / "run")
    assert len(done) == steps
