"""Micro-batches: a batch in as many parts as the memory asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.common.lookup import check_known
from engine.common.numbers import ceil_div
from engine.common.stopping import RunFailed
from engine.config import RunConfig
from engine.methods import Method
from engine.pipelines.base import Batch
from engine.system.data_parallel import no_sync
from engine.system.distributed import World
from engine.training.step import TrainingStep
from engine.training.weights.optimizer import IMPLEMENTATIONS


def count_parts(global_batch_size: int, micro_batch: int | None, processes: int) -> int:
    """ceil(global_batch_size / (processes * micro_batch)), at least 1: the parts of every process's batch.

    As many on every process, since some of the work in a part may be common. micro_batch: None for one part.
    """
    return 1 if micro_batch is None else max(1, ceil_div(global_batch_size, processes * micro_batch))


class MicroBatches:
    """Splits batches by `micro_batch` of the configuration.

    size: images of a part, at most; None for whole batches, and as long as "auto" has found none.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        if isinstance(config.micro_batch, str):
            check_known("micro_batch", config.micro_batch, ("auto",))
        self.size = config.micro_batch if isinstance(config.micro_batch, int) else None
        self._config, self._world = config, world

    @property
    def is_unknown(self) -> bool:
        """True if the size is still to be found."""
        return self._config.micro_batch == "auto" and self.size is None

    def split(self, batch: Batch, global_batch_size: int) -> list[Batch]:
        """The parts of this process's batch, of `global_batch_size` images in all."""
        return batch.split(count_parts(global_batch_size, self.size, self._world.size))

    def is_frequent(self, images: int) -> bool:
        """True if a part of a full batch has so many images: as many on every process, give or take one."""
        if self.is_unknown:
            return False
        share = self._config.batch_size // self._world.size
        count = count_parts(self._config.batch_size, self.size, self._world.size)
        return images in (share // count, ceil_div(share, count))

    def find(self, step: TrainingStep, batch: Batch, method: Method, *, epoch: int, global_batch_size: int) -> int:
        """Halve the size until a step fits into the memory of every process; the step leaves no trace.

        Raises RunFailed where not even one image fits.
        """
        size = ceil_div(global_batch_size, self._world.size)
        while not self._world.gather(torch.tensor(_fits(step, batch, size, method, epoch))).all():
            if size == 1:
                raise RunFailed("the memory does not hold the networks and one image")
            size = ceil_div(size, 2)
        self.size = size
        return size


def _fits(step: TrainingStep, batch: Batch, size: int, method: Method, epoch: int) -> bool:
    """True if a step on so many images of the batch fits into the memory of this process."""
    adversary = step.networks.adversary
    counts = None if adversary is None else adversary.counts
    kept = [*step.student.buffers(), *([] if counts is None else [counts])]
    before = [value.clone() for value in kept]
    part = batch.split([size])[0]
    reserved = _reserve(step)
    on_gpu = step.precision.device.type == "cuda"
    try:
        with no_sync(step.replica):
            for _ in range(2 if on_gpu else 1):  # the second captures a graph, which has memory of its own
                teachers = step.attack_and_teach(part, method)
                step.backward(step.loss(part, teachers, method, step.config.forwards, epoch).loss.loss)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
        if adversary is not None:
            adversary.release()
    del reserved
    step.optimizer.zero_grad()
    for value, was in zip(kept, before, strict=True):
        value.copy_(was)
    if on_gpu:
        torch.cuda.empty_cache()
    return fits


def _reserve(step: TrainingStep) -> list[Tensor]:
    """Memory for the rest of an update: the optimizer's averages, and the weights before their own attack."""
    averages = IMPLEMENTATIONS[step.config.optim.implementation].averages
    copies = len(averages) * (not step.optimizer.state) + int(step.config.awp.gamma > 0)
    return [torch.empty_like(value) for value in step.student.parameters() for _ in range(copies)]
