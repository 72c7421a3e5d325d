"""The engine's step against the textbook's, in every method, semantics and mode of BatchNorm in the attack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bench.lib.steps import expert, textbook
from engine import config, methods
from engine.attacks.pgd import started
from engine.config import AttackSpec, RunConfig
from engine.models.networks.resnet import ResNet
from engine.pipelines.base import Batch
from engine.system.precision import Precision
from engine.training import step_networks
from engine.training.learner import Learner

CPU = torch.device("cpu")
CLASSES, BATCH, SIZE = 4, 6, 8
EPOCH = 70  # from 0, of 100: after every warm-up
OLD = ("st", "at", "trades", "ard", "akd2", "iad1", "iad1-down", "iad2")
NEW = ("rslad", "adaad", "adaiad", "mtard", "saad", "mart", "fgsm-rs", "n-fgsm")
ADDED = tuple(f"{base}+igdm" for base in ("ard", "rslad", "adaad", "iad1"))
UNIFORM, UNCLAMPED, GAUSSIAN = (
    AttackSpec(),
    AttackSpec(clamp_start=False),
    AttackSpec(random_start="gaussian", clamp_start=False),
)
STARTS = {
    "at": UNIFORM,
    "fgsm-rs": UNIFORM,
    "n-fgsm": AttackSpec(start_epsilon=16 / 255),
    **dict.fromkeys(("trades", "rslad", "adaad", "adaiad", "mtard", "saad", "mart"), GAUSSIAN),
}
"""Where attacks begin, as the authors have it; those of the IAD paper, clamped in `paper` alone, aside."""


def start_of(method: str, semantics: str) -> AttackSpec:
    base = method.partition("+")[0]
    return STARTS.get(base, {"paper": UNIFORM, "official": UNCLAMPED}[semantics])


class Reached(NamedTuple):
    """State of the training after a step, and the images of the step's forwards after its attack."""

    state: dict[str, Tensor]
    seen: list[Tensor]


@contextmanager
def watched(student: nn.Module) -> Iterator[list[Tensor]]:
    """The images that the student sees inside, forward by forward."""
    seen: list[Tensor] = []
    handle = student.register_forward_pre_hook(lambda module, images: seen.append(images[0].detach().clone()))
    yield seen
    handle.remove()


@dataclass(frozen=True)
class Case:
    """Both steps from the same weights on the same batches. numbers: of the textbook, see `StepSetting`."""

    run: RunConfig
    epoch: int = EPOCH
    bn: str | None = None
    num_steps: int | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    widths: tuple[int, ...] = (8,)

    @property
    def setting(self) -> textbook.StepSetting:
        """The textbook's step; the attack is its own, not the configuration's."""
        setting = textbook.StepSetting(self.run.method, self.run.semantics, self.bn, self.num_steps)
        return replace(setting, epoch=self.epoch + 1, epochs=self.run.epochs, **self.numbers)

    def start(self, batch: Batch) -> Tensor:
        spec = start_of(self.run.method, self.run.semantics)
        return started(batch.x_nat, spec, seed=self.run.seed, counter=self.epoch, sample=batch.sample)

    @property
    def method(self) -> methods.Method:
        """The row of the epoch."""
        method = methods.get(self.run.method, semantics=self.run.semantics, loss=self.run.loss)
        in_warmup = self.epoch < config.epochs_of(self.run.loss.warmup, self.run.epochs)
        return method.warmup if in_warmup and method.warmup is not None else method

    def networks(self, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, nn.Module]:
        torch.manual_seed(0)
        student, at, st = (ResNet(self.widths, [1] * len(self.widths), CLASSES).to(dtype) for _ in range(3))
        for teacher in (at, st):
            teacher(torch.rand(64, 3, SIZE, SIZE, dtype=dtype))  # statistics that folding cannot take for 0 and 1
            teacher.eval().requires_grad_(False)
        return student.train(), at, st

    def batch(self, step: int, dtype: torch.dtype) -> Batch:
        generator = torch.Generator().manual_seed(step)
        x_nat = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator, dtype=torch.float64).to(dtype)
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        return Batch(x_nat.to(memory_format=torch.channels_last), labels, torch.arange(BATCH) + step * BATCH)

    def ours(self, steps: int, precision: Precision) -> dict[int, Reached]:
        """Everything that training changes, after each step of the engine."""
        student, at, st = self.networks(precision.dtype)
        student = precision.place(student)
        whole = methods.get(self.run.method, semantics=self.run.semantics, loss=self.run.loss)
        learner = Learner(student, {"teacher": at, "teacher_st": st}, whole, self.run, precision)
        reached = {}
        for number in range(steps):
            with watched(student) as seen:
                learner.learn(self.batch(number, precision.dtype), self.method, self.run.lr, epoch=self.epoch)
            reached[number + 1] = Reached(state(student, learner.optimizer), seen)
        return reached

    def textbook(
        self, steps: int, precision: Precision, layout: torch.memory_format = torch.contiguous_format
    ) -> dict[int, Reached]:
        student, at, st = (network.to(memory_format=layout) for network in self.networks(precision.dtype))
        sgd = torch.optim.SGD(
            student.parameters(), lr=self.run.lr, momentum=0.9, weight_decay=self.run.optim.weight_decay
        )
        step = textbook.TextbookStep(
            self.setting, Cast(student, precision), Cast(at, precision), Cast(st, precision), sgd
        )
        reached = {}
        for number in range(steps):
            batch = self.batch(number, precision.dtype)
            x, start = (images.contiguous(memory_format=layout) for images in (batch.x_nat, self.start(batch)))
            a = x if self.run.method == "st" else step.attack(x, batch.labels, start)
            with watched(student) as seen:
                step.learn(x, a, batch.labels)
            reached[number + 1] = Reached(state(student, sgd), seen)
        return reached

    def expert(self, steps: int) -> dict[str, Tensor]:
        """State after steps of the expert in float64, not compiled."""
        student, at, st = map(textbook.plain, self.networks(torch.float64))
        sgd = expert.sgd(student, self.run.lr)
        for group in sgd.param_groups:
            group["weight_decay"] = self.run.optim.weight_decay
        runs, t_at, t_st = (expert.AutocastNetwork(network, nullcontext) for network in (student, at, st))
        step = expert.ExpertStep(self.setting, runs, t_at, t_st, sgd)
        for number in range(steps):
            batch = self.batch(number, torch.float64)
            step(batch.x_nat, batch.labels, self.start(batch))
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


