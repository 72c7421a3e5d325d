"""One training step: Algorithm 1 of the paper.

Shape suffixes: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from engine.attacks.twin import Forward
from engine.config import ForwardsConfig
from engine.kernels import DistillLoss, distill_loss
from engine.methods import Method, Weight
from engine.pipelines.base import Batch
from engine.system.precision import Precision
from engine.system.streams import Lanes
from engine.training import plan
from engine.training.networks import Networks

Network = TypeVar("Network")


class StepOutput(NamedTuple):
    """The loss of a step and the logits it was made of, None where the method runs no such forward."""

    loss: DistillLoss
    s_adv: Tensor | None
    s_nat: Tensor | None
    t_at_nat: Tensor | None
    t_at_adv: Tensor | None


class TeacherOutputs(NamedTuple):
    """What the student's passes are given: x~, and the teachers' logits that they are compared with."""

    x_adv: Tensor | None
    t_at_nat: Tensor | None
    t_at_adv: Tensor | None
    t_st_adv: Tensor | None


def training_loss(
    networks: Networks,
    batch: Batch,
    method: Method,
    forwards: ForwardsConfig,
    precision: Precision,
    lanes: Lanes,
    *,
    epoch: int,
    in_warmup: bool = False,
) -> StepOutput:
    """Loss of one batch, ready for `backward`; the body of Algorithm 1's inner loop.

    method: the row to train with, which plans the forwards: what no term reads is not run.
    epoch: counts the random starts. in_warmup: see `plan.IDLE`.
    """
    given = attack_and_teach(networks, batch, method, lanes, epoch=epoch)
    return student_loss(networks, batch, given, method, forwards, precision, lanes, in_warmup=in_warmup)


def attack_and_teach(
    networks: Networks, batch: Batch, method: Method, lanes: Lanes, *, epoch: int
) -> TeacherOutputs:
    """The first half of a step: x~, and the teachers' passes, of which some may still run on their lane."""
    x_nat = batch.x_nat
    x_adv = t_at_nat = t_at_adv = t_st_adv = None
    with lanes.beside():  # the attack
        if method.needs_t_at_nat:
            t_at_nat = _given(networks.teacher_at)(x_nat)
    if method.needs_x_adv:  # x~ = argmax of the attack's loss on the student, Eq. 2
        x_adv = _given(networks.adversary)(batch, epoch)
        with lanes.beside():  # the student's passes
            if method.needs_t_at_adv:
                t_at_adv = _given(networks.teacher_at)(x_adv)
            if method.needs_t_st_adv:
                t_st_adv = _given(networks.teacher_st)(x_adv)
    return TeacherOutputs(x_adv, t_at_nat, t_at_adv, t_st_adv)


def student_loss(
    networks: Networks,
    batch: Batch,
    given: TeacherOutputs,
    method: Method,
    forwards: ForwardsConfig,
    precision: Precision,
    lanes: Lanes,
    *,
    in_warmup: bool = False,
) -> StepOutput:
    """The second half: the student's passes, and the weighted sum of the terms."""
    student, x_nat = networks.student, batch.x_nat
    x_adv, t_at_nat, t_at_adv, t_st_adv = given
    s_adv = s_nat = None
    with record_function("student"), precision.autocast():
        if x_adv is not None:
            # The order of the published code: BatchNorm's running statistics depend on it.
            idle = plan.idle(forwards, in_warmup=in_warmup)
            images = {"nat": x_nat, "adv": x_adv}
            _run_idly(student, [images[name] for name in idle.before])
            s_adv = student(x_adv)
            _run_idly(student, [images[name] for name in idle.between])
        learns = plan.s_nat_learns(method, forwards)
        if learns is not None:
            with torch.set_grad_enabled(learns):
                s_nat = student(x_nat)
    lanes.join()
    with record_function("loss"):
        loss = distill_loss(
            s_adv, batch.labels, s_nat=s_nat, t_at_nat=t_at_nat, t_at_adv=t_at_adv, t_st_adv=t_st_adv,
            weights=_weights(method, s_adv, s_nat), tau=method.loss.tau, tau_self=method.loss.tau_self,
            beta=method.loss.beta, detach_self=method.loss.detach_self,
            label_smoothing=method.loss.label_smoothing,
        )  # fmt: skip
    if s_nat is not None and s_nat.requires_grad and not method.needs_s_nat:
        loss = loss._replace(loss=loss.loss + 0 * s_nat.sum())  # forward and backward of a term of weight zero
    return StepOutput(loss, s_adv, s_nat, t_at_nat, t_at_adv)


def _weights(method: Method, *logits: Tensor | None) -> tuple[Weight, ...]:
    return method.weights_of(next(given.shape[1] for given in logits if given is not None))


@torch.no_grad()
def _run_idly(student: Forward, batches: Sequence[Tensor]) -> None:
    """Forwards that move BatchNorm's running statistics, and nothing else."""
    for images in batches:
        student(images)


def _given(network: Network | None) -> Network:
    assert network is not None, "the method's row needs a network that was not given"
    return network


def update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_norm: float | None = None) -> None:
    """One step of the optimizer, along gradients whose common norm is clipped where that is wanted."""
    with record_function("optimizer"):
        if clip_norm is not None:
            scaler.unscale_(optimizer)
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            torch.nn.utils.clip_grad_norm_(weights, clip_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()  # now, so that no gradient is kept through the next attack
