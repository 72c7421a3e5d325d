"""Averages of the student's weights over the training, over torch's own averaged model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import PARAM_LIST, AveragedModel, get_ema_multi_avg_fn, update_bn

from engine.common.lookup import look_up
from engine.config import AveragingConfig, RunConfig, epochs_of
from engine.pipelines.base import Batch
from engine.system.data_parallel import RunningStatistics
from engine.system.distributed import World


class Kind(NamedTuple):
    """Kind of average: the part of the run from which on it is taken, torch's model, and how often."""

    start: float
    model: Callable[[nn.Module, AveragingConfig], AveragedModel]
    every_step: bool


def _ema(student: nn.Module, config: AveragingConfig) -> AveragedModel:
    average = get_ema_multi_avg_fn(config.decay)

    def update(averaged: PARAM_LIST, trained: PARAM_LIST, count: Tensor | int) -> None:
        if averaged[0].is_floating_point():
            average(averaged, trained, count)
        else:  # a mean of indices or counts would be rounded down
            torch._foreach_copy_(averaged, trained)

    return AveragedModel(student, multi_avg_fn=update, use_buffers=True)


AVERAGING_KINDS: dict[str, Kind | None] = {
    "none": None,
    "ema": Kind(0.0, _ema, every_step=True),
    "swa": Kind(0.75, lambda student, config: AveragedModel(student), every_step=False),
}


def build(student: nn.Module, config: RunConfig) -> Average | None:
    """The average that the configuration asks for, None where it asks for none."""
    kind = look_up("averaging.kind", config.averaging.kind, AVERAGING_KINDS)
    return None if kind is None else Average(student, config, kind)


def first_epoch(config: RunConfig) -> int | None:
    """The epoch, from 0, in which the averaging begins; None where there is none."""
    kind = look_up("averaging.kind", config.averaging.kind, AVERAGING_KINDS)
    if kind is None:
        return None
    start = kind.start if config.averaging.start is None else config.averaging.start
    return min(epochs_of(start, config.epochs), config.epochs - 1)


class Average:
    """An average of a student; see `AveragingConfig`.

    module: the averaged network, which is the student's copy until the averaging starts.
    """

    def __init__(self, student: nn.Module, config: RunConfig, kind: Kind) -> None:
        self._student, self._every_step = student, kind.every_step
        self._start = first_epoch(config) or 0
        self._model = kind.model(student, config.averaging)
        self._model.requires_grad_(False).eval()

    @property
    def module(self) -> nn.Module:
        """The averaged network."""
        module: nn.Module = self._model.module
        return module

    @property
    def has_begun(self) -> bool:
        """True once something was averaged."""
        return bool(self._model.n_averaged > 0)

    def after_step(self, epoch: int) -> None:
        """Take in the weights and running statistics of a step."""
        if self._every_step and epoch >= self._start:
            self._model.update_parameters(self._student)

    def after_epoch(self, epoch: int, batches: Iterable[Batch], num_samples: int, world: World) -> None:
        """Take in the weights of an epoch; the mean of weights has statistics of its own, measured on x_nat.

        batches: this process's, of all num_samples images. Called again for an epoch, as after a resume, it takes
        in nothing.
        """
        if self._every_step or epoch < self._start:
            return
        if self._model.n_averaged <= epoch - self._start:
            self._model.update_parameters(self._student)
        own = 0

        def images() -> Iterable[Tensor]:
            nonlocal own
            for batch in batches:
                own += len(batch.labels)
                yield batch.x_nat

        update_bn(images(), self._model)
        with RunningStatistics(self._model, world).averaged(own / num_samples):
            pass
        self._model.eval()

    def state_dict(self) -> dict[str, object]:
        """State for a checkpoint."""
        state: dict[str, object] = self._model.state_dict()
        return state

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from `state_dict`."""
        self._model.load_state_dict(state)
