"""The engine's step against the textbook's, in every method, semantics and mode of BatchNorm in the attack."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.lib.steps import expert, textbook
from engine import config, methods, models
from engine.attacks.pgd import started
from engine.config import RunConfig
from engine.pipelines.base import Batch
from engine.system.precision import Precision
from engine.training import step_networks
from engine.training.learner import Learner

CPU = torch.device("cpu")
CLASSES, BATCH, SIZE = 4, 6, 8


@dataclass(frozen=True)
class Case:
    """Both steps from the same weights on the same batches."""

    run: RunConfig

    def networks(self, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, nn.Module]:
        torch.manual_seed(0)
        student, at, st = (models.build("resnet8", CLASSES).to(dtype) for _ in range(3))
        for teacher in (at, st):
            teacher(torch.rand(64, 3, SIZE, SIZE, dtype=dtype))  # statistics that folding cannot take for 0 and 1
            teacher.eval().requires_grad_(False)
        return student.train(), at, st

    def batch(self, step: int, dtype: torch.dtype) -> Batch:
        generator = torch.Generator().manual_seed(step)
        x_nat = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator, dtype=torch.float64).to(dtype)
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        return Batch(x_nat.to(memory_format=torch.channels_last), labels, torch.arange(BATCH) + step * BATCH)

    def ours(self, steps: int, precision: Precision) -> dict[str, Tensor]:
        """Everything that training changes, after so many steps of the engine."""
        student, at, st = self.networks(precision.dtype)
        student = precision.place(student)
        method = methods.get(self.run.method, semantics=self.run.semantics, loss=self.run.loss)
        learner = Learner(student, {"teacher": at, "teacher_st": st}, method, self.run, precision)
        for step in range(steps):
            learner.learn(self.batch(step, precision.dtype), method, self.run.lr, epoch=3)
        return state(student, learner.optimizer)

    def textbook(
        self, steps: int, precision: Precision, layout: torch.memory_format = torch.contiguous_format
    ) -> dict[str, Tensor]:
        student, at, st = (network.to(memory_format=layout) for network in self.networks(precision.dtype))
        sgd = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
        spec = self.run.attack
        setting = textbook.StepSetting(self.run.method, self.run.semantics, spec.bn, spec.num_steps)
        step = textbook.TextbookStep(
            setting, Cast(student, precision), Cast(at, precision), Cast(st, precision), sgd
        )
        for number in range(steps):
            batch = self.batch(number, precision.dtype)
            start = started(batch.x_nat, spec, seed=self.run.seed, counter=3, sample=batch.sample)
            step(
                batch.x_nat.contiguous(memory_format=layout), batch.labels, start.contiguous(memory_format=layout)
            )
        return state(student, sgd)

    def expert(self, steps: int) -> dict[str, Tensor]:
        """State after steps of the expert in float64, not compiled."""
        student, at, st = map(textbook.plain, self.networks(torch.float64))
        sgd = expert.sgd(student, 0.1)
        spec = self.run.attack
        setting = textbook.StepSetting(self.run.method, self.run.semantics, spec.bn, spec.num_steps)
        runs, t_at, t_st = (expert.AutocastNetwork(network, nullcontext) for network in (student, at, st))
        step = expert.ExpertStep(setting, runs, t_at, t_st, sgd)
        for number in range(steps):
            batch = self.batch(number, torch.float64)
            start = started(batch.x_nat, spec, seed=self.run.seed, counter=3, sample=batch.sample)
            step(batch.x_nat, batch.labels, start)
        return state(student, sgd)


class Cast(nn.Module):
    """A network as plain torch runs it: under autocast, if there is any, with its first and last layer too."""

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.network, self.precision = textbook.plain(network), precision

    def forward(self, images: Tensor) -> Tensor:
        with self.precision.autocast():
            logits: Tensor = self.network(images)
        return logits if logits.dtype == torch.float64 else logits.float()


def state(student: nn.Module, sgd: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Without the count of BatchNorm's batches, which the engine does not keep."""
    values = {
        name: value.detach().clone()
        for name, value in student.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    momentum = {
        f"momentum of {name}": sgd.state[value]["momentum_buffer"].clone()
        for name, value in student.named_parameters()
    }
    return values | momentum


def together(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """All momentum, which is the gradient after one step, and all running statistics, each as one vector."""
    kinds = {"gradient": "momentum of", "mean": "running_mean", "variance": "running_var"}
    return {
        kind: torch.cat([value.double().flatten() for name, value in values.items() if part in name])
        for kind, part in kinds.items()
    }


def case(method: str, semantics: str, bn: str, num_steps: int, **keys: Any) -> Case:
    given = {"method": method, "semantics": semantics, "attack": {"bn": bn, "num_steps": num_steps}, "seed": 5}
    return Case(config.load(given, keys))


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    """Relative difference of each tensor, by its norm."""
    assert left.keys() == right.keys()
    return {
        name: float(
            (left[name].double() - right[name].double()).norm() / right[name].double().norm().clamp(min=1e-12)
        )
        for name in left
    }


F64, F32 = Precision(CPU, torch.float64), Precision(CPU, torch.float32)


@pytest.mark.parametrize("bn", ["train", "eval", "batch"])
@pytest.mark.parametrize("semantics", ["paper", "official"])
@pytest.mark.parametrize("method", list(methods.METHODS))
def test_the_step_is_the_textbook_s_in_float64(method: str, semantics: str, bn: str) -> None:
    both = case(method, semantics, bn, 4)
    for steps in (1, 20):
        apart = distance(both.ours(steps, F64), both.textbook(steps, F64))
        assert max(apart.values()) < 1e-9, max(apart, key=apart.__getitem__)


@pytest.mark.parametrize("bn", ["train", "eval", "batch"])
@pytest.mark.parametrize("method", list(methods.METHODS))
def test_the_expert_s_step_is_the_textbook_s_in_float64(method: str, bn: str) -> None:
    both = case(method, "paper", bn, 4)
    for steps in (1, 5):
        apart = distance(both.expert(steps), both.textbook(steps, F64))
        assert max(apart.values()) < 1e-9, max(apart, key=apart.__getitem__)


def test_the_textbook_tells_the_semantics_and_the_modes_apart() -> None:
    """A fault that the equality above would miss, if both sides ignored these."""
    settings = [
        ("iad1", "paper", "train"),
        ("iad1", "official", "train"),
        ("iad1", "paper", "eval"),
        ("iad1", "paper", "batch"),
        ("ard", "paper", "train"),
        ("iad1-down", "paper", "train"),
    ]
    states = [case(*setting, 4).textbook(1, F64) for setting in settings]
    for index, left in enumerate(states):
        for right in states[:index]:
            assert max(distance(left, right).values()) > 1e-6


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
@pytest.mark.parametrize("method", list(methods.METHODS))
def test_a_step_with_given_images_is_as_exact_as_the_textbook_s(method: str, amp: bool, bf16: None) -> None:
    """Error at most twice that of plain torch in that precision; x~ is where the attack would have begun."""
    both = case(method, "paper", "eval", 0)
    precision = Precision(CPU, torch.float32, torch.bfloat16 if amp else None)
    # In our layout: torch's sums of a channel are less exact there.
    plain = both.textbook(1, precision, torch.channels_last)
    exact, ours, textbook = map(together, (both.textbook(1, F64), both.ours(1, precision), plain))
    for kind, value in exact.items():
        assert (ours[kind] - value).norm() <= 2 * (textbook[kind] - value).norm(), kind
        assert (textbook[kind] - value).norm() > 0


def test_the_adversary_s_images_are_the_textbook_s() -> None:
    both = case("trades", "paper", "eval", 10)
    student, _, _ = both.networks(torch.float64)
    batch, spec = both.batch(0, torch.float64), both.run.attack
    method = methods.get("trades")
    built = step_networks.build(student, {}, method, both.run, F64)
    assert built.adversary is not None
    start = started(batch.x_nat, spec, seed=5, counter=3, sample=batch.sample)
    sgd = torch.optim.SGD(student.parameters())
    step = textbook.TextbookStep(textbook.StepSetting("trades", bn="eval"), student, student, student, sgd)
    expected = step.attack(batch.x_nat, batch.labels, start)
    torch.testing.assert_close(built.adversary(batch, 3), expected, rtol=0, atol=1e-15)
    assert (expected - batch.x_nat).abs().max() > 7 / 255
