"""The processes that train one network together: who each is, what they tell each other, who of them is silent.

torch.distributed carries it all: NCCL between GPUs, gloo between CPUs. What processes agree on, they agree on over
gloo in any case, so that no agreement waits for a GPU.
"""

from __future__ import annotations

import inspect
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from engine.common import errors
from engine.common.stopping import Interrupted, ProcessLost, RunFailed, Stop
from engine.config import RunConfig
from engine.models.sync_batch_norm import is_synchronised
from engine.pipelines.sampling import Shard
from engine.system import precision

Value = TypeVar("Value")

SECONDS_TO_ANSWER = 600.0
MOST_SECONDS_TO_ANSWER = 7 * 24 * 3600
THIS_MACHINE = "127.0.0.1"
VERDICT = "engine/verdict"
"""Key of the launcher's store: the exit code of what would fail again if it were started again."""
IMAGES_FOR_A_GPU = 64
_SECONDS_TO_REPORT = 10.0  # how long those who waited in vain wait for each other's reports
_WORDS_OF_A_COLLECTIVE = ("gloo", "nccl", "connection", "peer", "timed out", "timeout")
_MADE = "made"
_RAISED_BY_ALL = {kind.__name__: kind for kind in (ProcessLost, RunFailed, ValueError, Interrupted, TypeError)}
# `Statistics` takes care of the buffers. torch 2.14 gives the argument a new name.
_NEW_NAME, _OLD_NAME = "forward_sync_buffers", "broadcast_buffers"
_KNOWS_NEW_NAME = _NEW_NAME in inspect.signature(DistributedDataParallel).parameters
_BUFFERS_STAY: dict[str, Any] = {_NEW_NAME if _KNOWS_NEW_NAME else _OLD_NAME: False}


