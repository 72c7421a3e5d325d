"""Data-parallel training of one student: averaged gradients and running statistics of BatchNorm."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from engine.models.sync_batch_norm import is_synchronised
from engine.system.distributed import World

# `RunningStatistics` takes care of the buffers. torch 2.14 gives the argument a new name.
_NEW_NAME, _OLD_NAME = "forward_sync_buffers", "broadcast_buffers"
_KNOWS_NEW_NAME = _NEW_NAME in inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {_NEW_NAME if _KNOWS_NEW_NAME else _OLD_NAME: False}


def replicate(student: nn.Module, world: World, device: torch.device, *, every_backward: bool) -> nn.Module:
    """DistributedDataParallel(student), whose backward averages gradients; of one process, the student itself.

    Its forward is for passes that are trained; attacks and evaluations run the student itself.
    every_backward: True where no backward runs in `no_sync`, so that torch may plan the reduction once.
    """
    if world.size == 1:
        return student
    return DistributedDataParallel(
        student,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=every_backward,
        **_NO_BUFFER_SYNC,
    )


def no_sync(replica: nn.Module) -> AbstractContextManager[None]:
    """Context in which gradients of a `replicate`d student are summed on each process alone."""
    return replica.no_sync() if isinstance(replica, DistributedDataParallel) else nullcontext()


class RunningStatistics:
    """Running mean and variance of a student's BatchNorm, kept the same on all processes.

    Without synchronised BatchNorm each process sees the mean and variance of its own part of the batch. After a
    step the running statistics are their mean over the processes, weighted by images: the running mean is then
    exactly that of the whole batch, and the running variance an average within the parts.
    """

    def __init__(self, student: nn.Module, world: World) -> None:
        norms = [module for module in student.modules() if isinstance(module, _BatchNorm)]
        self._running = [
            value
            for norm in norms
            for value in (norm.running_mean, norm.running_var)
            if value is not None and world.size > 1 and not is_synchronised(student)
        ]

    @contextmanager
    def averaged(self, share: float) -> Iterator[None]:
        """Average them over all processes while the backward inside runs; they are the mean at its end.

        share: of the batch's images that this process has.
        """
        if not self._running:
            yield
            return
        flat = torch.cat([value.flatten() for value in self._running]) * share
        work = dist.all_reduce(flat, async_op=True)
        yield
        work.wait()
        with torch.no_grad():
            torch._foreach_copy_(self._running, list(flat.split([value.numel() for value in self._running])))
