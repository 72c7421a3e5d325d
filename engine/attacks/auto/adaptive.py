"""Restarts of A3 (Liu et al., CVPR 2022): a start that goes into a direction of the logits, then margin steps.

Of A3 its start and its schedule of steps. What A3 learns from other images, directions and which images are the
nearest to the boundary, is left out: each image goes the way it would go alone.

Shape suffixes: B images, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attacks.auto.apgd import ASCENT_STEPS, START_NOISE
from engine.attacks.auto.losses import margin
from engine.attacks.auto.search import AttackState, Ball, Logits, PassCount, Search, Start, StepResult
from engine.common.lookup import look_up
from engine.kernels.philox import Stream, uniform

WEIGHT = 0.8
"""Of the target's logit in the start's direction, and minus that of the label's."""
_SMALLEST = 0.001  # the last step, in parts of the first
_NOISE, _DIRECTION = 256, 512  # counters: no rank of a target class is as large


@dataclass
class AdaptiveState(AttackState):
    """direction: of the logits, into which the start goes."""

    direction_BC: Tensor
    x_adv: Tensor


class Adaptive(Search[AdaptiveState]):
    """Steps that raise <w, z>, then steps that raise max_{c != y} z_c - z_y; one restart for each rank.

    w is uniform in (-1, 1), but `WEIGHT` at the target and -`WEIGHT` at the label. Steps of the start are of
    epsilon; those after it fall by a cosine from epsilon to a thousandth.

    network: images to logits, differentiable. seed: of noise and direction, of each sample and rank.
    """

    def __init__(
        self,
        network: Logits,
        ball: Ball,
        num_classes: int,
        *,
        seed: int,
        start_steps: int,
        margin_steps: int,
    ) -> None:
        self.steps = start_steps + margin_steps + 1
        self._network, self._ball, self._num_classes, self._seed = network, ball, num_classes, seed
        self._start_steps, self._margin_steps = start_steps, margin_steps
        self._noise = look_up("threat_model", ball.threat_model, START_NOISE)
        self._step = look_up("threat_model", ball.threat_model, ASCENT_STEPS)

    def begin(self, start: Start) -> AdaptiveState:
        x_nat, rank_B1 = start.x_nat, start.rank_B[:, None]
        noise = self._noise(self._seed, Stream.FAST, _NOISE + rank_B1, start.sample_B, x_nat[0].numel())
        x_adv = x_nat + self._ball.epsilon * noise.view(x_nat.shape).to(x_nat.dtype)
        drawn_BC = uniform(self._seed, Stream.FAST, _DIRECTION + rank_B1, start.sample_B, self._num_classes)
        direction_BC = (2 * drawn_BC - 1).to(x_nat.dtype)
        direction_BC.scatter_(1, start.target_B[:, None], WEIGHT).scatter_(1, start.labels_B[:, None], -WEIGHT)
        return AdaptiveState(
            x_nat,
            start.labels_B,
            torch.zeros_like(start.labels_B),
            direction_BC,
            x_adv.clamp_(0, 1).contiguous(memory_format=torch.channels_last),
        )

    def advance(self, state: AdaptiveState, *, last: bool) -> StepResult:
        x_adv = state.x_adv.detach().clone().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            logits_BC = self._network(x_adv)
            along_B = (state.direction_BC * logits_BC).sum(dim=1)
            loss_B = torch.where(state.step_B < self._start_steps, along_B, -margin(logits_BC, state.labels_B))
        seen, logits_BC = x_adv.detach(), logits_BC.detach()
        if not last:
            (grad,) = torch.autograd.grad(loss_B, x_adv, torch.ones_like(loss_B))
            grad.nan_to_num_(nan=0.0)
            sizes_B = self._step_sizes(state.step_B).to(grad.dtype)
            state.x_adv.copy_(self._step(seen, state.x_nat, grad, sizes_B, self._ball.epsilon))
        state.step_B += 1
        return StepResult(logits_BC.argmax(dim=1) != state.labels_B, seen, logits_BC.isfinite().all(dim=1))

    def passes(self, steps: int) -> PassCount:
        return PassCount(steps, steps - 1)

    def _step_sizes(self, step_B: Tensor) -> Tensor:
        """Epsilon in the start, then epsilon (s + (1 - s) (1 + cos(pi k / K)) / 2) in step k of K."""
        done_B = (step_B - self._start_steps).clamp(min=0) / self._margin_steps
        falling_B = 0.5 * (1 + torch.cos(math.pi * done_B))
        return self._ball.epsilon * (_SMALLEST + (1 - _SMALLEST) * falling_B)
