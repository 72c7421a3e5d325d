"""The textbook's training steps as most scripts write them: the attack calls `backward`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bench.lib.steps import textbook
from bench.lib.steps.textbook.attacks import Objective


@dataclass(frozen=True)
class PlainStep(textbook.TextbookStep):
    """A step whose attack has the gradients of the weights computed too, and throws them away."""

    def gradient(self, a: Tensor, objective: Objective) -> Tensor:
        """The objective's gradient by the images."""
        self.optimizer.zero_grad()
        objective(a).backward()
        assert a.grad is not None
        return a.grad
