"""Cost of a training: its seconds and its floating-point operations, by the rows of its log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine import objectives
from engine.config import RunConfig, epochs_of
from engine.runs.assemble import method_of
from engine.training import plan, schedule
from engine.training.plan import Passes
from engine.training.weights import awp

Rows = Sequence[Mapping[str, Any]]
Forward = tuple[float, float]
"""Operations of a forward pass over one image, and of its first layer."""


@dataclass(frozen=True)
class TrainingCost:
    """Seconds and operations of a training's steps, and how many steps and images they were."""

    seconds: float
    flops: float
    steps: int
    images: int


def cost(config: RunConfig, rows: Rows, forwards: Mapping[str, Forward]) -> TrainingCost:
    """The cost of a finished training. rows: of its log. forwards: by network, "student" and teachers' sections.

    Raises ValueError where an epoch is missing, or there twice, or its time is no number.
    """
    epochs = epoch_rows(rows, config.epochs)
    images = [round(row["images_per_second"] * row["seconds"]) for row in epochs]
    flops = sum(count * image_flops(config, epoch, forwards) for epoch, count in enumerate(images))
    return TrainingCost(seconds(epochs), flops, int(epochs[-1]["step"]), sum(images))


def epoch_rows(rows: Rows, epochs: int) -> list[Mapping[str, Any]]:
    """The rows of the epochs, each once and in order. Raises ValueError as `cost` does."""
    found = [row for row in rows if row.get("event") == "epoch"]
    if [row.get("epoch") for row in found] != list(range(1, epochs + 1)):
        raise ValueError(f"the log has not each of {epochs} epochs once")
    for row in found:
        if not (isinstance(row.get("seconds"), float) and 0 < row["seconds"] < math.inf):
            raise ValueError(f"the log has no seconds of epoch {row['epoch']}")
    return found


def seconds(epochs: Rows) -> float:
    """Sum of the epochs' seconds: of their steps, with loading and logging, without evaluation and checkpoints."""
    return math.fsum(row["seconds"] for row in epochs)


def image_flops(config: RunConfig, epoch: int, forwards: Mapping[str, Forward]) -> float:
    """Operations of a step in an epoch, from 0, for each of its images."""
    method = method_of(config)
    in_warmup = method.warmup is not None and epoch < epochs_of(config.loss.warmup, config.epochs)
    trained = method.warmup if in_warmup and method.warmup is not None else method
    attack = schedule.attack(config, epoch)
    passes = plan.passes(trained, attack, config.forwards, in_warmup=in_warmup)
    wanted = plan.forwards(trained, attack, config.forwards)
    of_teachers = [objectives.LOGITS[name].network for name in (*wanted.before_attack, *wanted.after_attack)]
    attacked = 0
    if trained.needs_x_adv:
        loss = plan.attack_loss(attack)
        attacked = attack.num_steps * loss.teacher_in_loop + loss.gradients
    student = passes._replace(attacked=passes.attacked - attacked, forward=passes.forward - len(of_teachers))
    if awp.is_active(config, epoch):  # another gradient, by which the weights are attacked
        has_gradient = plan.forwards(trained, attack, config.forwards.model_copy(update={"clean": "skip"})).student
        student = student._replace(trained=student.trained + sum(has_gradient.values()))
    robust = objectives.LOGITS[objectives.TRUST].network
    total = student.flops(*forwards[objectives.STUDENT])
    total += sum(forwards[section][0] for section in of_teachers)
    return total + (Passes(attacked, 0, 0).flops(*forwards[robust]) if attacked else 0.0)
