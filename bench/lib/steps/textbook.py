"""Training step of each method as a textbook writes it: plain eager torch, and no op of this project.

The oracle that the engine's step is tested against, and a baseline that it is timed against. Networks, images
and labels are given; a step changes the student's parameters, its running statistics and the optimizer's momentum.

Names: x natural, a adversarial images (x~); s student, t robust, n standard teacher; logits of shape (B, C).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.common.lookup import look_up
from engine.models import layers

Objective = Callable[[Tensor], Tensor]
EPSILON, STEP_SIZE, NUM_STEPS = 8 / 255, 2 / 255, 10
BETA, LAM1, LAM2, LAM3 = 0.1, 0.25, 0.5, 0.25
PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    layers.ImageConv2d: nn.Conv2d,
    layers.Classifier: nn.Linear,
    layers.BatchNorm2d: nn.BatchNorm2d,
}


@dataclass(frozen=True)
class StepSetting:
    """Choice of a step. semantics: "paper" or "official". bn: of the attack, "train", "eval" or "batch"."""

    method: str
    semantics: str = "paper"
    bn: str = "train"
    num_steps: int = NUM_STEPS


@dataclass(frozen=True)
class TextbookStep:
    """The student, what it learns from, and how it is updated."""

    setting: StepSetting
    student: nn.Module
    teacher: nn.Module
    standard_teacher: nn.Module
    optimizer: torch.optim.Optimizer

    def __call__(self, x: Tensor, labels: Tensor, start: Tensor) -> float | Tensor:
        """One step on a batch; start: where the attack begins, x and its random perturbation. The loss."""
        a = self.attack(x, labels, start) if self.setting.method != "st" else x
        loss = self.loss(x, a, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def attack(self, x: Tensor, labels: Tensor, start: Tensor) -> Tensor:
        """PGD on the student (Eq. 2), on the cross-entropy; of TRADES on the divergence from S(x)."""
        with attack_mode(self.student, self.setting.bn):
            objective = look_up("method", self.setting.method, OBJECTIVES)(self.student, x, labels)
            a = start.detach()
            for _ in range(self.setting.num_steps):
                a = self.ascend(a, x, objective)
        return a

    def ascend(self, a: Tensor, x: Tensor, objective: Objective) -> Tensor:
        """One step of PGD along the sign of a gradient (Eq. 2). objective: a function of the student's logits."""
        a.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(self.student(a)), [a])
        a = a.detach() + STEP_SIZE * gradient.sign()
        return torch.min(torch.max(a, x - EPSILON), x + EPSILON).clamp(0, 1)

    def loss(self, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
        """The method's loss on natural and adversarial images, with the forwards that the semantics runs."""
        return look_up("method", self.setting.method, METHOD_LOSSES)(self, x, a, labels)

    @property
    def official(self) -> bool:
        """True for the forwards of the published code."""
        return look_up("semantics", self.setting.semantics, {"paper": False, "official": True})


@contextmanager
def attack_mode(student: nn.Module, bn: str) -> Iterator[None]:
    """Mode of the student while it is attacked."""
    trains, moves = look_up("bn", bn, {"train": (True, True), "eval": (False, True), "batch": (True, False)})
    before = {} if moves else {name: value.clone() for name, value in student.named_buffers()}
    student.train(trains)
    yield
    student.train()
    for name, value in student.named_buffers() if before else ():  # as if no forward had moved them
        value.copy_(before[name])


def cross_entropy(student: nn.Module, x: Tensor, labels: Tensor) -> Objective:
    """Objective of PGD: the cross-entropy."""
    return lambda logits: F.cross_entropy(logits, labels, reduction="sum")


def divergence(student: nn.Module, x: Tensor, labels: Tensor) -> Objective:
    """Objective of TRADES' attack: the divergence from S(x)."""
    with torch.no_grad():
        target = F.softmax(student(x), dim=1)
    return lambda logits: F.kl_div(F.log_softmax(logits, dim=1), target, reduction="sum")


OBJECTIVES = dict.fromkeys(("at", "ard", "akd2", "iad1", "iad1-down", "iad2"), cross_entropy)
OBJECTIVES["trades"] = divergence


def plain(network: nn.Module) -> nn.Module:
    """The network with torch's own layers in the place of the engine's, which differ from them under autocast."""
    for module in network.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return network


def kl(target: Tensor, logits: Tensor) -> Tensor:
    """KL(target || logits) of each sample, as the published code computes what the paper writes KL(S || T)."""
    return F.kl_div(F.log_softmax(logits, dim=1), F.softmax(target, dim=1), reduction="none").sum(dim=1)


def alpha(t_a: Tensor, labels: Tensor) -> Tensor:
    """Trust in the teacher: P_T(x~ | y) ** beta (Eq. 4)."""
    return F.softmax(t_a, dim=1).gather(1, labels[:, None]).squeeze(1) ** BETA


def standard(step: TextbookStep, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy on natural images."""
    return F.cross_entropy(step.student(x), labels)


def at(step: TextbookStep, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """Madry et al.: cross-entropy on adversarial images."""
    return F.cross_entropy(step.student(a), labels)


def trades(step: TextbookStep, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """Zhang et al.: natural cross-entropy and six times the divergence between the two predictions, S(x) anew."""
    natural = F.cross_entropy(step.student(x), labels)
    s_a = step.student(a)
    return natural + 6 * kl(step.student(x), s_a).mean()


def clean_forward(step: TextbookStep, x: Tensor, labels: Tensor) -> Tensor | float:
    """S(x) for the running statistics; in the published code for a cross-entropy of weight 0, backward and all."""
    if step.official:
        return 0 * F.cross_entropy(step.student(x), labels)
    with torch.no_grad():
        step.student(x)
    return 0.0


def ard(step: TextbookStep, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """Goldblum et al., lambda = 0 and temperature 1."""
    s_a = step.student(a)
    clean = clean_forward(step, x, labels)
    with torch.no_grad():
        t_x = step.teacher(x)
    return kl(t_x, s_a).mean() + clean


def introspection(
    step: TextbookStep, x: Tensor, a: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S(x~), S(x), T(x), alpha: all that IAD-I reads, in the order of the published forwards."""
    s_a = step.student(a)
    if step.official:
        step.student(a)
        step.student(x)
    s_x = step.student(x)
    with torch.no_grad():
        t_x, t_a = step.teacher(x), step.teacher(a)
    return s_a, s_x, t_x, alpha(t_a, labels)


def iad1(step: TextbookStep, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """IAD-I after its warm-up, lambda = 0 and temperature 1 (Algorithm 1)."""
    s_a, s_x, t_x, trust = introspection(step, x, a, labels)
    return (kl(t_x, s_a) + (1 - trust) * kl(s_x, s_a)).mean()


def iad1_down(step: TextbookStep, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """IAD-I whose teacher term is weighted too (Table 8)."""
    s_a, s_x, t_x, trust = introspection(step, x, a, labels)
    return (trust * kl(t_x, s_a) + (1 - trust) * kl(s_x, s_a)).mean()


def akd2(step: TextbookStep, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """Chen et al. with the weights of the published code, temperature 1."""
    s_a = step.student(a)
    with torch.no_grad():
        t_a, n_a = step.teacher(a), step.standard_teacher(a)
    return LAM1 * F.cross_entropy(s_a, labels) + LAM2 * kl(t_a, s_a).mean() + LAM3 * kl(n_a, s_a).mean()


def iad2(step: TextbookStep, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """IAD-II after its warm-up; the self term has the weight lambda_2 too in the published code."""
    s_a, s_x = step.student(a), step.student(x)
    with torch.no_grad():
        t_a, n_a = step.teacher(a), step.standard_teacher(a)
        if step.official:
            t_a = step.teacher(a)  # a second time, for alpha
    trust = alpha(t_a, labels)
    gamma = (LAM2 if step.official else 1.0) * (1 - trust)
    per_sample = LAM2 * trust * kl(t_a, s_a) + gamma * kl(s_x, s_a)
    return LAM1 * F.cross_entropy(s_a, labels) + LAM3 * kl(n_a, s_a).mean() + per_sample.mean()


METHOD_LOSSES: dict[str, Callable[[TextbookStep, Tensor, Tensor, Tensor], Tensor]] = {
    "st": standard,
    "at": at,
    "trades": trades,
    "ard": ard,
    "akd2": akd2,
    "iad1": iad1,
    "iad1-down": iad1_down,
    "iad2": iad2,
}
