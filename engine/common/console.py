"""Messages and progress of a run: a progress bar on a terminal and in a notebook, plain lines elsewhere."""

from __future__ import annotations

import html
import importlib
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engine.common.numbers import duration, percent
from engine.common.wrapping import fitted, wrapped, wrapped_command

SECONDS_BETWEEN_LINES = 15
_PIPE_COLUMNS, _NOTEBOOK_COLUMNS = 240, 100
_SHORTEST_BAR, _LONGEST_BAR = 5, 40
_SECONDS_BETWEEN_UPDATES = 0.25  # of a notebook's output


class Reporter:
    """Receiver of a run's messages and progress. This one drops them: for runs that are started from Python."""

    role = ""
    """The network that is trained, "student" or a teacher's name; empty where none is."""

    @contextmanager
    def speaking_of(self, role: str) -> Iterator[None]:
        """Context in which everything is said of that network."""
        before, self.role = self.role, role
        try:
            yield
        finally:
            self.role = before

    def message(self, text: str) -> None:
        """Print one line."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Start a task of `total` steps, or go on with one.

        what: parts between commas, of which a narrow terminal shows the first ones.
        """

    def at_epoch(self, epoch: int, epochs: int) -> None:
        """Tell in which epoch of how many, counted from 1, the task is."""

    def step(self, row: Mapping[str, Any]) -> None:
        """Report a log interval of training."""

    def advance(self, done: int) -> None:
        """Report that so many steps of the task are done."""

    def doing(self, text: str, *, is_uneven: bool = False) -> None:
        """Tell in a few words what the task is at; empty: nothing in particular.

        is_uneven: what is left may take much longer than what is done, and nothing is said of its end.
        """

    def epoch(self, row: Mapping[str, Any], epochs: int, measured: str) -> None:
        """Report an epoch that is trained and evaluated. measured: its accuracies, with what they are of."""

    def end(self) -> None:
        """End the task."""

    def part_progress(self, doing: str) -> Callable[[str, int, int], None]:
        """Callback for a part of the data ("train" or "test"), its images done, and all its images."""
        progress = self.task_progress()
        return lambda part, done, total: progress(f"{doing} {part} images", done, total)

    def task_progress(self) -> Callable[[str, int, int], None]:
        """Callback for tasks in turn: what is done, its steps done, and all its steps."""
        current = ""

        def progress(what: str, done: int, total: int) -> None:
            nonlocal current
            if what != current:
                current = what
                self.begin(what, total)
            self.advance(done)

        return progress

    def notes(self, notes: Sequence[str]) -> None:
        """Report what the user should know."""
        for note in notes:
            self.message(f"Note: {note}")

    def skipped(self, part: str, names: Sequence[str]) -> None:
        """Report the images of a part that were left out, if any."""
        if names:
            more = ", ..." if len(names) > 3 else ""
            self.message(f"Skipped: {len(names):,} unreadable {part} images: {', '.join(names[:3])}{more}")


class ConsoleReporter(Reporter):
    """Reporter on standard output.

    share_of_peak: print speed as a share of the device's measured one, too. console: another one than that of
    standard output.
    """

    def __init__(self, *, share_of_peak: bool = False, console: Console | None = None) -> None:
        # Names of files are shown as they are. In a notebook lines are printed: its own displays are not text.
        plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "force_jupyter": False}
        self.console = console or Console(**plain)
        self._in_notebook = console is None and in_notebook()
        if self._in_notebook:
            self.console.width = _NOTEBOOK_COLUMNS
        elif not self.console.is_terminal:  # a pipe has no width: nothing may be folded or cut for one
            self.console.width = _PIPE_COLUMNS
        self._task = _Task("", "", 0, 0)
        self._bar: _Bar | None = None
        self._said = 0.0
        self._share_of_peak = share_of_peak

    @property
    def _width(self) -> int | None:
        """Cells of a line; None where lines have no end."""
        return self.console.width if self.console.is_terminal or self._in_notebook else None

    def message(self, text: str) -> None:
        told = f"{self.role}: {text}" if self.role else text
        self.verbatim(told if self._width is None else "\n".join(wrapped(told, self._width)))

    def verbatim(self, text: str) -> None:
        """Print a text whose lines stay as they are, for other programs to read."""
        self.console.print(text, soft_wrap=True)

    def command(self, words: Sequence[str]) -> None:
        """Print a command that can be run as it stands."""
        self.verbatim("\n".join(wrapped_command(words, self._width)))

    def table(self, table: Table) -> None:
        """Show a table, or its rows as lines where the terminal is too narrow for one."""
        found = fitted(table, self.console)
        if isinstance(found, Table):
            self.console.print(found)
        else:
            self.verbatim("\n".join(found))

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self.end()
        self._task, self._said = _Task(self.role, what, total, done), time.monotonic()
        if self._in_notebook:
            self._bar = _NotebookBar(self._task)
        elif self.console.is_terminal and not self.console.is_dumb_terminal:
            task, console = self._task, self.console
            self._bar = Live(console=console, get_renderable=lambda: task.line(console.width))
            self._bar.start(refresh=True)

    def at_epoch(self, epoch: int, epochs: int) -> None:
        self._show("epoch", f"epoch {epoch:,}/{epochs:,}")

    def step(self, row: Mapping[str, Any]) -> None:
        self._show("loss", f"loss {row['loss']:.4f}")
        self._show("speed", self._speed(row))
        self._refresh()

    def advance(self, done: int) -> None:
        self._task.done = done
        self._refresh()

    def doing(self, text: str, *, is_uneven: bool = False) -> None:
        self._show("doing", text)
        self._task.is_uneven = is_uneven
        self._refresh()

    def epoch(self, row: Mapping[str, Any], epochs: int, measured: str) -> None:
        alpha = f", alpha {row['alpha']:.3f}" if "alpha" in row else ""
        left = self._task.left()
        after = f", about {duration(left)} left" if left else ""
        self._show("measured", measured)
        self.message(
            f"epoch {row['epoch']:,}/{epochs:,}: loss {row['loss']:.4f}{alpha}, {measured} "
            f"({duration(row['seconds'])}, {self._speed(row)}{after})"
        )

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, column: str, text: str) -> None:
        self._task.told[column] = text

    def _refresh(self) -> None:
        """Show the task as it is: in a log file, which needs no line for each step, if the last one is old."""
        if isinstance(self._bar, _NotebookBar):
            self._bar.refresh()
        elif self._bar is None and time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self.message(self._task.text())

    def _speed(self, row: Mapping[str, Any]) -> str:
        speed = f"{row['images_per_second']:,.0f} images/s"
        if not self._share_of_peak:
            return speed
        return f"{speed}, {percent(row['share_of_peak'])} of the device's measured matrix-product speed"


