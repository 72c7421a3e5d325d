"""The inner maximisation of each method (Eq. 2): its numbers, and the function of images that it ascends.

STD of the newer methods: from x + 0.001 N(0, 1), student in evaluation mode, 10 steps of 2/255, epsilon 8/255.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.lib.steps.textbook.parts import StepParts, StepSetting
from engine.common.lookup import look_up

Objective = Callable[[Tensor], Tensor]
MakeObjective = Callable[[StepParts, Tensor, Tensor], Objective]


def cross_entropy(step: StepParts, x: Tensor, labels: Tensor) -> Objective:
    """The cross-entropy CE(S(a), y)."""
    return lambda a: F.cross_entropy(step.student(a), labels, reduction="sum")


def from_student(step: StepParts, x: Tensor, labels: Tensor) -> Objective:
    """TRADES: KL(S(x) || S(a))."""
    with torch.no_grad():
        target = F.softmax(step.student(x), dim=1)
    return lambda a: F.kl_div(F.log_softmax(step.student(a), dim=1), target, reduction="sum")


def from_teacher(step: StepParts, x: Tensor, labels: Tensor) -> Objective:
    """RSLAD: KL(T(x) || S(a)), T(x) fixed."""
    with torch.no_grad():
        target = F.softmax(step.teacher(x), dim=1)
    return lambda a: F.kl_div(F.log_softmax(step.student(a), dim=1), target, reduction="sum")


def from_moving_teacher(step: StepParts, x: Tensor, labels: Tensor) -> Objective:
    """AdaAD: KL(T(a) || S(a)), with the gradient through both networks."""
    return lambda a: F.kl_div(
        F.log_softmax(step.student(a), dim=1), F.softmax(step.teacher(a), dim=1), reduction="sum"
    )


def from_linear_teacher(step: StepParts, x: Tensor, labels: Tensor) -> Objective:
    """SAAD: KL(T' || S(a)), T' = T(x) but T'_y = T_y(x) + lam <grad_x T_y(x), a - x>, itself with a gradient."""
    images = x.detach().requires_grad_()
    p = F.softmax(step.teacher(images), dim=1)
    is_label = F.one_hot(labels, p.shape[1])
    (slope,) = torch.autograd.grad((p * is_label).sum(), images)
    p = p.detach()

    def objective(a: Tensor) -> Tensor:
        change = step.setting.saad_lam * (slope * (a - x)).flatten(1).sum(dim=1, keepdim=True)
        return F.kl_div(F.log_softmax(step.student(a), dim=1), p + change * is_label, reduction="sum")

    return objective


@dataclass(frozen=True)
class AttackNumbers:
    """The attack of a method. projects: onto the ball of epsilon after each step."""

    objective: MakeObjective = cross_entropy
    bn: str = "eval"
    num_steps: int = 10
    step_size: float = 2 / 255
    epsilon: float = 8 / 255
    projects: bool = True


IAD = AttackNumbers(bn="train")
ONE_STEP = AttackNumbers(bn="train", num_steps=1)
ATTACK_OF: dict[str, AttackNumbers] = {
    "st": AttackNumbers(num_steps=0),
    "at": AttackNumbers(),
    "trades": AttackNumbers(from_student),
    **dict.fromkeys(("ard", "akd2", "iad1", "iad1-down", "iad2"), IAD),
    "rslad": AttackNumbers(from_teacher),
    "adaad": AttackNumbers(from_moving_teacher),
    "adaiad": AttackNumbers(from_moving_teacher),
    "mtard": AttackNumbers(),
    "saad": AttackNumbers(from_linear_teacher),
    "mart": AttackNumbers(),
    "fgsm-rs": replace(ONE_STEP, step_size=1.25 * 8 / 255),
    "n-fgsm": replace(ONE_STEP, step_size=8 / 255, projects=False),
}
MART_AS_CODED = AttackNumbers(step_size=0.007, epsilon=0.031)


def attack_of(setting: StepSetting) -> AttackNumbers:
    """The numbers of the attack; IGDM has that of the method to which it is added."""
    numbers = look_up("method", setting.method.partition("+")[0], ATTACK_OF)
    if setting.method == "mart" and setting.official:
        numbers = MART_AS_CODED
    if setting.bn is not None:
        numbers = replace(numbers, bn=setting.bn)
    return numbers if setting.num_steps is None else replace(numbers, num_steps=setting.num_steps)


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
