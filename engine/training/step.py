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

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from engine import objectives
from engine.attacks.pgd import at_least_float
from engine.config import ForwardsConfig, RunConfig
from engine.kernels import DistillLoss, Term, distill_loss, trust
from engine.methods import Method
from engine.pipelines.base import Batch
from engine.system.data_parallel import OneMessage, RunningStatistics, no_sync
from engine.system.distributed import World
from engine.system.precision import Precision
from engine.system.streams import Lanes
from engine.training import plan
from engine.training.capture.step_numbers import StepNumbers
from engine.training.factors import Factors
from engine.training.step_networks import Networks
from engine.training.weights import awp, optimizer
from engine.training.weights.half_weights import HalfWeights

Network = TypeVar("Network")


class StepOutput(NamedTuple):
    """The loss of a step, the names of its terms, and the logits it was made of, by the names of `objectives`."""

    loss: DistillLoss
    terms: tuple[str, ...]
    logits: Mapping[str, Tensor]


OnOutput = Callable[[StepOutput, Tensor], None]
"""Called with the output of each part of a batch, and its labels, of mixed images those of the larger share."""


@dataclass(frozen=True)
class OnDevice:
    """An `OnOutput` whose work is on the device alone, so that a captured step may repeat it without a call."""

    call: OnOutput

    def __call__(self, output: StepOutput, labels: Tensor) -> None:
        self.call(output, labels)


