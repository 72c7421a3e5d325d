"""One training step: Algorithm 1 of the paper.

Shape suffixes: B batch, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.attack import pgd
from engine.config import AttackSpec, ForwardsConfig
from engine.kernels import DistillLoss, distill_loss
from engine.methods import Method
from engine.pipelines.base import Batch
from engine.precision import Precision


class Teachers(NamedTuple):
    """The frozen networks that a student learns from, None where the method has none."""

    at: nn.Module | None = None
    st: nn.Module | None = None


class StepOutput(NamedTuple):
    """The loss of a step and the logits it was made of, None where the method runs no such forward."""

    loss: DistillLoss
    s_adv: Tensor | None
    s_nat: Tensor | None
    t_at_nat: Tensor | None
    t_at_adv: Tensor | None


def training_loss(
    student: nn.Module,
    teachers: Teachers,
    batch: Batch,
    method: Method,
    attack: AttackSpec,
    forwards: ForwardsConfig,
    precision: Precision,
    *,
    seed: int,
    epoch: int,
    in_warmup: bool = False,
    attack_counts: Tensor | None = None,
) -> StepOutput:
    """Loss of one batch, ready for `backward`; the body of Algorithm 1's inner loop.

    method: the row to train with, which plans the forwards: what no term reads is not run.
    seed, epoch: of the attack's random start. in_warmup: the idle forwards wait until the warm-up is over.
    attack_counts: (2,) int64, to which the zero and the non-finite entries of the attack's gradients are added.
    """
    x_nat, labels = batch.x_nat, batch.labels
    s_adv = s_nat = t_at_nat = t_at_adv = t_st_adv = None

    if method.needs_x_adv:  # x~ = argmax of the attack's loss on the student, Eq. 2
        x_adv = pgd(
            student, x_nat, labels, attack, seed=seed, counter=epoch, sample=batch.sample,
            autocast=precision.autocast, loss_scale=precision.attack_loss_scale, counts=attack_counts,
        )  # fmt: skip
    with precision.autocast():
        with torch.no_grad():
            if method.needs_t_at_nat:
                t_at_nat = _call(teachers.at, x_nat)
            if method.needs_t_at_adv:
                t_at_adv = _call(teachers.at, x_adv)
            if method.needs_t_st_adv:
                t_st_adv = _call(teachers.st, x_adv)
        if method.needs_x_adv:
            s_adv = _call(student, x_adv)
            if forwards.idle and not in_warmup:
                with torch.no_grad():
                    student(x_adv)
                    student(x_nat)
        # The order S(x~), S(x) is the published one; BatchNorm's running statistics depend on it.
        if method.needs_s_nat or forwards.clean == "grad":
            s_nat = _call(student, x_nat)
        elif forwards.clean == "no_grad":
            with torch.no_grad():
                s_nat = _call(student, x_nat)
    loss = distill_loss(
        s_adv, labels, s_nat=s_nat, t_at_nat=t_at_nat, t_at_adv=t_at_adv, t_st_adv=t_st_adv,
        weights=method.weights, tau=method.loss.tau, tau_self=method.loss.tau_self, beta=method.loss.beta,
        detach_self=method.loss.detach_self, label_smoothing=method.loss.label_smoothing,
    )  # fmt: skip
    if s_nat is not None and s_nat.requires_grad and not method.needs_s_nat:
        loss = loss._replace(loss=loss.loss + 0 * s_nat.sum())  # forward and backward of a term of weight zero
    return StepOutput(loss, s_adv, s_nat, t_at_nat, t_at_adv)


def _call(network: nn.Module | None, images: Tensor) -> Tensor:
    assert network is not None, "the method's row needs a teacher that was not given"
    logits_BC: Tensor = network(images)
    return logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
