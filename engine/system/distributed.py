"""The processes of a run: their ranks, messages and barriers, and the detection of those that are lost.

torch.distributed carries it all: NCCL between GPUs, gloo between CPUs. Messages and barriers go over gloo in any
case, so that none waits for a GPU.
"""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from engine.common import errors
from engine.common.stopping import Interrupted, ProcessLost, RunFailed, Stop
from engine.config import RunConfig
from engine.pipelines.sampling import Shard
from engine.system import precision

Value = TypeVar("Value")

DEFAULT_TIMEOUT = 600.0
MAX_TIMEOUT = 7 * 24 * 3600
LOOPBACK = "127.0.0.1"
FINAL_EXIT_CODE = "engine/final_exit_code"
"""Key of the launcher's store: the exit code of an error that a restart would meet again."""
MIN_IMAGES_PER_GPU = 64
_SECONDS_TO_REPORT = 10.0  # for processes whose collective failed, to report it to each other
_COLLECTIVE_ERROR_WORDS = ("gloo", "nccl", "connection", "peer", "timed out", "timeout")
_OK = "ok"
_SENT_ERRORS = {kind.__name__: kind for kind in (ProcessLost, RunFailed, ValueError, Interrupted, TypeError)}


def is_launched() -> bool:
    """True where a launcher started this process as one of several: torchrun, or `engine train --gpus N`."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def is_restarted() -> bool:
    """True where the launcher started these processes again, after one of them had failed."""
    return is_launched() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def small_batch_warning(images: int) -> str:
    """Advice where a GPU has fewer than 64 images of a batch and is bound by launches; "" where it has more."""
    if images >= MIN_IMAGES_PER_GPU:
        return ""
    return (
        f"Warning: {images} images a GPU are bound by launches, {MIN_IMAGES_PER_GPU} or more are not: take a "
        "larger --batch-size with --lr-scale linear, fewer GPUs, or --seeds for runs side by side"
    )


class World:
    """All processes of a run, seen from one of them. `World()` is a process by itself, and its calls cost nothing.

    rank, size: among all; local_rank, local_size: among those on this machine. timeout: seconds to answer in.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        local_size: int = 1,
        timeout: float = DEFAULT_TIMEOUT,
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
        self._pending: tuple[Tensor, dist.Work] | None = None
        self._barriers = 0
        self._last_heartbeat = 0.0

    @property
    def is_main(self) -> bool:
        """True for the process that writes files and prints."""
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
        """Call `make` in the main process and return its value in all: plain values, sequences, dicts and paths.

        An error in `make` is raised in all of them, as is TypeError for a value that cannot be sent. An unexpected
        error is in the others a ProcessLost without a message: the main process reports it.
        """
        if self.size == 1:
            return make()
        if not self.is_main:
            name, content = json.loads(self._broadcast(b""))
            if name != _OK:
                raise _SENT_ERRORS[name](content)
            received: Value = _decode(content)
            return received
        try:
            made = make()
            message = [_OK, _encode(made)]
        except Exception as error:
            kind = type(error)
            is_sent = kind in _SENT_ERRORS.values() and (kind is not ValueError or errors.raised_by_engine(error))
            message = [kind.__name__, str(error)] if is_sent else [ProcessLost.__name__, ""]
            self._broadcast(json.dumps(message).encode())
            raise
        self._broadcast(json.dumps(message).encode())
        return made

    def _broadcast(self, message: bytes) -> bytes:
        """The message of the main process, in all of them."""
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

    def max_in_place(self, tensor: Tensor) -> None:
        """Make each entry the largest of all processes, by one collective on the device."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)

    def check_same(self, what: str, mine: str) -> None:
        """Raise ValueError, naming them, where processes have another value than the main one."""
        main = self.broadcast_from_main(lambda: mine)
        same = self.gather(torch.tensor(mine == main))
        if not same.all():
            ranks = ", ".join(str(rank) for rank in (~same).nonzero().flatten().tolist())
            raise ValueError(f"{what} of process {ranks} differs from that of process 0")

    def delayed_any(self, mine: bool) -> bool:
        """Any of the processes' flags at the call before; with one process, the flag itself.

        The result comes a call late, so that no process waits for it. False at the first call.
        """
        if self.size == 1:
            return mine
        before, flag = self._pending, torch.tensor(int(mine))
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._control, async_op=True)
        assert work is not None
        self._pending = (flag, work)
        if before is None:
            return False
        answer, work = before
        work.wait()
        return bool(answer)

    def heartbeat(self) -> None:
        """Show that this process works, while others wait for it in `barrier`."""
        now = time.monotonic()
        if self.size > 1 and now - self._last_heartbeat > min(1.0, self.timeout / 10):
            self._last_heartbeat = now
            self._store.set(f"heartbeat/{self.rank}", str(now))

    def check(self, stop: Stop) -> None:
        """Raise Interrupted where any process was asked to stop. For work that the processes do not do in step."""
        self.heartbeat()
        if self.size > 1:
            if stop.requested:
                self._store.set("stop", "")
            elif self._store.check(["stop"]):
                stop.requested = True
        stop.check()

    def barrier(self, stop: Stop | None = None) -> None:
        """Wait for all processes, however long each works, as long as each sends its heartbeat.

        Raises ProcessLost, naming the process that sends none, and Interrupted where a process was asked to stop
        before it came here.
        """
        if self.size == 1:
            return
        self._barriers += 1
        name = f"barrier/{self._barriers}"
        self._store.set(f"{name}/{self.rank}", "")
        self._store.add(name, 1)
        seen: dict[int, tuple[bytes, float]] = {}
        while self._store.add(name, 0) < self.size:
            for rank in range(self.size):
                if rank == self.rank or self._store.check([f"{name}/{rank}"]):
                    continue
                key = f"heartbeat/{rank}"
                heartbeat = self._store.get(key) if self._store.check([key]) else b""
                now = time.monotonic()
                if seen.get(rank, (None, 0.0))[0] != heartbeat:
                    seen[rank] = (heartbeat, now)
                elif now - seen[rank][1] > self.timeout:
                    raise ProcessLost(_lost_message([rank], self.size, self.timeout))
            if stop is not None:
                self.check(stop)
            self.heartbeat()
            time.sleep(0.05)

    def leave(self) -> None:
        """Destroy the process groups.

        gloo's threads release a collective's tensors a moment after its end, which aborts a process whose
        interpreter is gone by then. A group waits for its threads as its last reference is dropped.
        """
        self._pending = self._control = None
        dist.destroy_process_group()

    @contextmanager
    def collective_errors(self, stop: Stop) -> Iterator[None]:
        """Turn a failed collective inside into a ProcessLost that names the processes that did not answer."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or isinstance(error, RunFailed) or not _is_collective_error(error):
                raise
            silent = self._unresponsive(stop)
            if stop.requested:  # the launcher ends all of them, since one is gone, and has reported it
                raise ProcessLost("") from error
            if not silent:
                raise
            raise ProcessLost(_lost_message(silent, self.size, self.timeout)) from error

    def _unresponsive(self, stop: Stop) -> list[int]:
        """Ranks that report no failed collective of their own: the others waited for them."""
        ranks = set(range(self.size)) - {self.rank}
        try:
            self._store.set(f"timed-out/{self.rank}", "")
            until = time.monotonic() + _SECONDS_TO_REPORT
            while ranks and time.monotonic() < until and not stop.requested:
                ranks = {rank for rank in ranks if not self._store.check([f"timed-out/{rank}"])}
                time.sleep(0.1)
        except RuntimeError:  # the store is gone, and with it the launcher
            return []
        return sorted(ranks)


