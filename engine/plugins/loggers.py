"""Loggers of users: each gets every row of a run's metrics, in the main process alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.common.lookup import check_registered
from engine.plugins.guests import told

LOGGERS: dict[str, Callable[..., object]] = {}
"""The registered loggers by name."""

RowFunction = Callable[[dict[str, Any]], object]


def check(names: Sequence[str]) -> None:
    """Raise ValueError where there is no logger of one of these names."""
    for name in names:
        check_registered("loggers", name, LOGGERS)


class Loggers:
    """The loggers of a run and its callbacks.

    A logger that raises an exception is told of in one line and not called again: the run goes on. What a callback
    raises ends the call that it was given to.
    """

    def __init__(
        self, names: Sequence[str], run: Path, say: Callable[[str], object], callbacks: Sequence[RowFunction] = ()
    ) -> None:
        self._say, self._run, self._callbacks = say, run, callbacks
        self._active = {name: LOGGERS[name] for name in names}

    def write(self, row: Mapping[str, Any]) -> None:
        """Give the row, or a copy of its own to each, to all of them."""
        for name, logger in list(self._active.items()):
            self._call(name, logger, copy.deepcopy(dict(row)), **_wanted(logger, run=self._run))
        for callback in self._callbacks:
            callback(copy.deepcopy(dict(row)))

    def close(self) -> None:
        """Call `close` of those that have it."""
        for name, logger in list(self._active.items()):
            if callable(end := getattr(logger, "close", None)):
                self._call(name, end)

    def _call(self, name: str, function: Callable[..., object], *arguments: Any, **keywords: Any) -> None:
        try:
            function(*arguments, **keywords)
        except Exception as error:
            del self._active[name]
            self._say(f"Warning: the logger {name} failed and gets no more rows: {told(error)}")


def _wanted(function: Callable[..., object], **known: Any) -> dict[str, Any]:
    """Those keywords that the function has a parameter for."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a builtin without a signature
        return {}
    return {key: value for key, value in known.items() if key in parameters}
