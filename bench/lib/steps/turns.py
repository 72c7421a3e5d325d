"""Steps of several processes that take turns: one process gives the orders, the others wait and obey.

An order is a line with a number of steps, an answer a line in JSON with the seconds of a step and the peak memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from bench.lib.memory import Meter
from bench.lib.timing import Call, SynchronisedClock, no_garbage_collection

PATIENCE = 60
"""Seconds for a process to end by itself."""


class Turns:
    """The side that obeys: its orders come from standard input."""

    def __init__(self, answers: TextIO, device: torch.device, meter: Meter) -> None:
        self._answers, self._clock, self._meter = answers, SynchronisedClock(device), meter

    def tell(self, **what: Any) -> None:
        """Send an answer."""
        self._answers.write(json.dumps(what) + "\n")
        self._answers.flush()

    def orders(self, **beside: Any) -> Iterator[int]:
        """Number of steps of each order, which are done and timed when the next one is asked for.

        beside: goes into every answer.
        """
        for line in sys.stdin:
            count = int(line)
            with no_garbage_collection():
                self._clock.wait()
                start = time.perf_counter()
                yield count
                self._clock.wait()
                seconds = (time.perf_counter() - start) / count
            self.tell(seconds=seconds, peak_mib=self._meter.peak(), **beside)

    def obey(self, step: Call) -> None:
        """Run steps as they are ordered, until no order comes any more."""
        for count in self.orders():
            for _ in range(count):
                step()


@dataclass(frozen=True)
class PeerRound:
    """Answer to an order. seconds: of a step, the mean. peak_mib: so far. told: anything else."""

    seconds: float
    peak_mib: float
    told: Mapping[str, Any]


class PeerProcess:
    """The side that orders: a process, from its start to its end.

    first: what it told when it was ready. Raises ChildProcessError, one line, where it ends before it should.
    """

    def __init__(
        self, module: str, order: Mapping[str, Any], folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._log = folder / "log.txt"
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(  # noqa: S603  # no shell
                [sys.executable, "-m", module, json.dumps(dict(order))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=None if environment is None else dict(environment),
                text=True,
                encoding="utf-8",
            )
        try:
            self.first = self._answer()
        except BaseException:
            self.close()
            raise

    def steps(self, count: int) -> PeerRound:
        """Run so many steps."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{count}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildProcessError(self._end()) from None
        answer = self._answer()
        return PeerRound(answer.pop("seconds"), answer.pop("peak_mib"), answer)

    def close(self) -> None:
        """End the process: by itself, or killed where it does not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError(self._end())
        found: dict[str, Any] = json.loads(line)
        return found

    def _end(self) -> str:
        """The last line that it wrote, and its exit code."""
        self.close()
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return f"its process ended with exit code {self._process.returncode}: {last}"
