"""Calls of users' functions: whatever they raise becomes one line that names them and their place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from engine.common.errors import printable, raised_by_engine
from engine.common.stopping import Interrupted, RunFailed

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")

_NOT_THEIRS = ("engine", "torch", "importlib")


def named(what: str, function: Callable[Arguments, Value]) -> Callable[Arguments, Value]:
    """The function, whose exceptions are ValueErrors of one line that begins with those words.

    Those by which a run ends in order, and of memory, are passed on.
    """

    @functools.wraps(function, updated=())
    def call(*arguments: Arguments.args, **keywords: Arguments.kwargs) -> Value:
        try:
            return function(*arguments, **keywords)
        except (Interrupted, RunFailed, MemoryError):
            raise
        except Exception as error:
            # torch's, by its name: a command that lists names never imports torch.
            if type(error).__name__ == "OutOfMemoryError":
                raise
            raise ValueError(f"{what}: {told(error)}") from error

    return call


def told(error: BaseException) -> str:
    """One line of an exception: its class, its message and the line of the user's file."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({Path(error.filename or '').name}, line {error.lineno})"
    if isinstance(error, Exception) and raised_by_engine(error):
        return printable(error)
    place, trace = "", error.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] not in _NOT_THEIRS:
            place = f" ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {printable(error):.300}{place}"
