"""Standard output and standard error that end no command, whatever becomes of them."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO, cast

from engine.common.stopping import RunFailed


class Stream:
    """A standard stream of which is lost what cannot be written: its reader has left, its disk is full.

    fault: why something was lost; "" where nothing was, None where its reader has left.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.fault: str | None = "" if stream is not None else "it is closed"
        self._stream = stream or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        if isinstance(self._stream, TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace")  # letters that a terminal does not have

    def write(self, text: str) -> int:
        """Write, or lose it."""
        with self._losing():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or lose what is not flushed."""
        with self._losing():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.fault = None if error.errno == errno.EPIPE else error.strerror or str(error)
            with suppress(OSError, ValueError):  # what is still buffered must have somewhere to go
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextmanager
def kept() -> Iterator[None]:
    """Standard output and error are `Stream`s inside; where they were closed, no other file gets their numbers."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    before = sys.stdout, sys.stderr
    ours = tuple(Stream(stream) for stream in before)
    sys.stdout, sys.stderr = cast(tuple[TextIO, TextIO], ours)
    try:
        yield
    finally:
        for stream in ours:
            stream.flush()
        sys.stdout, sys.stderr = before


def check_shown() -> None:
    """Raise RunFailed where standard output was lost: for commands that make nothing else."""
    sys.stdout.flush()
    fault = getattr(sys.stdout, "fault", "")
    if fault != "":
        raise RunFailed(f"standard output: {fault}" if fault else "")
