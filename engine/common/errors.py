"""Exceptions that end a command, each as one line for the user; the trace of an unexpected one goes to a file."""

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
_USER_ERRNOS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.ELOOP, errno.EINVAL, errno.EFBIG, errno.ENXIO,
)  # fmt: skip
_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class UnexpectedError(RunFailed):
    """A run ended by an unexpected exception. Started again, it may come further."""


def as_user_error(error: Exception) -> ValueError | RunFailed | Interrupted:
    """The exception as one that has a line for the user, itself where it is one.

    Those are ValueErrors that this package raised, and OSErrors of permissions, names and room.
    Everything else becomes an UnexpectedError with the path of its saved trace.
    """
    if isinstance(error, RunFailed | Interrupted) or (isinstance(error, ValueError) and raised_by_engine(error)):
        return error
    if isinstance(error, OSError) and error.errno in (*_USER_ERRNOS, *_DISK_ERRNOS):
        line = ": ".join(printable(part) for part in (error.filename, error.strerror) if part)
        if error.errno in _DISK_ERRNOS:
            return RunFailed(line)
        if error.filename:
            return ValueError(line)
    return UnexpectedError(describe_unexpected(error))


def describe_unexpected(error: BaseException) -> str:
    """One line about an unexpected exception, whose trace is saved, and with ENGINE_DEBUG printed, too."""
    if os.environ.get("ENGINE_DEBUG"):
        traceback.print_exception(error)
    path = _save(error)
    if path is None:
        hint = "its trace could not be saved; ENGINE_DEBUG=1 shows it"
    else:
        hint = f"please report it with its trace, {path}"
    return f"unforeseen {_short(error)}{_location(error)}; {hint}"


@contextmanager
def report_thread_errors(say: Callable[[str], object]) -> Iterator[None]:
    """Report each exception inside that ends a thread, or that no code can catch, in one line."""

    def in_thread(ending: threading.ExceptHookArgs) -> None:
        if ending.exc_value is not None and not isinstance(ending.exc_value, SystemExit):
            say(describe_unexpected(ending.exc_value))

    def uncatchable(ending: sys.UnraisableHookArgs) -> None:
        if ending.exc_value is not None and not isinstance(ending.exc_value, KeyboardInterrupt):
            say(describe_unexpected(ending.exc_value))

    before = threading.excepthook, sys.unraisablehook
    threading.excepthook, sys.unraisablehook = in_thread, uncatchable
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = before


def printable(text: object) -> str:
    """The text in one line without control characters: those are escaped."""
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


def raised_by_engine(error: Exception) -> bool:
    """True for a ValueError of this package: that of another one says nothing about what the user gave."""
    raised_in = next(reversed(list(_frames(error))), ("engine", 0))[0]
    return type(error) is ValueError and raised_in.partition(".")[0] == "engine"


def _location(error: BaseException) -> str:
    """Line of this package that raised it, or called the other package that did."""
    ours = [(module, line) for module, line in _frames(error) if module.partition(".")[0] == "engine"]
    return f" ({ours[-1][0]}, line {ours[-1][1]})" if ours else ""


def _save(error: BaseException) -> Path | None:
    """Write the trace to the user's cache, else to the temporary folder; None where neither is writable."""
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
