"""Averages of the student's weights over the training, over torch's own averaged model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from engine.config import RunConfig, epochs_of
from engine.distributed import Statistics, World
from engine.pipelines.base import Batch


class Average:
    """The average of a student that the configuration asks for; see `AveragingConfig`.

    module: the averaged network, which is the student's copy until the averaging starts.
    """

    def __init__(self, student: nn.Module, config: RunConfig) -> None:
        self._student, self._config = student, config.averaging
        start = config.averaging.start
        if start is None:
            start = 0.75 if config.averaging.kind == "swa" else 0.0
        self._start = min(epochs_of(start, config.epochs), config.epochs - 1)
        if config.averaging.kind == "ema":
            average = get_ema_multi_avg_fn(config.averaging.decay)
            self._model = AveragedModel(student, multi_avg_fn=average, use_buffers=True)
        else:
            self._model = AveragedModel(student)
        self._model.requires_grad_(False).eval()

    @property
    def module(self) -> nn.Module:
        """The averaged network."""
        module: nn.Module = self._model.module
        return module

    @property
    def has_begun(self) -> bool:
        """Whether something was averaged yet."""
        return bool(self._model.n_averaged > 0)

    def after_step(self, epoch: int) -> None:
        """Take in the weights and running statistics of a step."""
        if self._config.kind == "ema" and epoch >= self._start:
            self._model.update_parameters(self._student)

    def after_epoch(self, epoch: int, batches: Iterable[Batch], num_samples: int, world: World) -> None:
        """Take in the weights of an epoch; the mean of weights has statistics of its own, measured on x_nat.

        batches: this process's, of all num_samples images. Called again for an epoch, as after a resume, it takes
        in nothing.
        """
        if self._config.kind != "swa" or epoch < self._start:
            return
        if self._model.n_averaged <= epoch - self._start:
            self._model.update_parameters(self._student)
        own = 0

        def images() -> Iterable[torch.Tensor]:
            nonlocal own
            for batch in batches:
                own += len(batch.labels)
                yield batch.x_nat

        update_bn(images(), self._model)
        with Statistics(self._model, world).averaged(own / num_samples):
            pass
        self._model.eval()

    def state_dict(self) -> dict[str, object]:
        """For a checkpoint."""
        state: dict[str, object] = self._model.state_dict()
        return state

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from `state_dict`."""
        self._model.load_state_dict(state)