def case(
    method: str,
    semantics: str,
    bn: str | None = None,
    num_steps: int | None = None,
    *,
    epoch: int = EPOCH,
    numbers: dict[str, Any] | None = None,
    **keys: Any,
) -> Case:
    """bn, num_steps: of the attack; None: the method's own. numbers, keys: of textbook and configuration."""
    attack = {name: value for name, value in (("bn", bn), ("num_steps", num_steps)) if value is not None}
    given = {"method": method, "semantics": semantics, "attack": attack, "seed": 5, "epochs": 100}
    return Case(config.load(given, keys), epoch, bn, num_steps, numbers or {})


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Any]:
    """Relative difference of each tensor, by its norm."""
    assert left.keys() == right.keys()
    return {
        name: float(
            (left[name].double() - right[name].double()).norm() / right[name].double().norm().clamp(min=1e-12)
        )
        for name in left
    }


F64, F32 = Precision(CPU, torch.float64), Precision(CPU, torch.float32)
BOTH = ("paper", "official")


def check_equal(both: Case, steps: int = 20) -> None:
    """Parameters, momentum, running statistics and images after 1 and after all steps, in float64."""
    ours, textbook = both.ours(steps, F64), both.textbook(steps, F64)
    for number in (1, steps):
        apart = distance(ours[number].state, textbook[number].state)
        assert max(apart.values()) < 1e-9, (number, max(apart, key=apart.__getitem__), max(apart.values()))
        assert len(ours[number].seen) == len(textbook[number].seen)
        for left, right in zip(ours[number].seen, textbook[number].seen, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-9)


def test_every_method_has_a_textbook() -> None:
    assert (*OLD, *NEW) == tuple(sorted(methods.METHODS, key=(*OLD, *NEW).index))


@pytest.mark.parametrize("bn", ["train", "eval", "batch"])
@pytest.mark.parametrize("semantics", BOTH)
@pytest.mark.parametrize("method", OLD)
def test_the_step_is_the_textbook_s_in_float64(method: str, semantics: str, bn: str) -> None:
    check_equal(case(method, semantics, bn, 2))


@pytest.mark.parametrize("semantics", BOTH)
@pytest.mark.parametrize("method", [*NEW, *ADDED])
def test_the_step_of_newer_methods_is_the_textbook_s_in_float64(method: str, semantics: str) -> None:
    check_equal(case(method, semantics, None, None if "fgsm" in method else 2))


@pytest.mark.parametrize("semantics", BOTH)
@pytest.mark.parametrize("method", [*OLD, *NEW, *ADDED])
def test_all_of_the_attack_is_the_textbook_s_in_float64(method: str, semantics: str) -> None:
    check_equal(case(method, semantics), steps=2)


@pytest.mark.parametrize("semantics", BOTH)
def test_adaiad_s_warm_up_is_the_textbook_s_in_float64(semantics: str) -> None:
    check_equal(case("adaiad", semantics, None, 2, epoch=29))


