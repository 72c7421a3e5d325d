"""Origin of every name that was registered: a file or module, an installed package, or a running program."""

from __future__ import annotations

import hashlib
import re
import secrets
import sys
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Origin:
    """A place where names are registered.

    where: the path of a file, or the name of a module or package. version: its SHA-256, or that of its package's
    version; it differs where the code may. package: an installed one registered them by its entry point.
    """

    where: str
    version: str
    package: str | None = None


REGISTERED: dict[tuple[str, str], Origin] = {}
"""Origins by kind ("method", "model", ...) and name."""

_current: list[tuple[Origin, set[tuple[str, str]]]] = []


@contextmanager
def registering(origin: Origin) -> Iterator[None]:
    """Let names that are registered inside be of that origin."""
    _current.append((origin, set()))
    try:
        yield
    finally:
        _current.pop()


def claim(kind: str, name: str, known: Container[str]) -> Origin:
    """Take a name for the code that is running. known: all names of that kind.

    The same origin may define it again: a file that is read twice, or a cell of a notebook.
    Raises ValueError for what is no name, and for one that is taken.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{kind}: a name of at most 64 letters, digits, '.', '-' and '_' is expected, not beginning with '.' "
            f"or '-', got {name!r:.100}"
        )
    origin = _current[-1][0] if _current else _program()
    before = REGISTERED.get((kind, name))
    if before is None and name in known:
        raise ValueError(f"{kind}: {name!r} is built in; choose another name")
    if before is not None and before.where != origin.where:
        raise ValueError(f"{kind}: {name!r} is registered by {before.where} already; choose another name")
    if _current:
        if (kind, name) in _current[-1][1]:
            raise ValueError(f"{kind}: {origin.where} registers {name!r} twice")
        _current[-1][1].add((kind, name))
    return origin


def _program() -> Origin:
    """The module that called, whose code may be another each time."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("engine.plugins."):
        frame = frame.f_back
    name = str(frame.f_globals.get("__name__", "__main__"))
    return Origin(name, hashlib.sha256(f"{name} {_PROCESS}".encode()).hexdigest())


_PROCESS = secrets.token_hex(16)
