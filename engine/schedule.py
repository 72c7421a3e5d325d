"""The learning rate as a function of the step: nothing of it has to be saved for a resume. Imports no torch."""

from __future__ import annotations

import math

from engine.config import RunConfig, epochs_of

LINEAR_BATCH = 128
"""Batch size at which lr_scale "linear" changes nothing: the paper's (Section 5)."""

# One-cycle (Smith and Topin, 2019) as torch's OneCycleLR has it: the part of the run in which the rate rises, how
# far below its peak it starts, and how far below its start it ends.
_RISING, _START, _END = 0.3, 25.0, 1e4


def peak(config: RunConfig) -> float:
    """The rate that the schedule scales: lr, or lr * batch_size / 128 with lr_scale "linear"."""
    return config.lr * (config.batch_size / LINEAR_BATCH if config.lr_scale == "linear" else 1.0)


def learning_rate(config: RunConfig, step: int, steps_per_epoch: int) -> float:
    """The rate of the step, counted from 0."""
    return peak(config) * factor(config, step, steps_per_epoch)


def factor(config: RunConfig, step: int, steps_per_epoch: int) -> float:
    """The rate of the step relative to `peak`."""
    optim, total = config.optim, config.epochs * steps_per_epoch
    warmup = epochs_of(optim.lr_warmup, config.epochs) * steps_per_epoch
    if step < warmup:
        return (step + 1) / warmup
    if optim.schedule == "cosine":
        return _cosine(1.0, 0.0, (step - warmup) / (total - warmup))
    if optim.schedule == "one-cycle":
        top = _RISING * total - 1
        if step <= top:
            return _cosine(1 / _START, 1.0, step / top)
        return _cosine(1.0, 1 / (_START * _END), (step - top) / (total - 1 - top))
    reached = 1.0
    for milestone, lr_factor in zip(optim.milestones, optim.lr_factors, strict=True):
        if step // steps_per_epoch >= epochs_of(milestone, config.epochs):
            reached = lr_factor
    return reached


def _cosine(start: float, end: float, part: float) -> float:
    """From start to end along half a wave; part in [0, 1]."""
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2
