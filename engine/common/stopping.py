"""How a run ends before its time: asked to by a signal, at the next safe point, or because it cannot go on."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130
"""Exit codes of the command line: a run cannot go on; the user can mend it; all is saved, go on with --resume."""

RELAYED = "ENGINE_RELAYED_SIGNALS"
"""Set in the environment of a process whose parent tells it of the signals that it hears itself."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks a process to end: Ctrl-C, a cluster, and a terminal that is closed."""

SECONDS_OF_ECHO = 10.0
"""How long after a signal a launched process takes another for the same one.

A cluster tells all processes, and the launcher among them tells the others again."""


class Interrupted(Exception):  # like KeyboardInterrupt, no error
    """The run was asked to stop; its state is saved."""


class RunFailed(RuntimeError):
    """A run cannot go on: its loss is not finite, or the disk is full. What it had saved is whole."""


class ProcessLost(RunFailed):
    """Another process of the run hangs or is gone. Started again, the run goes on from its last checkpoint."""


class Stop:
    """Whether the run was asked to stop."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raise Interrupted if the run was asked to stop."""
        if self.requested:
            raise Interrupted


@contextmanager
def graceful_stop(say: Callable[[str], None], *, launched: bool = False) -> Iterator[Stop]:
    """Signals set the flag of the `Stop` inside; a second one interrupts at once.

    say: tells the user that the first one was heard. launched: as one of several, which hear the first one twice;
    so does a process with `RELAYED` in its environment.
    Outside the main thread signals stay as they are.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    hears_twice = launched or RELAYED in os.environ
    heard: list[float] = []

    def ask(number: int, frame: FrameType | None) -> None:
        heard.append(time.monotonic())
        if len(heard) == 1:
            stop.requested = True
            say(f"{signal.Signals(number).name}: stopping at the next safe point; once more to stop at once")
        elif not hears_twice or heard[-1] - heard[0] > SECONDS_OF_ECHO:
            raise KeyboardInterrupt

    with hearing(ask):
        yield stop


@contextmanager
def hearing(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, signals are heard by that handler; one that the process ignores, as SIGHUP under nohup, stays so.

    A command (`heed_signals`) that leaves with Interrupted has nothing left to stop: it hears no more of them.
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


def heed_signals() -> None:
    """For a command: any signal ends it as Ctrl-C does, by KeyboardInterrupt."""
    if "LOCAL_RANK" in os.environ:  # one of several: the launcher says for all that they were ended
        return
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def ignore_signals() -> None:
    """For a command that is on its way out: a further signal must not change its exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
