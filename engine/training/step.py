"""One training step: Algorithm 1 of the paper.

    for each mini-batch {(x, y)}:
        x~    <- PGD on S from x                                                      (Eq. 2)
        alpha <- P_Tat(x~ | y)^beta                                                   (Eq. 4)
        loss  <- IAD-I:   lambda CE(S(x), y)
                          + (1 - lambda) tau^2 (KL(S(x~|tau) || Tat(x|tau)) + gamma KL(S(x~|tau) || S(x|tau)))
              or IAD-II:  lambda_1 CE(S(x~), y)
                          + lambda_2 tau^2 alpha KL(S(x~|tau) || Tat(x~|tau))
                          + lambda_3 tau^2 KL(S(x~|tau) || Tst(x~|tau)) + gamma KL(S(x~|tau) || S(x|tau))
        theta <- theta - eta gradient of the loss

`TrainingStep.__call__` is the body of this loop: `attack_and_teach`, `loss`, `backward`, `update`. The loss is a
row of `engine.methods`, as IAD-I and IAD-II are; what no term of it reads is not run. Beyond Algorithm 1, a batch
may come in parts, the weights may be attacked too (`awp`), gradients are averaged over processes and may be
clipped.

Shape suffixes: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from engine.config import ForwardsConfig, RunConfig
from engine.kernels import DistillLoss, distill_loss
from engine.methods import Method
from engine.pipelines.base import Batch
from engine.system.data_parallel import RunningStatistics, no_sync
from engine.system.distributed import World
from engine.system.precision import Precision
from engine.system.streams import Lanes
from engine.training import awp, plan
from engine.training.step_networks import Networks

Network = TypeVar("Network")


class StepOutput(NamedTuple):
    """The loss of a step and the logits it was made of, None where the method runs no such forward."""

    loss: DistillLoss
    s_adv: Tensor | None
    s_nat: Tensor | None
    t_at_nat: Tensor | None
    t_at_adv: Tensor | None


OnOutput = Callable[[StepOutput, Tensor], None]
"""Called with the output of each part of a batch, and its labels."""


class TeacherOutputs(NamedTuple):
    """x~ and the teachers' logits, against which the student's are compared."""

    x_adv: Tensor | None
    t_at_nat: Tensor | None
    t_at_adv: Tensor | None
    t_st_adv: Tensor | None


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """A step of a run: the networks, and what turns their gradients into new weights.

    method: the row of the run, after its warm-up. replica: the student whose backward averages gradients over all
    processes, see `data_parallel.replicate`. statistics: keeps running statistics the same on all of them.
    """

    networks: Networks
    student: nn.Module
    replica: nn.Module
    statistics: RunningStatistics
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    method: Method
    config: RunConfig
    precision: Precision
    lanes: Lanes
    world: World

    def __call__(
        self, parts: Sequence[Batch], method: Method, *, epoch: int, global_batch_size: int, on_output: OnOutput
    ) -> None:
        """Update the weights: theta <- theta - eta * gradient of the loss of a batch.

        parts: this process's images of the batch, of `global_batch_size` in all; as many parts on every process.
        method: the row to train with now. epoch: counts the random starts.
        """
        share = sum(len(part.labels) for part in parts) / global_batch_size
        for number, part in enumerate(parts, 1):
            is_last = number == len(parts)
            # Gradients are averaged over processes: a part counts by its images, and not as a process.
            weight = len(part.labels) * self.world.size / global_batch_size
            with nullcontext() if is_last else no_sync(self.replica):
                teachers = self.attack_and_teach(part, method, epoch)
                with self._perturbed_weights(part, teachers, method, weight, epoch):
                    output = self.loss(part, teachers, method, self.config.forwards)
                    with self.statistics.averaged(share) if is_last else nullcontext():
                        self.backward(output.loss.loss, weight)
            on_output(output, part.labels)
        self.update()

    def attack_and_teach(self, batch: Batch, method: Method, epoch: int) -> TeacherOutputs:
        """x~ = argmax of the attack's loss on S (Eq. 2); T(x), T(x~), which may still run on their lane."""
        x_nat = batch.x_nat
        x_adv = t_at_nat = t_at_adv = t_st_adv = None
        with self.lanes.teachers():  # at the same time as the attack
            if method.needs_t_at_nat:
                t_at_nat = _needed(self.networks.teacher_at)(x_nat)
        if method.needs_x_adv:
            x_adv = _needed(self.networks.adversary)(batch, epoch)
            with self.lanes.teachers():  # at the same time as the student's passes
                if method.needs_t_at_adv:
                    t_at_adv = _needed(self.networks.teacher_at)(x_adv)
                if method.needs_t_st_adv:
                    t_st_adv = _needed(self.networks.teacher_st)(x_adv)
        return TeacherOutputs(x_adv, t_at_nat, t_at_adv, t_st_adv)

    def loss(self, batch: Batch, teachers: TeacherOutputs, method: Method, forwards: ForwardsConfig) -> StepOutput:
        """The weighted sum of the method's terms, alpha among the weights (Eq. 3 and 4); S(x~) and S(x) for it."""
        x_adv, t_at_nat, t_at_adv, t_st_adv = teachers
        with record_function("student"), self.precision.autocast():
            s_adv, s_nat = self._student_logits(batch.x_nat, x_adv, method, forwards)
        self.lanes.join()
        with record_function("loss"):
            classes = next(logits.shape[1] for logits in (s_adv, s_nat) if logits is not None)
            loss = distill_loss(
                s_adv, batch.labels, s_nat=s_nat, t_at_nat=t_at_nat, t_at_adv=t_at_adv, t_st_adv=t_st_adv,
                weights=method.weights_of(classes), tau=method.loss.tau, tau_self=method.loss.tau_self,
                beta=method.loss.beta, detach_self=method.loss.detach_self,
                label_smoothing=method.loss.label_smoothing,
            )  # fmt: skip
        if s_nat is not None and s_nat.requires_grad and not method.needs_s_nat:
            loss = loss._replace(loss=loss.loss + 0 * s_nat.sum())  # forward and backward of a term of weight zero
        return StepOutput(loss, s_adv, s_nat, t_at_nat, t_at_adv)

    def _student_logits(
        self, x_nat: Tensor, x_adv: Tensor | None, method: Method, forwards: ForwardsConfig
    ) -> tuple[Tensor | None, Tensor | None]:
        """S(x~) and S(x), in the order of the published code: BatchNorm's running statistics depend on it."""
        student = self.networks.student
        s_adv = s_nat = None
        if x_adv is not None:
            images = {"nat": x_nat, "adv": x_adv}
            idle = plan.idle(forwards, in_warmup=method != self.method)
            self._move_statistics([images[name] for name in idle.before])
            s_adv = student(x_adv)
            self._move_statistics([images[name] for name in idle.between])
        learns = plan.s_nat_learns(method, forwards)
        if learns is not None:
            with torch.set_grad_enabled(learns):
                s_nat = student(x_nat)
        return s_adv, s_nat

    @torch.no_grad()
    def _move_statistics(self, batches: Sequence[Tensor]) -> None:
        """Forwards of the student for BatchNorm's running statistics alone."""
        for images in batches:
            self.networks.student(images)

    def _perturbed_weights(
        self, batch: Batch, teachers: TeacherOutputs, method: Method, weight: float, epoch: int
    ) -> AbstractContextManager[None]:
        """Perturb the weights adversarially inside, in epochs in which `awp` is on."""
        if not awp.is_active(self.config, epoch):
            return nullcontext()

        def loss() -> Tensor:
            with no_sync(self.replica):
                output = self.loss(batch, teachers, method, ForwardsConfig())
            return self.scaler.scale(output.loss.loss * weight)

        return awp.perturbed(self.student, loss, self.config.awp.gamma, self.world)

    def backward(self, loss: Tensor, weight: float = 1.0) -> None:
        """Gradients of weight * loss, added to those that are there."""
        with record_function("backward"):
            self.scaler.scale(loss if weight == 1 else loss * weight).backward()

    def update(self) -> None:
        """One step of the optimizer along the gradients, of norm `optim.clip_norm` at most where that is set."""
        optimizer, clip_norm = self.optimizer, self.config.optim.clip_norm
        with record_function("optimizer"):
            if clip_norm is not None:
                self.scaler.unscale_(optimizer)
                weights = [weight for group in optimizer.param_groups for weight in group["params"]]
                torch.nn.utils.clip_grad_norm_(weights, clip_norm)
            self.scaler.step(optimizer)
            self.scaler.update()
            optimizer.zero_grad()  # now, so that no gradient is kept through the next attack


def _needed(network: Network | None) -> Network:
    assert network is not None, "the method's row needs a network that is missing"
    return network
