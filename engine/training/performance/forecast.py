"""Time and memory that a training will take, from its first steps, without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from engine.attacks import table
from engine.common.numbers import duration, gibibytes
from engine.config import RunConfig, epochs_of
from engine.methods import Method
from engine.system import memory
from engine.training import plan, schedule
from engine.training.plan import Passes

_FIRST_STEPS = 3
"""Steps that compile, capture graphs and fill caches, and tell nothing of the others."""
_FEWEST_STEPS, _FEWEST_SECONDS = 3, 5.0
"""Length of a measurement, where the epoch is not over before."""


class StepClock:
    """Seconds a step, found once, from steps after the first ones.

    is_synchronous: a step is over when the host goes on, as on a CPU; else where it has waited for the device.
    """

    def __init__(self, *, is_synchronous: bool, now: Callable[[], float] = time.perf_counter) -> None:
        self._is_synchronous, self._now = is_synchronous, now
        self._steps, self._is_done = 0, False
        self._start = self._mark = (0, now())

    def after_step(self, *, has_waited: bool, ends_epoch: bool) -> float | None:
        """Seconds a step, at the first call at which they are known; call it after every step of one epoch."""
        self._steps += 1
        if self._is_done or not (has_waited or self._is_synchronous):
            return None
        now = (self._steps, self._now())
        steps, seconds = now[0] - self._mark[0], now[1] - self._mark[1]
        if ends_epoch and steps < _FEWEST_STEPS:  # so short an epoch: the first steps count, too
            steps, seconds = now[0] - self._start[0], now[1] - self._start[1]
        is_long = self._mark != self._start and steps >= _FEWEST_STEPS and seconds >= _FEWEST_SECONDS
        if is_long or ends_epoch:
            self._is_done = True
            return seconds / steps
        if self._mark == self._start and self._steps >= _FIRST_STEPS:
            self._mark = now
        return None


class Operations(NamedTuple):
    """Floating-point operations of a training. training: by epoch. evaluation: after each. final: of the tests.

    unknown: attacks of the evaluations whose operations are not known, and not counted.
    """

    training: tuple[float, ...]
    evaluation: float
    final: float
    unknown: tuple[str, ...]

    def left(self, epoch: int, share_done: float = 0.0) -> float:
        """Operations from an epoch on, counted from 0, of whose training that share is done."""
        own = self.training[epoch] * (1 - share_done)
        return own + sum(self.training[epoch + 1 :]) + self.evaluation * (len(self.training) - epoch) + self.final


class ImageCounts(NamedTuple):
    """Numbers of images: of an epoch's training, of the evaluation after it, and of the tests at the end."""

    training: int
    held_out: int
    test: int


def operations(config: RunConfig, method: Method, forward: tuple[float, float], images: ImageCounts) -> Operations:
    """The operations of a training. forward: those of a pass over an image, and of its first layer."""
    warmup = epochs_of(config.loss.warmup, config.epochs) if method.warmup is not None else 0
    training = []
    for epoch in range(config.epochs):
        of_epoch = method.warmup if method.warmup is not None and epoch < warmup else method
        attack = schedule.attack(config, epoch)
        passes = plan.passes(of_epoch, attack, config.forwards, in_warmup=of_epoch != method)
        training.append(images.training * passes.flops(*forward))
    unknown: list[str] = []

    def evaluated(name: str) -> float:
        gradients = table.find(name).gradients
        if gradients is None:
            unknown.append(table.find(name).title)
            return 0.0
        return Passes(attacked=gradients, trained=0, forward=1).flops(*forward)

    after_epoch = images.held_out * sum(map(evaluated, ("natural", config.eval.attack)))
    # Of the last student and of the best one.
    final = 2 * images.test * sum(map(evaluated, config.eval.final))
    return Operations(tuple(training), after_epoch, final, tuple(dict.fromkeys(unknown)))


def told(work: Operations, epoch: int, seconds: float, of: str = "") -> str:
    """The duration in words. epoch: where it begins, from 0. seconds: of what is left. of: which training."""
    left = len(work.training) - epoch
    epochs = f"{left:,} epoch{'s' * (left > 1)}"
    if epoch:
        epochs = f"the {epochs} that {'are' if left > 1 else 'is'} left"
    but = f" but for {', '.join(work.unknown)}" if work.unknown else ""
    return f"about {duration(seconds)} for {epochs}{of}, evaluations included{but}"


def peak_memory(device: torch.device) -> str:
    """The most memory in use so far, and all there is, of the GPU, else for the process; empty: not known."""
    peak, there = memory.peak(device), memory.total(device)
    if peak is None or there is None:
        return ""
    return f"peak memory so far {gibibytes(peak)} of {gibibytes(there)}"