class TeacherOutputs(NamedTuple):
    """The images of each of `objectives.VIEWS` that is needed, and the teachers' logits of them by name."""

    images: Mapping[str, Tensor]
    logits: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """A step of a run: the networks, and what turns their gradients into new weights.

    method: the row of the run, after its warm-up. factors: of its terms. numbers: of the step to come.
    halves: the copies of its weights that it is trained on, if any.
    replica: the student whose backward averages gradients over all processes, see `data_parallel.replicate`.
    statistics: keeps running statistics the same on all of them. message: does both instead, where the step of
    several processes is captured.
    """

    networks: Networks
    student: nn.Module
    halves: HalfWeights | None
    replica: nn.Module
    statistics: RunningStatistics
    message: OneMessage | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    method: Method
    factors: Factors
    numbers: StepNumbers
    config: RunConfig
    precision: Precision
    lanes: Lanes
    world: World

    def __call__(
        self, parts: Sequence[Batch], method: Method, *, epoch: int, global_batch_size: int, on_output: OnOutput
    ) -> None:
        """Update the weights: theta <- theta - eta * gradient of the loss of a batch.

        parts: this process's images of the batch, of `global_batch_size` in all; as many parts on every process.
        method: the row to train with now. epoch: from 0, as in `numbers`.
        """
        self.differentiate(parts, method, epoch=epoch, global_batch_size=global_batch_size, on_output=on_output)
        if self.message is not None:
            self.message.send()
        self.update()

    def differentiate(
        self, parts: Sequence[Batch], method: Method, *, epoch: int, global_batch_size: int, on_output: OnOutput
    ) -> None:
        """The gradient of the loss of a batch, averaged over all processes but for a `message` to be sent."""
        share = sum(len(part.labels) for part in parts) / global_batch_size
        for number, part in enumerate(parts, 1):
            is_last = number == len(parts)
            # Gradients are averaged over processes: a part counts by its images, and not as a process.
            weight = len(part.labels) * self.world.size / global_batch_size
            with nullcontext() if is_last else no_sync(self.replica):
                teachers = self.attack_and_teach(part, method)
                in_half = nullcontext() if self.halves is None else self.halves.in_place()
                with self._perturbed_weights(part, teachers, method, weight, epoch), in_half:
                    output = self.loss(part, teachers, method, self.config.forwards, epoch)
                    with self.statistics.averaged(share) if is_last else nullcontext():
                        self.backward(output.loss.loss, weight)
            on_output(output, part.main_labels)
        if self.message is not None:
            self.message.pack(share)

    def attack_and_teach(self, batch: Batch, method: Method) -> TeacherOutputs:
        """x~ = argmax of the attack's loss on S (Eq. 2); T(x), T(x~), which may still run on their lane."""
        forwards = plan.forwards(method, self.config.attack, self.config.forwards)
        images, logits = {"nat": batch.x_nat}, dict[str, Tensor]()
        with self.lanes.teachers():  # at the same time as the attack
            self._teach(forwards.before_attack, images, logits)
        if method.needs_x_adv:
            if forwards.attack_waits:
                self.lanes.join()
            images["adv"] = _needed(self.networks.adversary)(batch, self.numbers.epoch, logits.get("t_at_nat"))
            if any(objectives.LOGITS[name].view == "mirrored" for name in method.reads):
                images["mirrored"] = 2 * batch.x_nat - images["adv"]
            with self.lanes.teachers():  # at the same time as the student's passes
                self._teach(forwards.after_attack, images, logits)
        return TeacherOutputs(images, logits)

    def _teach(self, names: Sequence[str], images: Mapping[str, Tensor], logits: dict[str, Tensor]) -> None:
        for name in names:
            network, view = objectives.LOGITS[name]
            with torch.no_grad():
                logits[name] = _needed(self.networks.teachers.get(network))(images[view])

    def loss(
        self, batch: Batch, teachers: TeacherOutputs, method: Method, forwards: ForwardsConfig, epoch: int = 0
    ) -> StepOutput:
        """The weighted sum of the method's terms, alpha among the weights (Eq. 3 and 4); S(x~) and S(x) for it."""
        with record_function("student"), self.precision.autocast():
            student = self._student_logits(teachers.images, method, forwards)
        self.lanes.join()
        with record_function("loss"):
            logits = {**student, **teachers.logits}
            loss = self._weighted(logits, batch, method, epoch)
        s_nat = student.get("s_nat")
        if s_nat is not None and s_nat.requires_grad and "s_nat" not in method.reads:
            loss = loss._replace(loss=loss.loss + 0 * s_nat.sum())  # forward and backward of a term of weight zero
        return StepOutput(loss, method.term_names, logits)

    def _weighted(self, logits: Mapping[str, Tensor], batch: Batch, method: Method, epoch: int) -> DistillLoss:
        """The terms, or the function, of a method; epoch: from 0."""
        trusted = objectives.TRUST if objectives.TRUST in logits else None
        if method.function is not None:
            return expected(partial(by_function, method, logits, trusted), batch)
        differences = {
            name: logits[whole] - logits[part]
            for name, (whole, part) in objectives.DIFFERENCES.items()
            if whole in logits and part in logits
        }
        logits = {**logits, **differences}
        growth = (epoch + 1) / (method.loss.growth_epochs or self.config.epochs)
        terms = method.terms(next(iter(logits.values())).shape[1], growth)
        names = dict.fromkeys(term.factor for term in terms if term.factor is not None)
        factors = self.factors(names, logits, batch.labels, self.numbers.lr_part)

        def loss(labels: Tensor, sample_weights: Tensor | None) -> DistillLoss:
            return distill_loss(
                logits,
                labels,
                [Term(*term[1:]) for term in terms],
                trust=trusted,
                beta=method.loss.beta,
                factors=factors,
                sample_weights=sample_weights,
                label_smoothing=method.loss.label_smoothing,
            )

        return expected(loss, batch)

    def _student_logits(
        self, images: Mapping[str, Tensor], method: Method, forwards: ForwardsConfig
    ) -> dict[str, Tensor]:
        """S(x~), S(x-) and S(x), in the order of the published code: BatchNorm's statistics depend on it."""
        idle = plan.Idle()
        if method.needs_x_adv:
            idle = plan.idle(forwards, in_warmup=method != self.method)
        learns = plan.forwards(method, self.config.attack, forwards).student
        logits: dict[str, Tensor] = {}
        self._move_statistics([images[view] for view in idle.before])
        seen_adv = False
        for name, has_gradient in learns.items():
            view = objectives.LOGITS[name].view
            if seen_adv and view == "nat":
                self._move_statistics([images[view] for view in idle.between])
                idle = idle._replace(between=())
            with torch.set_grad_enabled(has_gradient):
                logits[name] = self.networks.student(images[view])
            seen_adv = seen_adv or view != "nat"
        self._move_statistics([images[view] for view in (*idle.between, *idle.after)])
        return logits

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

        needed = ForwardsConfig(first=self.config.forwards.first)  # and none for BatchNorm's sake

        def loss() -> Tensor:
            with no_sync(self.replica):
                output = self.loss(batch, teachers, method, needed, epoch)
            return self.scaler.scale(output.loss.loss * weight)

        return awp.perturbed(self.student, loss, self.config.awp.gamma, self.world)

    def backward(self, loss: Tensor, weight: float = 1.0) -> None:
        """Gradients of weight * loss, added to those that are there."""
        with record_function("backward"):
            self.scaler.scale(loss if weight == 1 else loss * weight).backward()

    def update(self) -> None:
        """One step of the optimizer along the gradients, of norm `optim.clip_norm` at most where that is set."""
        clip_norm = self.config.optim.clip_norm
        with record_function("optimizer"):
            if self.message is not None:
                self.message.unpack()
            if clip_norm is not None:
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(optimizer.parameters(self.optimizer), clip_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()  # now, so that no gradient is kept through the next attack


def expected(loss: Callable[[Tensor, Tensor | None], DistillLoss], batch: Batch) -> DistillLoss:
    """The loss of a batch's labels; of mixed images s loss(y) + (1 - s) loss(y'), s the share of the own image.

    So the cross-entropy is that of the mixed labels, and alpha the trust in each of both.
    loss: of labels and the weights of samples, None for 1. `terms` are means over the labels of the larger share.
    """
    if batch.mixture is None:
        return loss(batch.labels, None)
    share_B = batch.mixture.share
    own, other = loss(batch.labels, share_B), loss(batch.mixture.labels, 1 - share_B)
    with torch.no_grad():
        terms_K = loss(batch.main_labels, None).terms
    return DistillLoss(
        own.loss + other.loss,
        share_B * own.alpha + (1 - share_B) * other.alpha,
        terms_K,
        own.per_sample + other.per_sample,
    )


def by_function(
    method: Method,
    logits: Mapping[str, Tensor],
    trusted: str | None,
    labels: Tensor,
    sample_weights: Tensor | None = None,
) -> DistillLoss:
    """The mean over the batch of a loss that is a function, (B,), of logits by name and labels.

    sample_weights: (B,), its factors; None: 1. Raises ValueError where the function gives anything else, or what
    has no gradient.
    """
    assert method.function is not None
    given = {name: at_least_float(logits[name]) for name in method.function_reads}
    loss_B = method.function(given, labels)
    if not isinstance(loss_B, Tensor) or loss_B.shape != labels.shape or not loss_B.is_floating_point():
        got = tuple(loss_B.shape) if isinstance(loss_B, Tensor) else type(loss_B).__name__
        raise ValueError(f"method: the loss of {method.name} must be a floating ({len(labels)},), got {got}")
    if torch.is_grad_enabled() and not loss_B.requires_grad:
        raise ValueError(f"method: the loss of {method.name} has no gradient to the student's logits")
    loss_B = at_least_float(loss_B)
    if sample_weights is not None:
        loss_B = loss_B * sample_weights
    mean = loss_B.sum() / max(len(labels), 1)
    alpha_B = torch.ones_like(loss_B.detach())
    if trusted is not None:
        alpha_B = trust(logits[trusted], labels, method.loss.beta)
    return DistillLoss(mean, alpha_B, mean.detach()[None], loss_B.detach())


def _needed(network: Network | None) -> Network:
    assert network is not None, "the method's row needs a network that is missing"
    return network
