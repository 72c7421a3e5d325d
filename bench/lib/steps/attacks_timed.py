"""The evaluations that `bench.evaluation` times: the published package, textbook loops, and the engine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attacks.auto import standard
from engine.attacks.auto.search import Search
from engine.attacks.auto.slots import Slots
from engine.attacks.auto.standard import AutoAttack
from engine.attacks.autoattack import WHOLE
from engine.attacks.evaluated import prepared
from engine.attacks.fast import FAST as AA_FAST
from engine.attacks.parts import size_of_batch
from engine.attacks.pgd import preset
from engine.common import optional
from engine.common.lookup import look_up
from engine.config import AttackSpec
from engine.evaluation.measure import evaluate
from engine.system.precision import Precision

AA_VARIANTS = TEXTBOOK, SEEDED, EXPERT, ENGINE, FAST = (
    "published", "published, seed 1", "published, expert", "engine", "engine, aa-fast",
)  # fmt: skip
"""As its README or a script of the field calls it, all images in one batch, and with another seed; on a frozen,
folded, channels-last network, in batches of `size_of_batch`; the engine's, and AA-fast in its place.
"""
_PACKAGE_STEPS = {"apgd": "n_iter", "apgd_targeted": "n_iter", "fab": "n_iter", "square": "n_queries"}


@dataclass(frozen=True)
class Subject:
    """Network in evaluation mode, and images. shorter: AutoAttack has 1/shorter of its steps."""

    network: nn.Module
    x_nat: Tensor
    labels_N: Tensor
    epsilon: float
    shorter: int = 1


class Pass(NamedTuple):
    """A pass of the network on so many images, forward, or forward and backward."""

    images: int
    has_backward: bool


class Step(NamedTuple):
    """A step of a part of the engine's AutoAttack in so many slots."""

    part: str
    slots: int


@dataclass(frozen=True)
class TimedAttack:
    """Outcome of an evaluation. forward, backward: passes of single images that it ran.

    calls: of a loop or the package, how often it ran the network on how many images.
    """

    stood_N: Tensor
    forward: int
    backward: int
    seconds: float
    calls: Counter[Pass] = field(default_factory=Counter)


