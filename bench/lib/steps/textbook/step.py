"""One update of the student, put together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.lib.steps.textbook.attacks import AttackNumbers, Objective, attack_mode, attack_of
from bench.lib.steps.textbook.losses import METHOD_LOSSES
from bench.lib.steps.textbook.parts import StepParts
from engine.common.lookup import look_up


@dataclass(frozen=True)
class TextbookStep(StepParts):
    """A training step: the attack, the loss with its forwards, the update."""

    def __call__(self, x: Tensor, labels: Tensor, start: Tensor) -> float | Tensor:
        """One step on a batch; start: where the attack begins, x and its random perturbation. The loss."""
        a = self.attack(x, labels, start) if self.setting.method != "st" else x
        return self.learn(x, a, labels)

    def learn(self, x: Tensor, a: Tensor, labels: Tensor) -> float | Tensor:
        """The update on natural and adversarial images. The loss."""
        loss = self.loss(x, a, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def attack(self, x: Tensor, labels: Tensor, start: Tensor) -> Tensor:
        """PGD on the student (Eq. 2)."""
        numbers = attack_of(self.setting)
        with attack_mode(self.student, numbers.bn):
            objective = numbers.objective(self, x, labels)
            a = start.detach()
            for _ in range(numbers.num_steps):
                a = self.ascend(a, x, objective, numbers)
        return a

    def ascend(self, a: Tensor, x: Tensor, objective: Objective, numbers: AttackNumbers) -> Tensor:
        """One step along the sign of a gradient. objective: a function of images."""
        a.requires_grad_()
        gradient = self.gradient(a, objective)
        a = a.detach() + numbers.step_size * gradient.sign()
        if numbers.projects:
            a = torch.min(torch.max(a, x - numbers.epsilon), x + numbers.epsilon)
        return a.clamp(0, 1)

    def gradient(self, a: Tensor, objective: Objective) -> Tensor:
        """The objective's gradient by the images alone."""
        (gradient,) = torch.autograd.grad(objective(a), [a])
        return gradient

    def loss(self, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
        """The method's loss on natural and adversarial images, with the forwards that the semantics runs."""
        return look_up("method", self.setting.method, METHOD_LOSSES)(self, x, a, labels)
