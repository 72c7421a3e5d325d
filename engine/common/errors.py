"""Exceptions that end a command, each as one line for the user; what nobody foresaw leaves its trace in a file."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shlex
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType

from engine import __version__
from engine.common.files import cache_dir
from engine.common.stopping import Interrupted, RunFailed

MOST_TRACES = 20
"""Traces that a folder keeps: the newest."""

_PREFIX = "engine-trace-"
_MENDABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.ELOOP, errno.EINVAL, errno.EFBIG, errno.ENXIO,
)  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class Unforeseen(RunFailed):
    """Ended by what nobody foresaw. Started again, the run may come further."""


def told(error: Exception) -> ValueError | RunFailed | Interrupted:
    """The exception as one that has a line for the user, itself where it is one.

    ValueErrors are, where this package raised them; of files and folders, those of permissions, names and room.
    Everything else becomes an Unforeseen with the path of its saved trace.
    """
    if isinstance(error, RunFailed | Interrupted) or (isinstance(error, ValueError) and is_ours(error)):
        return error
    if isinstance(error, OSError) and error.errno in (*_MENDABLE, *_FULL):
        line = ": ".join(printable(part) for part in (error.filename, error.strerror) if part)
        if error.errno in _FULL:
            return RunFailed(line)
        if error.filename:
            return ValueError(line)
    return Unforeseen(unforeseen(error))


def unforeseen(error: BaseException) -> str:
    """The line of an exception that nobody foresaw; its trace is saved. With ENGINE_DEBUG it is printed too."""
    if os.environ.get("ENGINE_DEBUG"):
        traceback.print_exception(error)
    path = _save(error)
    if path is None:
        hint = "its trace could not be saved; ENGINE_DEBUG=1 shows it"
    else:
        hint = f"please report it with its trace, {path}"
    return f"unforeseen {_short(error)}{_place(error)}; {hint}"


@contextmanager
def told_of_threads(say: Callable[[str], object]) -> Iterator[None]:
    """Exceptions that end a thread, or that nobody can catch, are told in one line each inside."""

    def of_thread(ending: threading.ExceptHookArgs) -> None:
        if ending.exc_value is not None and not isinstance(ending.exc_value, SystemExit):
            say(unforeseen(ending.exc_value))

    def of_nobody(ending: sys.UnraisableHookArgs) -> None:
        if ending.exc_value is not None and not isinstance(ending.exc_value, KeyboardInterrupt):
            say(unforeseen(ending.exc_value))

    before = threading.excepthook, sys.unraisablehook
    threading.excepthook, sys.unraisablehook = of_thread, of_nobody
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = before


def printable(text: object) -> str:
    """Text in one line, of characters that a terminal shows and does not obey."""
    line = " ".join(os.fsdecode(text).split() if isinstance(text, bytes) else str(text).split())
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)


def _short(error: BaseException) -> str:
    try:
        text = printable(error)
    except Exception:  # its own __str__ fails
        text = ""
    return f"{type(error).__name__}{': ' if text else ''}{text:.300}"


def _frames(error: BaseException) -> Iterator[tuple[str, int]]:
    """Module and line of each frame, the outermost first."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_globals.get("__name__", ""), trace.tb_lineno
        trace = trace.tb_next


def is_ours(error: Exception) -> bool:
    """Whether this package raised it on purpose: that of another one says nothing of what the user gave."""
    raised_in = next(reversed(list(_frames(error))), ("engine", 0))[0]
    return type(error) is ValueError and raised_in.partition(".")[0] == "engine"


def _place(error: BaseException) -> str:
    """Where in this package it was raised, or what of another one was called."""
    ours = [(module, line) for module, line in _frames(error) if module.partition(".")[0] == "engine"]
    return f" ({ours[-1][0]}, line {ours[-1][1]})" if ours else ""


def _save(error: BaseException) -> Path | None:
    """The file of its trace, in the user's cache or else in the system's temporary folder; None: nowhere."""
    with contextlib.suppress(Exception):
        return _save_in(cache_dir() / "traces", error)
    with contextlib.suppress(Exception):
        return _save_in(Path(tempfile.gettempdir()), error)
    return None


def _save_in(folder: Path, error: BaseException) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now()
    number, name = tempfile.mkstemp(".txt", f"{_PREFIX}{now:%Y%m%d-%H%M%S}-", folder)
    torch = sys.modules.get("torch")
    head = (
        f"{now.isoformat(timespec='seconds')}  engine {__version__}, Python {platform.python_version()}, "
        f"torch {getattr(torch, '__version__', 'not imported')}, {platform.platform()}\n"
        f"{shlex.join(sys.argv)}\n\n"
    )
    try:
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(head + "".join(traceback.format_exception(error)))
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    for old in sorted(folder.glob(f"{_PREFIX}*.txt"))[:-MOST_TRACES]:
        with contextlib.suppress(OSError):
            old.unlink()
    return Path(name)