def is_launched() -> bool:
    """Whether a launcher started this process as one of several: torchrun, or `engine train --gpus N`."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def is_restarted() -> bool:
    """Whether the launcher started these processes again, after one of them had failed."""
    return is_launched() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def too_few(images: int) -> str:
    """What to do where a GPU has fewer than 64 images of a batch, by launches and not by work bound; else ""."""
    if images >= IMAGES_FOR_A_GPU:
        return ""
    return (
        f"Warning: {images} images a GPU are bound by launches, {IMAGES_FOR_A_GPU} or more are not: take a larger "
        "--batch-size with --lr-scale linear, fewer GPUs, or --seeds for runs side by side"
    )


class World:
    """All processes of a run as one of them sees them. `World()` is a process by itself, for which all is free.

    rank, size: of all; local_rank, local_size: of those on this machine. timeout: seconds to answer in.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        local_size: int = 1,
        timeout: float = SECONDS_TO_ANSWER,
        store: Store | None = None,
    ) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.timeout = timeout
        self._given_store = store
        self._control: dist.ProcessGroup | None = None
        if size > 1:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            assert isinstance(group, dist.ProcessGroup)
            self._control = group
        self._asked: tuple[Tensor, dist.Work] | None = None
        self._meetings = 0
        self._last_beat = 0.0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """The part of every batch that this process has."""
        return Shard(self.rank, self.size, self.local_size)

    @property
    def _store(self) -> Store:
        assert self._given_store is not None
        return self._given_store

    def broadcast_from_main(self, make: Callable[[], Value]) -> Value:
        """What the main process made, on all of them: plain values, sequences, dicts and paths.

        An error there is raised on all of them, and TypeError for what cannot be sent. One without a line for the
        user is on the others a ProcessLost without a message, since the main process tells of it.
        """
        if self.size == 1:
            return make()
        if not self.is_main:
            name, told = json.loads(self._broadcast(b""))
            if name != _MADE:
                raise _RAISED_BY_ALL[name](told)
            received: Value = _decode(told)
            return received
        try:
            made = make()
            message = [_MADE, _encode(made)]
        except Exception as error:
            kind = type(error)
            is_sent = kind in _RAISED_BY_ALL.values() and (kind is not ValueError or errors.is_ours(error))
            message = [kind.__name__, str(error)] if is_sent else [ProcessLost.__name__, ""]
            self._broadcast(json.dumps(message).encode())
            raise
        self._broadcast(json.dumps(message).encode())
        return made

    def _broadcast(self, message: bytes) -> bytes:
        """The main process's message, on all of them."""
        length = torch.tensor(len(message))
        dist.broadcast(length, src=0, group=self._control)
        sent = bytearray(message) if self.is_main else bytearray(int(length))
        dist.broadcast(torch.frombuffer(sent, dtype=torch.uint8), src=0, group=self._control)
        return bytes(sent)

    def gather(self, mine: Tensor) -> Tensor:
        """Every process's tensor, stacked in the order of ranks, on the host."""
        mine = mine.cpu()
        if self.size == 1:
            return mine[None]
        theirs = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(theirs, mine, group=self._control)
        return torch.stack(theirs)

    def sum_in_place(self, tensors: list[Tensor]) -> None:
        """Make each tensor its sum over all processes, by one collective on the device."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def check_same(self, what: str, mine: str) -> None:
        """Raise ValueError where a process has another value than the main one, naming the process."""
        main = self.broadcast_from_main(lambda: mine)
        same = self.gather(torch.tensor(mine == main))
        if not same.all():
            ranks = ", ".join(str(rank) for rank in (~same).nonzero().flatten().tolist())
            raise ValueError(f"{what} of process {ranks} differs from that of process 0")

    def any_of_last_time(self, mine: bool) -> bool:
        """Whether any process said yes the last time all were asked; with one process, whether it says so now.

        The answer comes a call late, so that nobody waits for it.
        """
        if self.size == 1:
            return mine
        before, flag = self._asked, torch.tensor(int(mine))
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._control, async_op=True)
        assert work is not None
        self._asked = (flag, work)
        if before is None:
            return False
        answer, work = before
        work.wait()
        return bool(answer)

    def heartbeat(self) -> None:
        """Show that this process works, while others wait for it in `meet`."""
        now = time.monotonic()
        if self.size > 1 and now - self._last_beat > min(1.0, self.timeout / 10):
            self._last_beat = now
            self._store.set(f"beat/{self.rank}", str(now))

    def check(self, stop: Stop) -> None:
        """Raise Interrupted where any process was asked to stop: for work that is not done in common steps."""
        self.heartbeat()
        if self.size > 1:
            if stop.requested:
                self._store.set("stop", "")
            elif self._store.check(["stop"]):
                stop.requested = True
        stop.check()

    def barrier(self, stop: Stop | None = None) -> None:
        """Wait for all processes, however long each works: one whose heart does not beat is lost.

        Raises ProcessLost, naming it, and Interrupted where a process was asked to stop before it came here.
        """
        if self.size == 1:
            return
        self._meetings += 1
        name = f"meeting/{self._meetings}"
        self._store.set(f"{name}/{self.rank}", "")
        self._store.add(name, 1)
        seen: dict[int, tuple[bytes, float]] = {}
        while self._store.add(name, 0) < self.size:
            for rank in range(self.size):
                if rank == self.rank or self._store.check([f"{name}/{rank}"]):
                    continue
                key = f"beat/{rank}"
                beat = self._store.get(key) if self._store.check([key]) else b""
                now = time.monotonic()
                if seen.get(rank, (None, 0.0))[0] != beat:
                    seen[rank] = (beat, now)
                elif now - seen[rank][1] > self.timeout:
                    raise ProcessLost(_lost([rank], self.size, self.timeout))
            if stop is not None:
                self.check(stop)
            self.heartbeat()
            time.sleep(0.05)

    def leave(self) -> None:
        """End the process groups: the processes have done with each other.

        gloo's threads let go of a collective's tensors a moment after its end, which aborts a process whose
        interpreter is gone by then. With its last reference a group waits for its threads.
        """
        self._asked = self._control = None
        dist.destroy_process_group()

    def replicate(self, student: nn.Module, device: torch.device, *, every_backward: bool) -> nn.Module:
        """The student whose backward averages gradients over all processes, while it is still computing others.

        Its forward is for passes that are trained; attacks and evaluations run the student itself.
        every_backward: none is run `without_reduction`, which torch cannot arrange in advance.
        """
        if self.size == 1:
            return student
        return DistributedDataParallel(
            student,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            static_graph=every_backward,
            **_BUFFERS_STAY,
        )

    @contextmanager
    def watching(self, stop: Stop) -> Iterator[None]:
        """A failed collective inside becomes a ProcessLost that names who did not come."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or isinstance(error, RunFailed) or not _is_of_a_collective(error):
                raise
            silent = self._silent(stop)
            if stop.requested:  # the launcher ends all of them, since one is gone: it has said so
                raise ProcessLost("") from error
            if not silent:
                raise
            raise ProcessLost(_lost(silent, self.size, self.timeout)) from error

    def _silent(self, stop: Stop) -> list[int]:
        """Those who report no failed collective of their own: it is they who were waited for."""
        ranks = set(range(self.size)) - {self.rank}
        try:
            self._store.set(f"waited/{self.rank}", "")
            until = time.monotonic() + _SECONDS_TO_REPORT
            while ranks and time.monotonic() < until and not stop.requested:
                ranks = {rank for rank in ranks if not self._store.check([f"waited/{rank}"])}
                time.sleep(0.1)
        except RuntimeError:  # the store is gone, and with it the launcher
            return []
        return sorted(ranks)


