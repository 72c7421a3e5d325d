"""Early ends of a run: at the next safe point after a signal, or because it cannot go on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130
"""Exit codes of the command line: a run cannot go on; the user can mend it; all is saved, go on with --resume."""

RELAYED = "ENGINE_RELAYED_SIGNALS"
"""Environment variable of a process whose parent passes on the signals that reach both."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Requests to end: of Ctrl-C, of a cluster, and of a terminal that is closed."""

ECHO_SECONDS = 10.0
"""Time within which a launched process takes a second signal for the first one.

A cluster signals all processes, and the launcher passes the signal on to the others."""


class Interrupted(Exception):  # like KeyboardInterrupt, no error
    """The run was asked to stop; its state is saved. command: goes on, or begins again, as the message says."""

    def __init__(self, message: str = "", command: Sequence[str] = ()) -> None:
        super().__init__(f"{message}: {shlex.join(command)}" if command else message)
        self.message, self.command = message, tuple(command)


class RunFailed(RuntimeError):
    """A run cannot go on: its loss is not finite, or the disk is full. What it had saved is whole."""


class ProcessLost(RunFailed):
    """Another process of the run hangs or is gone. Started again, the run goes on from its last checkpoint."""


class Stop:
    """A flag: the run was asked to stop."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raise Interrupted if the run was asked to stop."""
        if self.requested:
            raise Interrupted


@contextmanager
def graceful_stop(say: Callable[[str], None], *, launched: bool = False) -> Iterator[Stop]:
    """Set the flag of the `Stop` at a signal inside; a second signal raises KeyboardInterrupt.

    say: called with a line at the first signal. launched: True for one of several processes, which get the first
    signal twice, as does a process with `RELAYED` in its environment.
    Outside the main thread signals stay as they are.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    is_relayed = launched or RELAYED in os.environ
    times: list[float] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        times.append(time.monotonic())
        if len(times) == 1:
            stop.requested = True
            say(f"{signal.Signals(number).name}: stopping at the next safe point; once more to stop at once")
        elif not is_relayed or times[-1] - times[0] > ECHO_SECONDS:
            raise KeyboardInterrupt

    with signal_handler(on_signal):
        yield stop


@contextmanager
def signal_handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle `SIGNALS` by that handler inside; SIGHUP stays ignored where the process ignores it, as under nohup.

    A command (`interrupt_on_signals`) that leaves with Interrupted ignores further ones: nothing is left to stop.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, known in before.items():
        if number != signal.SIGHUP or known != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        leaves = isinstance(sys.exc_info()[1], Interrupted)
        for number, known in before.items():
            signal.signal(number, signal.SIG_IGN if leaves and known is _end else known or signal.SIG_DFL)


def interrupt_on_signals() -> None:
    """Raise KeyboardInterrupt at any signal, as Ctrl-C does: for commands."""
    if "LOCAL_RANK" in os.environ:  # one of several: the launcher reports for all that they were ended
        return
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def ignore_signals() -> None:
    """Ignore signals: for a command that ends, whose exit code no further signal may change."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