class Counted(nn.Module):
    """A network that counts its passes and their images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls: Counter[Pass] = Counter()

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        self.calls[Pass(len(images), False)] += 1
        if images.requires_grad and torch.is_grad_enabled():
            images.register_hook(self._count)
        logits: Tensor = self.network(images)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.calls -= Counter([Pass(len(gradient), False)])
        self.calls[Pass(len(gradient), True)] += 1


def timed(variant: str, attack: str, subject: Subject) -> TimedAttack:
    """Run an attack in one variant. Raises ValueError for unknown names, and without the package."""
    return look_up("variant", variant, _RUNS)(attack, subject)


def variants_of(attack: str) -> tuple[str, ...]:
    """The variants that an attack has, the published one first."""
    return AA_VARIANTS if attack == WHOLE else (TEXTBOOK, EXPERT, ENGINE)


def _textbook(attack: str, subject: Subject, seed: int = 0) -> TimedAttack:
    network = subject.network.requires_grad_(True)
    try:
        return _published(attack, subject, network, seed)
    finally:
        network.requires_grad_(False)


def _expert(attack: str, subject: Subject) -> TimedAttack:
    parameter = next(subject.network.parameters())
    network = prepared(subject.network, Precision(parameter.device, parameter.dtype))
    size = size_of_batch(None, parameter.device, *subject.x_nat.shape[2:])
    return _published(attack, subject, network, size=size)


def _published(
    attack: str, subject: Subject, network: nn.Module, seed: int = 0, size: int | None = None
) -> TimedAttack:
    """The attack, in batches of that size, or on all images at once."""
    counted = Counted(network).eval()
    x_nat, labels_N = subject.x_nat, subject.labels_N
    begin = _now(x_nat)
    if attack == WHOLE:
        x_adv = run_package(counted, subject, seed, size or len(x_nat))
    else:
        batches = zip(x_nat.split(size or len(x_nat)), labels_N.split(size or len(x_nat)), strict=True)
        spec = preset(attack, subject.epsilon)
        x_adv = torch.cat([_steps(counted, spec, x_B, labels_B) for x_B, labels_B in batches])
    seconds = _now(x_nat) - begin
    with torch.no_grad():
        stood_N = network(x_adv).argmax(dim=1) == labels_N
    calls = counted.calls.items()
    forward = sum(call.images * count for call, count in calls)
    backward = sum(call.images * count for call, count in calls if call.has_backward)
    return TimedAttack(stood_N.cpu(), forward, backward, seconds, counted.calls)


def run_package(network: nn.Module, subject: Subject, seed: int, size: int) -> Tensor:
    """AutoAttack as its README calls it, in batches of that size."""
    module: Any = optional.load("pyautoattack", missing="pyautoattack is not installed; pip install pyautoattack")
    images = subject.x_nat.contiguous()
    attack = module.AutoAttack(
        network, norm="Linf", eps=subject.epsilon, version="standard", seed=seed, device=images.device
    )
    for name, steps in _PACKAGE_STEPS.items():
        part = getattr(attack, name)
        setattr(part, steps, getattr(part, steps) // subject.shorter)
    for part in (attack.apgd, attack.apgd_targeted):  # its constructor computes when the step size is looked at
        part.n_iter_2, part.n_iter_min, part.size_decr = (
            max(int(share * part.n_iter), 1) for share in (0.22, 0.06, 0.03)
        )
    x_adv, _ = attack.run_standard_evaluation(images, subject.labels_N, batch_size=size)
    found: Tensor = x_adv
    return found


def _steps(network: nn.Module, spec: AttackSpec, x_nat: Tensor, labels_N: Tensor) -> Tensor:
    """PGD as scripts have it: x~ <- clamp(project(x~ + step sign(grad)))."""
    x_adv = (x_nat + torch.empty_like(x_nat).uniform_(-spec.epsilon, spec.epsilon)).clamp(0, 1)
    for _ in range(spec.num_steps):
        x_adv.requires_grad_()
        logits_NC = network(x_adv)
        if spec.loss == "ce":
            loss = F.cross_entropy(logits_NC, labels_N)
        else:
            true_N1 = F.one_hot(labels_N, logits_NC.shape[1])
            margin_N = (logits_NC * true_N1).sum(1) - (logits_NC - 1e4 * true_N1).amax(1)
            loss = -(margin_N + spec.kappa).clamp(min=0).mean()
        loss.backward()
        assert x_adv.grad is not None
        x_adv = x_adv.detach() + spec.step_size * x_adv.grad.sign()
        x_adv = x_adv.clamp(min=x_nat - spec.epsilon, max=x_nat + spec.epsilon).clamp(0, 1)
    return x_adv


def _engine(attack: str, subject: Subject) -> TimedAttack:
    x_nat = subject.x_nat
    begin = _now(x_nat)
    with _shortened(subject.shorter):
        result = evaluate(subject.network, (x_nat, subject.labels_N), [attack], epsilon=subject.epsilon)[attack]
    seconds = _now(x_nat) - begin
    forward = sum(part.forward for part in result.details.values())
    backward = sum(part.backward for part in result.details.values())
    if not result.details:
        steps = preset(attack, subject.epsilon).num_steps
        forward, backward = len(x_nat) * (steps + 1), len(x_nat) * steps
    return TimedAttack(result.verdicts, forward, backward, seconds)


def calls_on_gpu(subject: Subject) -> Counter[Step]:
    """Steps of `aa` in batches as large as on a GPU."""
    _, _, height, width = subject.x_nat.shape
    size = size_of_batch(None, torch.device("cuda"), height, width)
    calls: Counter[Step] = Counter()
    with _shortened(subject.shorter), _counting(calls):
        evaluate(
            subject.network, (subject.x_nat, subject.labels_N), [WHOLE], epsilon=subject.epsilon, batch_size=size
        )
    return calls


@contextmanager
def _shortened(shorter: int) -> Iterator[None]:
    """The engine's AutoAttack with 1/shorter of its steps."""
    steps = standard.Steps(*(each // shorter for each in standard.STANDARD))
    with mock.patch.object(standard, "STANDARD", steps):
        yield


@contextmanager
def _counting(calls: Counter[Step]) -> Iterator[None]:
    """Steps of AutoAttack inside are counted."""
    parts: dict[int, str] = {}
    search, advance = AutoAttack.search, Slots.advance

    def noted(auto: AutoAttack, part: str) -> Search[Any]:
        found = search(auto, part)
        parts[id(found)] = part
        return found

    def counted(slots: Slots[Any], attack: Search[Any], *, last: bool) -> None:
        calls[Step(parts[id(attack)], len(slots.items))] += 1
        advance(slots, attack, last=last)

    with mock.patch.object(AutoAttack, "search", noted), mock.patch.object(Slots, "advance", counted):
        yield


def _now(images: Tensor) -> float:
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter()


_RUNS: Mapping[str, Callable[[str, Subject], TimedAttack]] = {
    TEXTBOOK: _textbook,
    SEEDED: lambda attack, subject: _textbook(attack, subject, seed=1),
    EXPERT: _expert,
    ENGINE: _engine,
    FAST: lambda attack, subject: _engine(AA_FAST, subject),
}
