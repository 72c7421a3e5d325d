"""How a run ends before its time: asked to by a signal, at the next safe point, or because it cannot go on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130
"""Exit codes of the command line: a run cannot go on; the user can mend it; all is saved, go on with --resume."""

RELAYED = "ENGINE_RELAYED_SIGNALS"
"""Set in the environment of a process whose parent tells it of the signals that it hears itself."""

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
    """SIGINT and SIGTERM set the flag of the `Stop` inside; a second one interrupts at once.

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

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
