"""Loggers of a run, built in and of users: each gets every row of its metrics, in the main process alone."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.common.lookup import check_registered
from engine.common.stopping import Interrupted
from engine.plugins.builtin_loggers.delivery import SECONDS_TO_OPEN, Delivery, Memory, quiet
from engine.plugins.builtin_loggers.run_facts import History, Status
from engine.plugins.builtin_loggers.table import BUILT_IN, check_installed
from engine.plugins.guests import told

LOGGERS: dict[str, Callable[..., object]] = {}
"""The registered loggers by name."""

RowFunction = Callable[[dict[str, Any]], object]


def known_names() -> tuple[str, ...]:
    """Names of the loggers that are built in, and of those that are registered."""
    return (*BUILT_IN, *LOGGERS)


def check(names: Sequence[str]) -> None:
    """Raise ValueError where there is no logger of one of these names, or its package is not installed."""
    for name in names:
        check_registered("loggers", name, known_names())
        if name in BUILT_IN:
            check_installed(name)


class Loggers:
    """The loggers of a run and its callbacks.

    A logger that raises an exception is told of in one line and not called again: the run goes on. What a callback
    raises ends the call that it was given to. history: of the run, for the loggers that are built in.
    Raises ValueError where a built-in logger's package cannot be imported.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: Path,
        say: Callable[[str], object],
        callbacks: Sequence[RowFunction] = (),
        history: History | None = None,
    ) -> None:
        self._say, self._run, self._callbacks, self._history = say, run, callbacks, history
        self._deliveries: dict[str, Delivery] = {}
        self._open([name for name in dict.fromkeys(names) if name in BUILT_IN])
        self._active = {name: LOGGERS[name] for name in names if name in LOGGERS} | self._deliveries
        for name, delivery in self._deliveries.items():
            self._call(name, delivery.check)

    def _open(self, names: Sequence[str]) -> None:
        """Begin the deliveries to those that are built in, which print what they like meanwhile."""
        with quiet():
            adapters = {name: make() for name in names if (make := BUILT_IN[name].make)}
            if not adapters:
                return
            assert self._history is not None
            memory = Memory(self._run)
            for name, tool in adapters.items():
                self._deliveries[name] = Delivery(name, tool, self._history, memory)
            until = time.monotonic() + SECONDS_TO_OPEN
            for delivery in self._deliveries.values():
                delivery.wait(max(0.0, until - time.monotonic()))

    def __enter__(self) -> Loggers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("finished")
        else:
            self.close("killed" if issubclass(kind, Interrupted | KeyboardInterrupt) else "failed")

    def write(self, row: Mapping[str, Any]) -> None:
        """Give the row, or a copy of its own to each, to all of them."""
        for name, logger in list(self._active.items()):
            self._call(name, logger, copy.deepcopy(dict(row)), **_wanted(logger, run=self._run))
        for callback in self._callbacks:
            callback(copy.deepcopy(dict(row)))

    def cut(self, rows: int) -> None:
        """Tell those that are built in that metrics.jsonl has so many rows left."""
        for name, delivery in self._deliveries.items():
            if name in self._active:
                self._call(name, delivery.cut, rows)

    def close(self, status: Status = "finished") -> None:
        """Call `close` of those that have it; those that want it get how the run ended as `status`."""
        for name, logger in list(self._active.items()):
            if callable(end := getattr(logger, "close", None)):
                self._call(name, end, **_wanted(end, status=status))

    def _call(self, name: str, function: Callable[..., object], *arguments: Any, **keywords: Any) -> None:
        try:
            function(*arguments, **keywords)
        except Exception as error:
            del self._active[name]
            self._say(f"Warning: the logger {name} failed and gets no more rows: {told(error)}")
        if name in self._deliveries:
            for note in self._deliveries[name].notes():
                self._say(note)


def _wanted(function: Callable[..., object], **known: Any) -> dict[str, Any]:
    """Those keywords that the function has a parameter for."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a builtin without a signature
        return {}
    return {key: value for key, value in known.items() if key in parameters}
