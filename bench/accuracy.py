"""Train every method by one protocol, with seeds, attack all, and compare: `python -m bench.accuracy`.

README.md says how.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from rich.console import Console

from bench.lib import command
from bench.lib.accuracy import protocol as protocols
from bench.lib.accuracy.cells import NO_SEED, STOPPED, MeasuredCell, Results
from bench.lib.accuracy.protocol import Protocol

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "accuracy"
RESULTS = ROOT / "bench" / "results" / "accuracy"
LOOK_EVERY = 0.5  # seconds between looks at the processes
TO_STOP = 60  # seconds that a process has to save what it has


@dataclass(frozen=True)
class Job:
    """A cell or a teacher to be measured: the last two arguments of `bench.lib.accuracy.cells`.

    needs: the weights of teachers, files that have to be there.
    """

    name: str
    row: str
    seed: str
    needs: tuple[Path, ...] = ()

    @property
    def is_ready(self) -> bool:
        """True if all that it needs is there."""
        return all(path.exists() for path in self.needs)


@dataclass(frozen=True)
class _Process:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    began: float = field(default_factory=time.monotonic)


class Workers:
    """Processes that measure, so many at a time, until a deadline. deadline: of time.monotonic, None for none."""

    def __init__(
        self, protocol: str, results: Results, work: Path, device: str, jobs: int, deadline: float | None
    ) -> None:
        self.common = (protocol, str(results.folder), str(work), device)
        self.work, self.jobs, self.deadline = work, jobs, deadline
        self.running: list[_Process] = []
        self.failed: list[str] = []
        self.longest = 0.0

    def finished(self, wanted: Sequence[Job]) -> Iterator[str]:
        """Name of each that was measured, as soon as it is; those that are not ready wait for the others."""
        waiting = list(wanted)
        try:
            while waiting or self.running:
                ready = (job for job in list(waiting) if job.is_ready)
                while len(self.running) < self.jobs and not self._is_late() and (job := next(ready, None)):
                    waiting.remove(job)
                    self.running.append(self._started(job))
                if not self.running:
                    return
                time.sleep(LOOK_EVERY)
                if self.deadline is not None and time.monotonic() > self.deadline:
                    return
                yield from self._ended()
        finally:
            self.stop()

    def _is_late(self) -> bool:
        """True if one that takes as long as the longest so far would not end in time."""
        return self.deadline is not None and time.monotonic() + self.longest > self.deadline

    def _started(self, job: Job) -> _Process:
        self.work.mkdir(parents=True, exist_ok=True)
        log = self.work / f"{job.name}.log"
        command = [sys.executable, "-m", "bench.lib.accuracy.cells", *self.common, job.row, job.seed]
        with log.open("ab") as file:
            process = subprocess.Popen(  # noqa: S603  # no shell
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                start_new_session=True,
            )  # fmt: skip
        return _Process(job, process, log)

    def _ended(self) -> Iterator[str]:
        for running in list(self.running):
            code = running.process.poll()
            if code is None:
                continue
            self.running.remove(running)
            if code == 0:
                self.longest = max(self.longest, time.monotonic() - running.began)
                yield running.job.name
            elif code != STOPPED:
                self.failed.append(f"{running.job.name}: {_last_line(running.log) or f'exit code {code}'}")

    def stop(self) -> None:
        """Let every process save what it has, and end it."""
        for running in self.running:
            with suppress(ProcessLookupError):
                os.kill(running.process.pid, signal.SIGTERM)
        end = time.monotonic() + TO_STOP
        for running in self.running:
            try:
                running.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
        self.running.clear()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


@contextmanager
def _stopping() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# many parameters: one for each option
@command.command
@click.argument("name", metavar="PROTOCOL", default="cpu")
@click.option("--table", "tables", multiple=True, help="Tables of the protocol; repeatable. [all]")
@click.option("--again", metavar="ROW/SEED", help="Measure one cell anew, and compare it bit for bit.")
@click.option("--budget", type=click.IntRange(min=1), help="Seconds, after which the command ends by itself.")
@click.option(
    "--jobs", default=1, show_default=True, type=click.IntRange(min=1), help="Processes at the same time."
)
@command.device_option()
@command.out_option("Folder for the results. [bench/results/accuracy/PROTOCOL]")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for what is not kept. [build/accuracy]")
def main(
    name: str,
    tables: Sequence[str],
    again: str | None,
    budget: int | None,
    jobs: int,
    device: torch.device,
    out: Path | None,
    work: Path | None,
) -> None:
    """Measure the cells of a PROTOCOL that are not measured yet: a name in bench/protocols, or a file."""
    deadline = None if budget is None else time.monotonic() + budget
    console = command.new_console()
    with command.refused():
        protocol = protocols.read(name)
        results = Results((out or RESULTS / protocol.name).resolve())
        workers = Workers(name, results, (work or WORK).resolve() / protocol.name, str(device), jobs, deadline)
        with _stopping():
            try:
                _measure(protocol, results, workers, console)
            except KeyboardInterrupt:
                raise click.ClickException("stopped; the same command goes on") from None
    if workers.failed:
        raise click.ClickException("; ".join(workers.failed))


def _measure(protocol: Protocol, results: Results, workers: Workers, console: Console) -> None:
    teachers = results.teachers(list(protocol.teachers))
    missing = [name for name in protocol.teachers if name not in teachers]
    # Of cells whose teachers are not there, nothing can have been measured.
    wanted = list(protocols.cells(protocol, teachers | dict.fromkeys(missing, "")))
    waiting = [cell for cell in wanted if set(missing) & set(cell.teachers) or results.measured(cell) is None]
    console.print(f"{len(wanted) - len(waiting)} of {len(wanted)} cells are measured")
    jobs = [Job(name, name, NO_SEED) for name in missing]
    for cell in waiting:
        needs = tuple(results.teacher(section) for section in cell.teachers)
        jobs.append(Job(cell.name, cell.row, str(cell.seed), needs))
    for name in workers.finished(jobs):
        _tell(console, results.read(name))


def _tell(console: Console, measured: MeasuredCell | None) -> None:
    """Print a line on a cell."""
    assert measured is not None
    accuracies = ", ".join(f"{name} {found.share:.2%}" for name, found in measured.accuracies.items())
    of = measured.row if measured.seed is None else f"{measured.row}, seed {measured.seed}"
    console.print(f"{of}: {accuracies}; {measured.epoch_seconds:.0f} s an epoch")


if __name__ == "__main__":
    main()
