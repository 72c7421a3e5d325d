"""Data-parallel training of one student: averaged gradients and running statistics of BatchNorm."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
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


class OneMessage:
    """Gradients and running statistics, averaged over all processes by one all-reduce between two parts of a step.

    In place of DistributedDataParallel and of `RunningStatistics`, whose messages go out during a backward: `pack`
    and `unpack` may be captured as CUDA graphs, and `send` stands between them. All processes begin with the
    student of the first.
    """

    def __init__(self, student: nn.Module, world: World) -> None:
        self._size = world.size
        self._parameters = list(student.parameters())
        self._running = _running_statistics(student)
        values = [*self._parameters, *self._running]
        sizes = [value.numel() for value in values]
        self._message = torch.zeros(sum(sizes), dtype=values[0].dtype, device=values[0].device)
        pieces = [
            piece.as_strided(value.shape, value.stride())  # in its memory's order, so that a copy is one launch
            for piece, value in zip(self._message.split(sizes), values, strict=True)
        ]
        self._gradients, self._statistics = pieces[: len(self._parameters)], pieces[len(self._parameters) :]
        for value in student.state_dict().values():
            dist.broadcast(value, src=0)

    @torch.no_grad()
    def pack(self, share: float) -> None:
        """Write this process's part of each mean. share: of the batch's images that it has."""
        torch._foreach_copy_(self._gradients, self._own_gradients())
        torch._foreach_div_(self._gradients, self._size)
        if self._running:
            torch._foreach_copy_(self._statistics, self._running)
            torch._foreach_mul_(self._statistics, share)

    def send(self) -> None:
        """Sum the parts of all processes."""
        dist.all_reduce(self._message)

    @torch.no_grad()
    def unpack(self) -> None:
        """Make the running statistics the means, and the gradients the parts of the message that are."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        if self._running:
            torch._foreach_copy_(self._running, self._statistics)

    def _own_gradients(self) -> list[Tensor]:
        for parameter in self._parameters:
            if parameter.grad is None:  # nothing of the loss depends on it
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]


def _running_statistics(network: nn.Module) -> list[Tensor]:
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    both = [value for norm in norms for value in (norm.running_mean, norm.running_var)]
    return [value for value in both if value is not None]


class RunningStatistics:
    """Running mean and variance of a student's BatchNorm, kept the same on all processes.

    Without synchronised BatchNorm each process sees the mean and variance of its own part of the batch. After a
    step the running statistics are their mean over the processes, weighted by images: the running mean is then
    exactly that of the whole batch, and the running variance an average within the parts.
    """

    def __init__(self, student: nn.Module, world: World) -> None:
        are_apart = world.size > 1 and not is_synchronised(student)
        self._running = _running_statistics(student) if are_apart else []

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
