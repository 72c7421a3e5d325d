"""Delivery of a run's rows to a tool, by a thread of its own: the training waits for no server.

The tool shows what metrics.jsonl holds, each row once. loggers.json in the run directory keeps the run's id in the
tool and the number of its rows there. A session begins with what the tool lacks. Rows that are written again after
a resume are compared with those that they replace, and the same ones are not sent again. Where the tool holds a
row that the run does not have any more (after a rollback, or where a resumed run computes other numbers), nothing
there can be taken back: a new run begins in the tool, with all rows, and the former one ends as killed.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from engine.common.files import write_json
from engine.plugins.builtin_loggers import numbers_of
from engine.plugins.builtin_loggers.numbers_of import TIMINGS
from engine.plugins.builtin_loggers.run_facts import History, OpenedRun, Row, Status, Tool

MEMORY = "loggers.json"
SECONDS_TO_OPEN, SECONDS_TO_CLOSE = 10.0, 30.0


class _Known(BaseModel):
    """Memory of a run in a tool; ahead: rows there that the run has yet to write again."""

    place: str
    id: str = Field(pattern=r"^[\w-]{1,64}$")
    rows: int
    number: int = 1
    ahead: list[dict[str, Any]] = []


class Memory:
    """loggers.json of a run directory. Raises ValueError where it is damaged."""

    def __init__(self, run: Path) -> None:
        self._path, self._lock = run / MEMORY, threading.Lock()
        try:
            found = json.loads(self._path.read_bytes()) if self._path.exists() else {}
            self._known = {name: _Known.model_validate(entry) for name, entry in dict(found).items()}
        except (ValueError, TypeError, ValidationError):
            raise ValueError(f"{self._path} is damaged; without it the loggers begin new runs") from None

    def get(self, name: str) -> _Known | None:
        """Return what is known of the run in that tool."""
        return self._known.get(name)

    def put(self, name: str, known: _Known) -> None:
        """Remember it."""
        with self._lock:
            self._known[name] = known
            write_json(self._path, {name: entry.model_dump() for name, entry in self._known.items()})


class Delivery:
    """Rows on their way to a tool. Calls return at once; what went wrong before is raised by the next one."""

    def __init__(self, name: str, tool: Tool, history: History, memory: Memory) -> None:
        self._name, self._tool, self._history, self._memory = name, tool, history, memory
        self._written = history.kept  # rows of metrics.jsonl, counted where they are written
        self._last_step = 0
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._opened, self._error = threading.Event(), list[Exception]()
        self._known: _Known
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Wait for the run in the tool, but not for long: it may open while the training has begun."""
        if not self._opened.wait(seconds):
            self._notes.put(f"The logger {self._name} does not answer yet: the run begins, and its rows wait")

    def check(self) -> None:
        """Raise what went wrong so far."""
        if self._error:
            raise self._error[0]

    def __call__(self, row: Row) -> None:
        """Send the next row of metrics.jsonl."""
        self.check()
        self._written += 1
        number = self._written
        self._tasks.put(lambda: self._send_next(row, number))

    def cut(self, rows: int) -> None:
        """Tell that metrics.jsonl was cut to so many rows, which other ones will follow."""
        self.check()
        self._written = rows
        self._tasks.put(lambda: self._cut(rows))

    def close(self, status: Status) -> None:
        """End the run in the tool. Raises TimeoutError where it does not answer in time."""
        self._tasks.put(lambda: self._close(status))
        self._tasks.put(None)
        seconds = SECONDS_TO_CLOSE if self._opened.is_set() else SECONDS_TO_OPEN
        with quiet():
            self._thread.join(seconds)
        self.check()
        if self._thread.is_alive():
            raise TimeoutError(f"no answer in {seconds:.0f} s; what it lacks is sent when the run goes on")

    def notes(self) -> Iterator[str]:
        """Lines for the user since the last call."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._notes.get_nowait()

    # ------------------------------------------------------------ in the thread

    def _work(self) -> None:
        try:
            self._open()
            self._opened.set()
            while (task := self._tasks.get()) is not None:
                task()
        except BaseException as error:  # SystemExit, too: a thread would end in silence
            self._error.append(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        finally:
            self._opened.set()

    def _open(self) -> None:
        history, place = self._history, self._tool.place(self._history.facts)
        known = self._memory.get(self._name)
        if known is None or known.place != place:
            number = 1 if known is None else known.number + 1
            self._begin(number, history.kept)
            return
        opened = self._tool.open(history.facts, self._title(known.number), known.id)
        self._tell(opened)
        rows = known.rows if opened.rows is None else opened.rows
        before = [*map(dict, history.withdrawn), *known.ahead]
        ahead = before[: max(0, rows - history.kept)]
        self._known = known.model_copy(update={"rows": rows, "ahead": ahead})
        if rows - history.kept > len(ahead):
            self._begin_anew(history.kept)
            return
        self._send_kept(rows, history.kept)
        self._remember()

    def _send_next(self, row: Row, number: int) -> None:
        self._last_step = row["step"]
        if self._known.ahead:
            if _without_clocks(self._known.ahead[0]) != _without_clocks(row):
                self._begin_anew(number - 1)
            else:
                self._known.ahead.pop(0)
                self._remember()
                return
        self._send(row, number)

    def _cut(self, rows: int) -> None:
        if self._known.rows > rows:
            self._begin_anew(rows)

    def _close(self, status: Status) -> None:
        summary = self._history.summary() if status == "finished" else None
        self._tool.close({} if summary is None else numbers_of.results(summary), self._last_step, status)

    def _begin_anew(self, kept: int) -> None:
        self._tool.close({}, self._last_step, "killed")
        self._notes.put(f"The logger {self._name} begins a new run: the former one has rows that this run dropped")
        self._begin(self._known.number + 1, kept)

    def _begin(self, number: int, kept: int) -> None:
        opened = self._tool.open(self._history.facts, self._title(number), None)
        self._tell(opened)
        place = self._tool.place(self._history.facts)
        self._known = _Known(place=place, id=opened.id, rows=0, number=number)
        self._remember()
        self._send_kept(0, kept)

    def _send_kept(self, sent: int, kept: int) -> None:
        for number, row in enumerate(itertools.islice(self._history.rows(), kept), 1):
            if number > sent:
                self._send(row, number)

    def _send(self, row: Row, number: int) -> None:
        self._last_step = row["step"]
        self._tool.log(row, number)
        self._known.rows = number
        self._remember()

    def _remember(self) -> None:
        self._memory.put(self._name, self._known)

    def _tell(self, opened: OpenedRun) -> None:
        self._notes.put(f"Logger {self._name}: {opened.where}")

    def _title(self, number: int) -> str:
        name = self._history.facts.name
        return name if number == 1 else f"{name} ({number})"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what is printed meanwhile: only where this thread itself prints nothing."""
    nothing = io.StringIO()
    with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        yield


def _without_clocks(row: Row) -> str:
    """The row as metrics.jsonl has it, but for what a clock decides."""
    return json.dumps({key: value for key, value in row.items() if key not in TIMINGS})