class Statistics:
    """Keeps the running statistics of a student the same on all processes.

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
        """Inside, while the backward runs, they travel; afterwards they are the mean.

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


def without_reduction(replica: nn.Module) -> AbstractContextManager[None]:
    """Inside, gradients of a `World.replicate` are summed on each process alone."""
    return replica.no_sync() if isinstance(replica, DistributedDataParallel) else nullcontext()


@contextmanager
def joined(config: RunConfig, timeout: float = SECONDS_TO_ANSWER) -> Iterator[World]:
    """The world that this process was launched into; `World()` where it was started alone.

    timeout: seconds, 1 to 604,800. What the processes end with is a ValueError, RunFailed or Interrupted, said by
    one of them: the message of the others' errors is empty.
    """
    check_timeout(timeout)
    if not is_launched():
        yield World()
        return
    root, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    # The launcher's store outlives a failure: nobody must find addresses of processes that are gone.
    store = PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} of {size}", root)
    if is_restarted() and root.check([VERDICT]):  # the same would happen again
        raise ValueError("") if root.get(VERDICT) == b"2" else RunFailed("")
    if rank != 0:
        warnings.simplefilter("ignore")  # one process warns for all
    world = None
    try:
        world = _world(config, timeout, store, rank, size)
        yield world
    except Exception as error:
        told = errors.told(error)
        if isinstance(told, Interrupted) and world is not None:
            world.leave()  # all stop together; after an error, leaving could mean to wait
        with suppress(RuntimeError):  # the launcher is gone, and its store: each says it then
            if not isinstance(told, ProcessLost | errors.Unforeseen | Interrupted):
                root.set(VERDICT, "2" if isinstance(told, ValueError) else "1")
            if str(told) and store.add("engine/said", 1) > 1:
                told = type(told)("")
        raise told from None
    world.barrier()
    world.gather(torch.zeros(1))  # without the store, which may live in the main process: it leaves last
    world.leave()


def check_timeout(seconds: float) -> None:
    """Raise ValueError for what is no time to wait."""
    if not 1 <= seconds <= MOST_SECONDS_TO_ANSWER:  # nan too
        raise ValueError(f"--timeout {seconds:g} is not between 1 and {MOST_SECONDS_TO_ANSWER:,} seconds")


def _world(config: RunConfig, timeout: float, store: Store, rank: int, size: int) -> World:
    """Of this process, after it has met the others. Raises ValueError for a device that is not there."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = precision.device(config.device, local_rank)
    uses_gpu = device.type == "cuda"
    if uses_gpu:
        torch.cuda.set_device(device)
    if local_size == size:
        _stay_on_this_machine()
    # The backend's own watch ends a process without a word: it must not be the first to lose patience.
    patience = timedelta(seconds=2 * timeout if uses_gpu else timeout)
    dist.init_process_group(
        "nccl" if uses_gpu else "gloo",
        store=PrefixStore("collectives", store),
        rank=rank,
        world_size=size,
        timeout=patience,
    )
    return World(rank, size, local_rank, local_size, timeout, PrefixStore("engine", store))


def _stay_on_this_machine() -> None:
    """Let gloo and NCCL listen on the loopback interface alone, and look up no name of this machine."""
    there = {name for _, name in socket.if_nameindex()}
    for name in there & {"lo", "lo0"}:  # Linux, macOS
        os.environ |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}


def _is_of_a_collective(error: RuntimeError) -> bool:
    text = str(error).lower()  # gloo has no errors of its own
    return isinstance(error, dist.DistError) or any(word in text for word in _WORDS_OF_A_COLLECTIVE)


def _lost(ranks: list[int], size: int, timeout: float) -> str:
    names = ", ".join(str(rank) for rank in ranks)
    return f"process {names} of 0..{size - 1} did not answer: it hangs (limit {timeout:g} s) or is gone"


def _encode(value: object) -> Any:
    """JSON of what processes tell each other; the type of everything is kept. Raises TypeError for other types."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple) and kind in (list, tuple):
        return {kind.__name__: [_encode(part) for part in value]}
    if isinstance(value, dict) and kind is dict:
        return {"dict": [[_encode(key), _encode(part)] for key, part in value.items()]}
    if isinstance(value, Path):
        return {"Path": str(value)}
    known = "None, bool, int, float, str, list, tuple, dict and Path"
    raise TypeError(f"processes tell each other {known}, not {kind.__name__}")


def _decode(told: Any) -> Any:
    if not isinstance(told, dict):
        return told
    ((kind, value),) = told.items()
    if kind == "Path":
        return Path(value)
    if kind == "dict":
        return {_decode(key): _decode(part) for key, part in value}
    return {"list": list, "tuple": tuple}[kind](_decode(part) for part in value)