@contextmanager
def joined(config: RunConfig, timeout: float = DEFAULT_TIMEOUT) -> Iterator[World]:
    """Context with the world that this process was launched into; `World()` where it was started alone.

    timeout: seconds, 1 to 604,800. All processes end with the same ValueError, RunFailed or Interrupted, and one
    has its message: that of the others is empty.
    """
    check_timeout(timeout)
    if not is_launched():
        yield World()
        return
    root, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    # The launcher's store outlives a failure: a new start must not find addresses of processes that are gone.
    store = PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} of {size}", root)
    if is_restarted() and root.check([FINAL_EXIT_CODE]):  # the same would happen again
        raise ValueError("") if root.get(FINAL_EXIT_CODE) == b"2" else RunFailed("")
    if rank != 0:
        warnings.simplefilter("ignore")  # one process warns for all
    world = None
    try:
        world = _init_world(config, timeout, store, rank, size)
        yield world
    except Exception as error:
        ending = errors.as_user_error(error)
        if isinstance(ending, Interrupted) and world is not None:
            world.leave()  # all stop together; after an error, leaving could mean to wait
        with suppress(RuntimeError):  # the launcher is gone, and its store: each process reports the error then
            if not isinstance(ending, ProcessLost | errors.UnexpectedError | Interrupted):
                root.set(FINAL_EXIT_CODE, "2" if isinstance(ending, ValueError) else "1")
            if str(ending) and store.add("engine/reported", 1) > 1:
                ending = type(ending)("")
        raise ending from None
    world.barrier()
    world.gather(torch.zeros(1))  # not by the store, which may be in the main process: that one leaves last
    world.leave()


