"""FAB, targeted (Croce and Hein, 2020, arXiv 1907.02044): the nearest image of another class.

Shape suffix: B images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attacks.auto.losses import targeted_margin
from engine.attacks.auto.search import AttackState, Ball, Logits, PassCount, Search, Start, StepResult, per_image
from engine.attacks.pgd import NORMS
from engine.common.lookup import look_up
from engine.kernels import fab_step

_BACK = 0.9  # beta: of the way from the image to a hit, the part that is kept


@dataclass
class FabState(AttackState):
    """x: the iterate."""

    target_B: Tensor
    x: Tensor


class FabT(Search[FabState]):
    """Steps to the boundary between the label and a target class, linearised, that stay near the image.

    It looks for the nearest image of another class, from the image itself: nothing of it is random. A hit is one
    within the ball. After it the search goes on from nearer by.
    """

    def __init__(self, network: Logits, ball: Ball, *, num_steps: int = 100) -> None:
        self.steps = num_steps
        self._network, self._ball = network, ball
        self._order = look_up("threat_model", ball.threat_model, NORMS).order

    def begin(self, start: Start) -> FabState:
        x_nat = start.x_nat.contiguous(memory_format=torch.channels_last)
        return FabState(x_nat, start.labels_B, torch.zeros_like(start.labels_B), start.target_B, x_nat.clone())

    def advance(self, state: FabState, *, last: bool) -> StepResult:
        x = state.x.detach().clone().requires_grad_()
        with torch.enable_grad():
            difference_B = targeted_margin(self._network(x), state.labels_B, state.target_B)
        (grad,) = torch.autograd.grad(difference_B, x, torch.ones_like(difference_B))
        x, difference_B = x.detach(), difference_B.detach()
        x_new = fab_step(x, state.x_nat, grad, difference_B, threat_model=self._ball.threat_model)
        logits_BC = self._network(x_new)
        other_B = logits_BC.argmax(dim=1) != state.labels_B
        away = x_new - state.x_nat
        near_B = torch.linalg.vector_norm(away.flatten(1), self._order, dim=1) <= self._ball.epsilon
        found = StepResult(other_B & near_B, x_new, logits_BC.isfinite().all(dim=1))
        state.x.copy_(torch.where(per_image(other_B), state.x_nat + _BACK * away, x_new))
        state.step_B += 1
        return found

    def passes(self, steps: int) -> PassCount:
        return PassCount(2 * steps, steps)
