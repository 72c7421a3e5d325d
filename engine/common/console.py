"""Messages and progress of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

SECONDS_BETWEEN_LINES = 15


class Reporter:
    """Receiver of a run's messages and progress. This one drops them: for runs that are started from Python."""

    def message(self, text: str) -> None:
        """Print one line."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Start a task of `total` steps, or go on with one."""

    def step(self, row: Mapping[str, Any]) -> None:
        """Report a log interval of training."""

    def advance(self, done: int) -> None:
        """Report that so many steps of the task are done."""

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        """Report an epoch that is trained and evaluated."""

    def end(self) -> None:
        """End the task."""

    def part_progress(self, doing: str) -> Callable[[str, int, int], None]:
        """Callback for a part of the data ("train" or "test"), its images done, and all its images."""
        current = ""

        def progress(part: str, done: int, total: int) -> None:
            nonlocal current
            if part != current:
                current = part
                self.begin(f"{doing} {part} images", total)
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
    """Reporter on standard output. share_of_peak: print speed as a fraction of the device's peak, too."""

    def __init__(self, *, share_of_peak: bool = False) -> None:
        self.console = Console(markup=False, emoji=False, highlight=False)  # names of files are shown as they are
        if not self.console.is_terminal:  # a pipe has no width: nothing may be folded or cut for one
            self.console.width = 240
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._what, self._total, self._said, self._accuracies = "", 0, 0.0, ""
        self._share_of_peak = share_of_peak

    def message(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def table(self, table: Table) -> None:
        """Show a table."""
        self.console.print(table)

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self.end()
        self._what, self._total, self._said, self._accuracies = what, total, time.monotonic(), ""
        if not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}", markup=False),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
        )
        self._task = self._bar.add_task(what, total=total, completed=done, status="")
        self._bar.start()

    def step(self, row: Mapping[str, Any]) -> None:
        status = f"loss {row['loss']:.4f}  {self._speed(row)}{self._accuracies}"
        if self._bar is not None:
            self._bar.update(self._task, status=status)
        else:
            self._print_at_intervals(f"{row['step']}/{self._total}  epoch {row['epoch']}  {status}")

    def advance(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        else:
            self._print_at_intervals(f"{done}/{self._total}")

    def _print_at_intervals(self, text: str) -> None:
        """Print a line if the last one is old enough: in a log file, which needs none for each step."""
        if time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self.message(f"{self._what}: {text}")

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        alpha = f"  alpha {row['alpha']:.3f}" if "alpha" in row else ""
        self._accuracies = f"  natural {row['natural_accuracy']:.2%}  robust {row['robust_accuracy']:.2%}"
        self.message(
            f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f}{alpha}{self._accuracies}"
            f"  ({row['seconds']:.0f} s, {self._speed(row)})"
        )

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _speed(self, row: Mapping[str, Any]) -> str:
        share = f", {row['share_of_peak']:.0%} of peak" if self._share_of_peak else ""
        return f"{row['images_per_second']:.0f} images/s{share}"