def check_timeout(seconds: float) -> None:
    """Raise ValueError for a timeout that is not between 1 and 604,800 seconds."""
    if not 1 <= seconds <= MAX_TIMEOUT:  # nan too
        raise ValueError(f"--timeout {seconds:g} is not between 1 and {MAX_TIMEOUT:,} seconds")


def _init_world(config: RunConfig, timeout: float, store: Store, rank: int, size: int) -> World:
    """The world of this process, once all have joined. Raises ValueError for a device that is not there."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = precision.device(config.device, local_rank)
    uses_gpu = device.type == "cuda"
    if uses_gpu:
        torch.cuda.set_device(device)
    if local_size == size:
        _use_loopback()
    # NCCL's watchdog ends a process without an error: the timeout of gloo must expire before it.
    backend_timeout = timedelta(seconds=2 * timeout if uses_gpu else timeout)
    dist.init_process_group(
        "nccl" if uses_gpu else "gloo",
        store=PrefixStore("collectives", store),
        rank=rank,
        world_size=size,
        timeout=backend_timeout,
    )
    return World(rank, size, local_rank, local_size, timeout, PrefixStore("engine", store))


def _use_loopback() -> None:
    """Let gloo and NCCL listen on the loopback interface alone, and look up no name of this machine."""
    there = {name for _, name in socket.if_nameindex()}
    for name in there & {"lo", "lo0"}:  # Linux, macOS
        os.environ |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}


def _is_collective_error(error: RuntimeError) -> bool:
    text = str(error).lower()  # gloo has no errors of its own
    return isinstance(error, dist.DistError) or any(word in text for word in _COLLECTIVE_ERROR_WORDS)


def _lost_message(ranks: list[int], size: int, timeout: float) -> str:
    names = ", ".join(str(rank) for rank in ranks)
    return f"process {names} of 0..{size - 1} did not answer: it hangs (limit {timeout:g} s) or is gone"


def _encode(value: object) -> Any:
    """JSON of a message between processes, with the types of its values. Raises TypeError for other types."""
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


def _decode(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    ((kind, value),) = content.items()
    if kind == "Path":
        return Path(value)
    if kind == "dict":
        return {_decode(key): _decode(part) for key, part in value}
    return {"list": list, "tuple": tuple}[kind](_decode(part) for part in value)
