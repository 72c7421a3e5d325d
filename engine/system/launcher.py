"""Several processes of one command on this machine: started, watched, and started again where one fails."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from torch._C._distributed_c10d import TCPStore

import engine
from engine.common.stopping import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR, signal_handler
from engine.system import precision
from engine.system.distributed import FINAL_EXIT_CODE, LOOPBACK

MAX_PROCESSES = 1024
MAX_RESTARTS = 3
SECONDS_TO_SAVE = 120
"""Time between a signal and SIGKILL: enough for a step and a checkpoint."""
SECONDS_TO_END = 30
"""The same after one of them has failed: enough for a checkpoint that is being written."""
_POLL_SECONDS = 0.05
_PREFIX = "engine: "


def count(gpus: int | None, processes: int | None, device: str) -> int:
    """Processes to launch for `--gpus` or `--procs`; 0 where neither is given.

    Raises ValueError for GPUs that are not there, for too many processes, and for what excludes each other.
    """
    if gpus is not None and processes is not None:
        raise ValueError("--gpus and --procs exclude each other: GPUs have a process each")
    if gpus is not None:
        there = precision.count_gpus()
        if gpus > there:
            raise ValueError(f"--gpus {gpus}: this machine has {there} CUDA GPU{'s' * (there != 1)}")
        if device not in ("auto", "cuda"):
            raise ValueError(f"--gpus {gpus} and --device {device} exclude each other")
    if processes is not None and (device.startswith("cuda") or (device == "auto" and precision.count_gpus())):
        raise ValueError(f"--procs {processes} is for CPUs: add --device cpu, or use --gpus {processes}")
    if processes is not None and processes > MAX_PROCESSES:
        raise ValueError(f"--procs {processes}: at most {MAX_PROCESSES}")
    return gpus or processes or 0


def command(*arguments: str) -> list[str]:
    """Command line of this engine, which no Python file of the current folder can replace."""
    return [sys.executable, str(Path(engine.__file__).with_name("__main__.py")), *arguments]


def launch(processes: int, command: Sequence[str], logs: Path | None, *, max_restarts: int = MAX_RESTARTS) -> int:
    """Run a command in so many processes, all again where one fails. Returns the exit code for all of them.

    The first process has the terminal of this one. The output of the others goes to files below logs, and their
    standard error to the terminal, too.
    """
    store, signals = _loopback_store(), SignalFlags()
    with signal_handler(signals.handle):
        for restarts in range(max_restarts + 1):
            environments = [_environment(rank, processes, store.port, restarts) for rank in range(processes)]
            group = _Group(command, environments, None if logs is None else _new_folder(logs))
            group.wait(signals)
            code = _final_code(group, store, signals)
            if code is not None:
                return code
            again = f"starting all again, {restarts + 1} of {max_restarts} times"
            _say(f"{group.failure}; {again if restarts < max_restarts else f'given up after {restarts} restarts'}")
    return EXIT_FAILED


class SignalFlags:
    """received: True once a signal came. pending: True until the last one is passed on."""

    def __init__(self) -> None:
        self.received = False
        self.pending = False

    def handle(self, number: int, frame: object) -> None:
        """Handler of signals: note one."""
        self.received = self.pending = True


class _Group:
    """The processes of one start. first: rank of the one that failed first."""

    def __init__(self, command: Sequence[str], environments: Sequence[dict[str, str]], logs: Path | None) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._readers: list[threading.Thread] = []
        self.first: int | None = None
        try:
            for rank, environment in enumerate(environments):
                self._start(rank, command, environment, None if logs is None else logs / f"process-{rank}.log")
        except BaseException:
            self._kill()
            raise

    def _start(self, rank: int, command: Sequence[str], environment: dict[str, str], log: Path | None) -> None:
        output = subprocess.PIPE if rank else None
        process = subprocess.Popen(  # noqa: S603  # this program
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,  # signals of the terminal reach it once, from here
        )
        self._processes.append(process)
        for stream, mark in ((process.stdout, ""), (process.stderr, f"[{rank}] ")):
            if stream is not None:
                self._readers.append(threading.Thread(target=_copy_output, args=(stream, log, mark), daemon=True))
                self._readers[-1].start()

    @property
    def codes(self) -> list[int | None]:
        """Exit codes, those of signals negative."""
        return [process.poll() for process in self._processes]

    @property
    def failure(self) -> str:
        """Name of the process that failed first, and its signal or exit code."""
        assert self.first is not None
        code = self._processes[self.first].returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"process {self.first} of 0..{len(self._processes) - 1} {how}"

    def wait(self, signals: SignalFlags) -> None:
        """Wait for the end of all; a signal, or the failure of one of them, ends them."""
        until = math.inf
        try:
            while self._any_running() and time.monotonic() < until:
                if self.first is not None and until == math.inf:
                    # All stop together where one was interrupted; a second signal would interrupt their saving.
                    stopping = self._processes[self.first].returncode == EXIT_INTERRUPTED
                    until = time.monotonic() + (SECONDS_TO_SAVE if stopping else SECONDS_TO_END)
                    if not stopping:
                        self._terminate()
                if signals.pending:
                    signals.pending = False
                    until = min(until, time.monotonic() + SECONDS_TO_SAVE)
                    self._terminate()
                time.sleep(_POLL_SECONDS)
        finally:
            self._kill()
        self._any_running()

    def _any_running(self) -> bool:
        codes = self.codes
        if self.first is None and any(codes):
            # Of several that ended since the last poll, the one that was killed is why the others ended.
            _, self.first = min((code, rank) for rank, code in enumerate(codes) if code)
        return None in codes

    def _terminate(self) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGTERM)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for reader in self._readers:
            reader.join(timeout=1)  # what they started may hold their output open


def _loopback_store() -> TCPStore:
    """Store by which the processes find each other, served on the loopback address alone."""
    listening = socket.create_server((LOOPBACK, 0))
    port = listening.getsockname()[1]
    return TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def _environment(rank: int, size: int, port: int, restarts: int) -> dict[str, str]:
    """Environment of a process: that of this one, and the variables of torchrun."""
    # Cores are shared: torch would give all of them to each process.
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // size))}
    torchrun = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": restarts,
    }
    return threads | os.environ | {name: str(value) for name, value in torchrun.items()}


def _new_folder(logs: Path) -> Path:
    """Folder of a start: 1, 2, ... below logs. It is made when something is printed."""
    number = 1
    while (logs / str(number)).exists():
        number += 1
    return logs / str(number)


def _copy_output(stream: IO[bytes], log: Path | None, mark: str) -> None:
    """Copy the output of a process to a file, and to the terminal where there is a mark to put before its lines.

    A line with `_PREFIX` goes to the terminal alone: one process prints it for all.
    """
    for line in stream:
        text = line.decode(errors="replace")
        if mark:
            _print(text if text.startswith(_PREFIX) else mark + text)
        if log is not None and not text.startswith(_PREFIX):
            with suppress(OSError):  # a full disk: the process must not wait for its reader
                log.parent.mkdir(parents=True, exist_ok=True)
                with log.open("ab") as file:
                    file.write(line)


def _final_code(group: _Group, store: TCPStore, signals: SignalFlags) -> int | None:
    """Exit code for all processes; None where a restart may help."""
    if group.first is None:
        return 0
    if store.check([FINAL_EXIT_CODE]):
        return int(store.get(FINAL_EXIT_CODE))
    if EXIT_USER_ERROR in group.codes:
        return EXIT_USER_ERROR
    if group.codes[group.first] == EXIT_INTERRUPTED:  # later ones: ended from here
        return EXIT_INTERRUPTED
    if signals.received:
        _say("interrupted; what was saved before is whole")
        return EXIT_INTERRUPTED
    return None


def _say(message: str) -> None:
    _print(f"{_PREFIX}{message}\n")


def _print(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
