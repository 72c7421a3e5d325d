"""Standard output and standard error whose faults (closed, full disk, reader gone) end no command."""

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


class GuardedStream:
    """A standard stream that drops text it cannot write, because its reader has left or its disk is full.

    fault: reason of the last loss; "" where nothing was lost, None where the reader has left.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.fault: str | None = "" if stream is not None else "it is closed"
        self._stream = stream or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        if isinstance(self._stream, TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace")  # letters that a terminal does not have

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        with self._dropping():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what is buffered."""
        with self._dropping():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.fault = None if error.errno == errno.EPIPE else error.strerror or str(error)
            with suppress(OSError, ValueError):  # the buffered text is flushed later, to this
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextmanager
def guarded() -> Iterator[None]:
    """Make standard output and error `GuardedStream`s inside. No other file gets the numbers of closed ones."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    before = sys.stdout, sys.stderr
    ours = tuple(GuardedStream(stream) for stream in before)
    sys.stdout, sys.stderr = cast(tuple[TextIO, TextIO], ours)
    try:
        yield
    finally:
        for stream in ours:
            stream.flush()
        sys.stdout, sys.stderr = before


def check_stdout() -> None:
    """Raise RunFailed where some of standard output was lost: for commands that make nothing else."""
    sys.stdout.flush()
    fault = getattr(sys.stdout, "fault", "")
    if fault != "":
        raise RunFailed(f"standard output: {fault}" if fault else "")
