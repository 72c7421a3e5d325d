"""Auto-PGD (Croce and Hein, 2020): projected gradient steps with momentum, whose length halves where they fail.

Shape suffix: B images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.attacks.auto.losses import LOSSES
from engine.attacks.auto.search import (
    AttackState,
    Ball,
    Logits,
    PassCount,
    Search,
    Start,
    StepResult,
    norms,
    per_image,
)
from engine.common.lookup import look_up
from engine.kernels.philox import Stream, normal, uniform

_INCREASES = 0.75  # rho: share of the steps between two checks that must raise the loss
_MOMENTUM = 0.75
_TINY = 1e-12


@dataclass
class ApgdState(AttackState):
    """best: where the loss was largest. last: before the latest step. increases: of the loss since the last check.

    halved: at the last check. best_at_check: the largest loss then.
    """

    target_B: Tensor
    x_adv: Tensor
    x_last: Tensor
    x_best: Tensor
    grad_best: Tensor
    loss_best_B: Tensor
    loss_last_B: Tensor
    best_at_check_B: Tensor
    increases_B: Tensor
    halved_B: Tensor
    step_size_B: Tensor


class StepCheck(NamedTuple):
    """After which step the loss is looked at, and how many steps after the check before."""

    step: int
    gap: int


def checks(num_steps: int) -> list[StepCheck]:
    """After 22 % of the steps, then after gaps that are 3 % shorter each time and at least 6 %."""
    gap, shorter, least = (max(int(part * num_steps), 1) for part in (0.22, 0.03, 0.06))
    found, step = [], gap
    while step <= num_steps:
        found.append(StepCheck(step, gap))
        gap = max(gap - shorter, least)
        step += gap
    return found


class Apgd(Search[ApgdState]):
    """APGD on a loss of `LOSSES`, from a random start.

    network: images to logits, differentiable. stream, seed: of the random starts, one for each sample and rank.
    num_steps: after the start, the first of 2 epsilon.
    zero_gradients: starts whose gradient is zero in every pixel.
    """

    def __init__(
        self, network: Logits, loss: str, ball: Ball, *, seed: int, stream: Stream, num_steps: int = 100
    ) -> None:
        self.steps = num_steps + 1
        self._network, self._loss = network, look_up("loss", loss, LOSSES)
        self._ball, self._seed, self._stream = ball, seed, stream
        self._start = look_up("threat_model", ball.threat_model, START_NOISE)
        self._step = look_up("threat_model", ball.threat_model, ASCENT_STEPS)
        self._project = look_up("threat_model", ball.threat_model, _PROJECTIONS)
        self._checks = checks(num_steps)
        self.zero_gradients = torch.zeros((), dtype=torch.int64)

    def begin(self, start: Start) -> ApgdState:
        x_nat = start.x_nat
        self.zero_gradients = self.zero_gradients.to(x_nat.device)
        noise = self._start(self._seed, self._stream, start.rank_B[:, None], start.sample_B, x_nat[0].numel())
        perturbation = self._ball.epsilon * noise.view(x_nat.shape).to(x_nat.dtype)
        x_adv = (x_nat + perturbation).clamp_(0, 1).contiguous(memory_format=torch.channels_last)
        zeros_B = x_nat.new_zeros(len(x_nat))
        return ApgdState(
            x_nat,
            start.labels_B,
            torch.zeros_like(start.labels_B),
            start.target_B,
            x_adv,
            x_last=x_adv.clone(),
            x_best=x_adv.clone(),
            grad_best=torch.zeros_like(x_adv),
            loss_best_B=zeros_B - torch.inf,
            loss_last_B=zeros_B.clone(),
            best_at_check_B=zeros_B.clone(),
            increases_B=zeros_B.clone(),
            halved_B=torch.ones_like(start.labels_B, dtype=torch.bool),
            step_size_B=zeros_B + 2 * self._ball.epsilon,
        )

    def advance(self, state: ApgdState, *, last: bool) -> StepResult:
        x_adv = state.x_adv.detach().clone().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            logits_BC = self._network(x_adv)
            loss_B = self._loss(logits_BC, state.labels_B, state.target_B)
        seen, logits_BC = x_adv.detach(), logits_BC.detach()
        found = StepResult(logits_BC.argmax(dim=1) != state.labels_B, seen, logits_BC.isfinite().all(dim=1))
        if not last:
            (grad,) = torch.autograd.grad(loss_B, x_adv, torch.ones_like(loss_B))
            grad = grad.nan_to_num(nan=0.0)  # in memory of its own: autograd may have expanded it
            zero_B = (grad == 0).flatten(1).all(dim=1) & (state.step_B == 0)
            self.zero_gradients += zero_B.sum()
            self._learn(state, loss_B.detach(), grad)
            self._move(state, grad)
        state.step_B += 1
        return found

    def passes(self, steps: int) -> PassCount:
        return PassCount(steps, steps - 1)

    def _learn(self, state: ApgdState, loss_B: Tensor, grad: Tensor) -> None:
        """Note the loss and where it is largest; at a check halve the steps that fail and go back to there."""
        begun_B = state.step_B > 0
        better_B = loss_B > state.loss_best_B
        state.loss_best_B.copy_(loss_B.where(better_B, state.loss_best_B))
        better = per_image(better_B)
        torch.where(better, state.x_adv, state.x_best, out=state.x_best)
        torch.where(better, grad, state.grad_best, out=state.grad_best)
        # The loss of the start is in no comparison: as published, the first one is with zero.
        state.increases_B += (loss_B > state.loss_last_B) & begun_B
        state.loss_last_B.copy_(loss_B.where(begun_B, state.loss_last_B))
        state.best_at_check_B.copy_(state.best_at_check_B.where(begun_B, loss_B))

        gap_B = torch.zeros_like(loss_B)
        for check in self._checks:
            gap_B.masked_fill_(state.step_B == check.step, check.gap)
        at_check_B = gap_B > 0
        stuck_B = ~state.halved_B & (state.best_at_check_B >= state.loss_best_B)
        halve_B = at_check_B & ((state.increases_B <= _INCREASES * gap_B) | stuck_B)
        state.halved_B.copy_(halve_B.where(at_check_B, state.halved_B))
        state.best_at_check_B.copy_(state.loss_best_B.where(at_check_B, state.best_at_check_B))
        state.increases_B.masked_fill_(at_check_B, 0)
        state.step_size_B.mul_(1 - 0.5 * halve_B.to(loss_B.dtype))
        back = per_image(halve_B)
        torch.where(back, state.x_best, state.x_adv, out=state.x_adv)
        torch.where(back, state.grad_best, grad, out=grad)

    def _move(self, state: ApgdState, grad: Tensor) -> None:
        """x_{k+1} = P(x_k + a (z - x_k) + (1 - a) (x_k - x_{k-1})), z = P(x_k + step * direction of the gradient).

        a is 1 in the first step, and 0.75 in the others.
        """
        first_B = state.step_B == 0
        weight = per_image(torch.where(first_B, 1.0, _MOMENTUM).to(grad.dtype))
        z = self._step(state.x_adv, state.x_nat, grad, state.step_size_B, self._ball.epsilon)
        inertia = (state.x_adv - state.x_last).mul_(1 - weight)
        state.x_last.copy_(state.x_adv)
        moved = z.sub_(state.x_adv).mul_(weight).add_(state.x_adv).add_(inertia)
        state.x_adv.copy_(self._project(moved, state.x_nat, self._ball.epsilon))


def _uniform(seed: int, stream: Stream, rank_B1: Tensor, sample_B: Tensor, count: int) -> Tensor:
    """Uniform in (-1, 1), the largest of each image of size 1."""
    noise_BN = 2 * uniform(seed, stream, rank_B1, sample_B, count) - 1
    return noise_BN / (noise_BN.abs().amax(dim=1, keepdim=True) + _TINY)


def _direction(seed: int, stream: Stream, rank_B1: Tensor, sample_B: Tensor, count: int) -> Tensor:
    """A uniform direction."""
    noise_BN = normal(seed, stream, rank_B1, sample_B, count)
    length_B1: Tensor = torch.linalg.vector_norm(noise_BN, dim=1, keepdim=True)
    return noise_BN / (length_B1 + _TINY)


def _into_box(images: Tensor, x_nat: Tensor, epsilon: float) -> Tensor:
    return torch.clamp(images, x_nat - epsilon, x_nat + epsilon).clamp_(0, 1)


def _into_sphere(images: Tensor, x_nat: Tensor, epsilon: float) -> Tensor:
    away = images - x_nat
    length = norms(away)
    return (x_nat + away / (length + _TINY) * length.clamp(max=epsilon)).clamp_(0, 1)


def _sign_step(x_adv: Tensor, x_nat: Tensor, grad: Tensor, step_size_B: Tensor, epsilon: float) -> Tensor:
    return _into_box(x_adv + per_image(step_size_B) * grad.sign(), x_nat, epsilon)


def _gradient_step(x_adv: Tensor, x_nat: Tensor, grad: Tensor, step_size_B: Tensor, epsilon: float) -> Tensor:
    moved = x_adv + per_image(step_size_B) * (grad / (norms(grad) + _TINY))
    return _into_sphere(moved, x_nat, epsilon)


_PROJECTIONS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"Linf": _into_box, "L2": _into_sphere}
"""By threat model: (images, x_nat, epsilon) -> the images in the ball, then in [0, 1]."""
START_NOISE: dict[str, Callable[..., Tensor]] = {"Linf": _uniform, "L2": _direction}
"""By threat model: (seed, stream, counter_B1, sample_B, count) -> noise on the sphere of radius 1, flat."""
ASCENT_STEPS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]] = {
    "Linf": _sign_step,
    "L2": _gradient_step,
}
"""By threat model: (x_adv, x_nat, grad, step_size_B, epsilon) -> a step up, into the ball, then into [0, 1]."""
