"""The learning rate as a function of the step, and the training's attack as one of the epoch. Imports no torch.

Nothing of them has to be saved for a resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from engine.common.lookup import look_up
from engine.config import AttackSpec, RunConfig, epochs_of
from engine.methods import Method

LINEAR_BATCH = 128
"""Batch size at which lr_scale "linear" changes nothing: the paper's (Section 5)."""

# One-cycle (Smith and Topin, 2019) as torch's OneCycleLR has it: the part of the run in which the rate rises, how
# far below its peak it starts, and how far below its start it ends.
_RISING, _START, _END = 0.3, 25.0, 1e4


_LENGTHS = ("epsilon", "step_size", "start_epsilon", "gaussian_std")

# How the peak grows with the batch size.
_SCALES: dict[str, Callable[[int], float]] = {
    "none": lambda batch_size: 1.0,
    "linear": lambda batch_size: batch_size / LINEAR_BATCH,
}


def peak(config: RunConfig) -> float:
    """The rate that the schedule scales: lr, or lr * batch_size / 128 with lr_scale "linear"."""
    return config.lr * look_up("lr_scale", config.lr_scale, _SCALES)(config.batch_size)


def learning_rate(config: RunConfig, step: int, steps_per_epoch: int) -> float:
    """The rate of the step, counted from 0."""
    return peak(config) * factor(config, step, steps_per_epoch)


def factor(config: RunConfig, step: int, steps_per_epoch: int) -> float:
    """The rate of the step relative to `peak`."""
    after_warmup = look_up("optim.schedule", config.optim.schedule, SCHEDULES)
    warmup = epochs_of(config.optim.lr_warmup, config.epochs) * steps_per_epoch
    if step < warmup:
        return (step + 1) / warmup
    return after_warmup(config, step, warmup, steps_per_epoch)


def attack(config: RunConfig, epoch: int) -> AttackSpec:
    """The training's attack in an epoch, from 0.

    In an `epsilon_warmup` of E epochs its lengths are (epoch + 1) / E of the whole ones. In a `steps_warmup` of E
    epochs it has 1 + (num_steps - 1) epoch / (E - 1) steps, halves rounded up.
    """
    whole, grown = config.attack, dict[str, float]()
    if epoch + 1 < (warmup := epochs_of(whole.epsilon_warmup, config.epochs)):
        lengths = {name: getattr(whole, name) for name in _LENGTHS}
        grown |= {name: value * (epoch + 1) / warmup for name, value in lengths.items() if value is not None}
    if whole.num_steps and epoch + 1 < (warmup := epochs_of(whole.steps_warmup, config.epochs)):
        last = warmup - 1
        grown["num_steps"] = 1 + (2 * (whole.num_steps - 1) * epoch + last) // (2 * last)
    return whole.model_copy(update=grown) if grown else whole


class _Warmup(NamedTuple):
    """A part of the run, and the epochs, fewest to most, in which it does what it is for. beyond: what more do."""

    part: float
    fewest: int
    most: int
    beyond: str


def misfit_warmups(config: RunConfig, method: Method) -> Iterator[str]:
    """Sentences on warm-ups that are too short to change anything, or too long for the run.

    An attack that grows is whole in the last epoch of its warm-up, and needs an epoch before it to grow in.
    """
    epochs, attack = config.epochs, config.attack
    warmups = {"optim.lr_warmup": _Warmup(config.optim.lr_warmup, 1, epochs, "the rate does not reach its peak")}
    if method.warmup is not None:
        warmups["loss.warmup"] = _Warmup(config.loss.warmup, 1, epochs - 1, "alpha is 1 to the end")
    if method.needs_x_adv:
        never = "the attack does not reach its whole size"
        warmups["attack.epsilon_warmup"] = _Warmup(attack.epsilon_warmup, 2, epochs, never)
        if attack.num_steps > 1:
            warmups["attack.steps_warmup"] = _Warmup(attack.steps_warmup, 2, epochs, never)
        elif attack.steps_warmup:
            yield f"attack.steps_warmup changes nothing: the attack has num_steps {attack.num_steps}"
    for name, (part, fewest, most, beyond) in warmups.items():
        lasts = epochs_of(part, epochs)
        given = f"{name}: {part:g} stands for {lasts} of {epochs} epochs"
        if part and lasts < fewest:
            yield f"{given}, and changes nothing; {fewest} is the least that does"
        elif lasts > most:
            yield f"{given}: {beyond}"


def _milestones(config: RunConfig, step: int, warmup: int, steps_per_epoch: int) -> float:
    reached = 1.0
    for milestone, lr_factor in zip(config.optim.milestones, config.optim.lr_factors, strict=True):
        if step // steps_per_epoch >= epochs_of(milestone, config.epochs):
            reached = lr_factor
    return reached


def _cosine(config: RunConfig, step: int, warmup: int, steps_per_epoch: int) -> float:
    return _wave(1.0, 0.0, (step - warmup) / (config.epochs * steps_per_epoch - warmup))


def _one_cycle(config: RunConfig, step: int, warmup: int, steps_per_epoch: int) -> float:
    total = config.epochs * steps_per_epoch
    top = _RISING * total - 1
    if step <= top:
        return _wave(1 / _START, 1.0, step / top)
    return _wave(1.0, 1 / (_START * _END), (step - top) / (total - 1 - top))


def _cyclic(config: RunConfig, step: int, warmup: int, steps_per_epoch: int) -> float:
    """One triangle, as of torch's CyclicLR from 0: the first step has the rate 0 (Wong et al., 2020)."""
    half = config.epochs * steps_per_epoch / 2
    return min(step / half, 2 - step / half)


def _wave(start: float, end: float, part: float) -> float:
    """From start to end along half a wave; part in [0, 1]."""
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


SCHEDULES: dict[str, Callable[[RunConfig, int, int, int], float]] = {
    "milestones": _milestones,
    "cosine": _cosine,
    "one-cycle": _one_cycle,
    "cyclic": _cyclic,
}
"""The factor by name, of the configuration, the step, the steps of the warm-up, and those of an epoch."""