@pytest.mark.parametrize("semantics", BOTH)
@pytest.mark.parametrize(
    ("method", "numbers", "keys"),
    [
        ("rslad", {"rslad_clean": 0.5}, {"loss": {"lam": 0.5}}),
        ("adaad", {"adaad_al": 0.6}, {"loss": {"lam": 0.4}}),
        ("adaiad", {"adaiad_tau": 2.0, "beta": 0.7}, {"loss": {"tau": 2.0, "beta": 0.7}}),
        ("adaiad", {"adaiad_al": 0.7}, {"loss": {"lam": 0.3}}),
        ("saad", {"saad_b": 0.4, "saad_al": 3.0}, {"loss": {"lam": 0.4, "igdm": 3.0}}),
        ("saad", {"saad_gamma": 2.0, "saad_lam": 0.5}, {"loss": {"entropy_order": 2.0}, "attack": {"slope": 0.5}}),
        ("mart", {"mart_beta": 2.0}, {"loss": {"trades_lambda": 2.0}}),
        ("ard+igdm", {"igdm_al": 20.0}, {"loss": {"igdm": 20.0}}),
    ],
)
def test_the_step_with_other_numbers_is_the_textbook_s_in_float64(
    method: str, numbers: dict[str, Any], keys: dict[str, Any], semantics: str
) -> None:
    check_equal(case(method, semantics, None, 2, numbers=numbers, **keys), steps=3)


@pytest.mark.parametrize("bn", ["train", "eval", "batch"])
@pytest.mark.parametrize("method", OLD)
def test_the_expert_s_step_is_the_textbook_s_in_float64(method: str, bn: str) -> None:
    both = case(method, "paper", bn, 4)
    for steps in (1, 5):
        apart = distance(both.expert(steps), both.textbook(steps, F64)[steps].state)
        assert max(apart.values()) < 1e-9, max(apart, key=apart.__getitem__)


@pytest.mark.parametrize("method", [*NEW, *ADDED])
def test_the_expert_s_step_of_newer_methods_is_the_textbook_s_in_float64(method: str) -> None:
    both = case(method, "paper")
    apart = distance(both.expert(2), both.textbook(2, F64)[2].state)
    assert max(apart.values()) < 1e-9, max(apart, key=apart.__getitem__)


def test_the_textbook_tells_methods_semantics_and_modes_apart() -> None:
    """A fault that the equality above would miss, if both sides ignored these."""
    settings = [
        ("iad1", "paper", "train"),
        ("iad1", "official", "train"),
        ("iad1", "paper", "eval"),
        ("iad1", "paper", "batch"),
        ("ard", "paper", "train"),
        ("iad1-down", "paper", "train"),
        *(
            (method, semantics, None)
            for method in ("rslad", "adaad", "adaiad", "mtard", "mart")
            for semantics in BOTH
        ),
        *((method, semantics, None) for method in ADDED for semantics in BOTH),
        ("saad", "paper", None),
        ("fgsm-rs", "paper", None),
        ("n-fgsm", "paper", None),
    ]
    states = [case(*setting, 1 if "fgsm" in setting[0] else 4).textbook(1, F64)[1].state for setting in settings]
    for index, left in enumerate(states):
        for number, right in enumerate(states[:index]):
            assert max(distance(left, right).values()) > 1e-6, (settings[index], settings[number])


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
@pytest.mark.parametrize("method", [*OLD, *NEW, *ADDED])
def test_a_step_with_given_images_is_as_exact_as_the_textbook_s(method: str, amp: bool, bf16: None) -> None:
    """Error at most twice that of plain torch in that precision; x~ is where the attack would have begun."""
    both = replace(case(method, "paper", "eval", 0), widths=(16, 32, 64))
    precision = Precision(CPU, torch.float32, torch.bfloat16 if amp else None)
    # In our layout: torch's sums of a channel are less exact there.
    plain = both.textbook(1, precision, torch.channels_last)
    steps = (both.textbook(1, F64), both.ours(1, precision), plain)
    exact, ours, textbook = (together(reached[1].state) for reached in steps)
    for kind, value in exact.items():
        assert (ours[kind] - value).norm() <= 2 * (textbook[kind] - value).norm(), kind
        assert (textbook[kind] - value).norm() > 0


def test_the_adversary_s_images_are_the_textbook_s() -> None:
    both = case("trades", "paper", "eval", 10)
    student, _, _ = both.networks(torch.float64)
    batch = both.batch(0, torch.float64)
    method = methods.get("trades")
    built = step_networks.build(student, {}, method, both.run, F64)
    assert built.adversary is not None
    start = started(batch.x_nat, both.run.attack, seed=5, counter=3, sample=batch.sample)
    sgd = torch.optim.SGD(student.parameters())
    step = textbook.TextbookStep(textbook.StepSetting("trades", bn="eval"), student, student, student, sgd)
    expected = step.attack(batch.x_nat, batch.labels, start)
    torch.testing.assert_close(built.adversary(batch, 3), expected, rtol=0, atol=1e-15)
    assert (expected - batch.x_nat).abs().max() > 7 / 255