def usual_reporter() -> Reporter:
    """The reporter of a call from Python that names none: it speaks in a notebook alone."""
    return ConsoleReporter() if in_notebook() else Reporter()


def in_notebook() -> bool:
    """True in the kernel of a notebook: Jupyter, VS Code, Colab."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


class _Bar(Protocol):
    """A line that shows a task until it is stopped."""

    def stop(self) -> None:
        """Leave the line as it is."""


class _Task:
    """Progress of a task, and a line about it. told: texts by column."""

    _COLUMNS = (
        *("role", "epoch", "what", "left", "count", "doing", "bar"),
        *("loss", "speed", "measured", "more", "elapsed"),
    )
    """In the order in which a narrow terminal goes without them: the last first."""
    _SHOWN = (
        "role",
        "what",
        "more",
        "epoch",
        "bar",
        "count",
        "doing",
        "loss",
        "speed",
        "measured",
        "elapsed",
        "left",
    )
    """The same, from left to right."""

    def __init__(self, role: str, what: str, total: int, done: int) -> None:
        first, _, more = what.partition(", ")
        self._what, self._first, self._begin = what, done, time.monotonic()
        self.total, self.done, self.is_uneven = total, done, False
        self.told = {"role": role, "what": "" if role else first, "more": what if role else more}

    def left(self) -> float | None:
        """Seconds until the end, if the rest is as fast as what was done here; None where that is not known."""
        here = self.done - self._first
        if here <= 0 or self.is_uneven:
            return None
        return (time.monotonic() - self._begin) * (self.total - self.done) / here

    def text(self) -> str:
        """All of it in one line for a log file, whose reader is told the role."""
        told = self._texts()
        columns = ("epoch", "count", "doing", "loss", "speed", "measured", "left")
        return f"{self._what}: {', '.join(told[column] for column in columns if told.get(column))}"

    def line(self, width: int) -> RenderableType:
        """All of it that fits into one line of a terminal."""
        texts = self._texts() | {"bar": " " * _SHORTEST_BAR}
        chosen: dict[str, str] = {}
        for column in self._COLUMNS:
            if texts.get(column) and _width_of([*chosen.values(), texts[column]]) <= width:
                chosen[column] = texts[column]
        spare = max(width - _width_of(list(chosen.values())), 0)
        grid = Table.grid(padding=(0, 1))
        cells: list[RenderableType] = []
        for column in (each for each in self._SHOWN if each in chosen):
            size = cell_len(chosen[column])
            if column == "bar":
                size = min(size + spare, _LONGEST_BAR)
                cells.append(ProgressBar(total=max(self.total, 1), completed=self.done, width=size))
            else:
                cells.append(Text(chosen[column]))
            grid.add_column(width=size, no_wrap=True)
        grid.add_row(*cells)
        return grid

    def _texts(self) -> dict[str, str]:
        left = self.left()
        return self.told | {
            "count": f"{self.done:,}/{self.total:,}",
            "elapsed": duration(time.monotonic() - self._begin),
            "left": "" if left is None else f"ETA {duration(left)}",
        }


def _width_of(texts: Sequence[str]) -> int:
    return sum(map(cell_len, texts)) + len(texts) - 1


class _NotebookBar:
    """A task's line as an output of a notebook's cell, which is replaced as it changes."""

    def __init__(self, task: _Task) -> None:
        self._task, self._updated = task, time.monotonic()
        display = importlib.import_module("IPython.display").display
        self._handle = display(self._content(), raw=True, display_id=True)

    def refresh(self) -> None:
        """Show the task as it is, if the last time is long enough ago."""
        if time.monotonic() - self._updated > _SECONDS_BETWEEN_UPDATES:
            self.stop()

    def stop(self) -> None:
        self._updated = time.monotonic()
        self._handle.update(self._content(), raw=True)

    def _content(self) -> dict[str, str]:
        """The line in the forms that a notebook may show."""
        text = io.StringIO()
        console = Console(file=text, width=_NOTEBOOK_COLUMNS, force_jupyter=False, color_system=None)
        console.print(self._task.line(_NOTEBOOK_COLUMNS))
        line = text.getvalue().rstrip()
        return {"text/plain": line, "text/html": f"<pre>{html.escape(line)}</pre>"}
