"""Train every method by one protocol, with seeds, attack all, and compare: `python -m bench.accuracy`.

README.md says how.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click
import torch
from rich.console import Console

from bench.lib import command
from bench.lib.accuracy import cells, costs, page
from bench.lib.accuracy import protocol as protocols
from bench.lib.accuracy.cells import NO_SEED, SIZES, STOPPED, ResultFolder
from bench.lib.accuracy.protocol import AccuracyProtocol, Cell
from engine.common.files import write_json

ROOT = Path(__file__).resolve().parents[1]
ACCURACY_WORK = ROOT / "build" / "accuracy"
RESULTS = ROOT / "bench" / "results" / "accuracy"
PROGRAM = (sys.executable, "-m", "bench.lib.accuracy.cells")
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
    """Processes that measure, so many at a time, until a deadline.

    common: the first arguments of `bench.lib.accuracy.cells`. deadline: of time.monotonic, None for none.
    """

    def __init__(
        self,
        common: tuple[str, ...],
        results: ResultFolder,
        work: Path,
        device: str,
        jobs: int,
        deadline: float | None,
    ) -> None:
        self.common, self.results, self.device = common, results, device
        self.work, self.jobs, self.deadline = work, jobs, deadline
        self.running: list[_Process] = []
        self.failed: list[str] = []
        self.longest = 0.0

    def elsewhere(self, results: ResultFolder) -> Workers:
        """The same, that write into another folder of results, and work beside it."""
        return Workers(self.common, results, results.folder.parent / "work", self.device, self.jobs, self.deadline)

    def finished(self, wanted: Sequence[Job]) -> Iterator[str]:
        """Name of each that was measured, as soon as it is; those that are not ready wait for the others."""
        waiting = list(wanted)
        try:
            while waiting or self.running:
                ready = (job for job in list(waiting) if job.is_ready)
                while len(self.running) < self.jobs and not self.is_late and (job := next(ready, None)):
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

    @property
    def is_late(self) -> bool:
        """True if one that takes as long as the longest so far would not end in time."""
        return self.deadline is not None and time.monotonic() + self.longest > self.deadline

    def _started(self, job: Job) -> _Process:
        self.work.mkdir(parents=True, exist_ok=True)
        log = self.work / f"{job.name}.log"
        places = (str(self.results.folder), str(self.work))
        with log.open("ab") as file:
            process = subprocess.Popen(  # noqa: S603  # no shell
                [*PROGRAM, *self.common, *places, self.device, job.row, job.seed],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )
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
@click.option("--table", "tables", multiple=True, help="A table of the protocol; repeatable. [all]")
@click.option("--again", metavar="ROW/SEED", help="Measure one cell anew, and compare it bit for bit.")
@click.option("--budget", type=click.IntRange(min=1), help="Seconds, after which the command ends by itself.")
@click.option("--page", "only_page", is_flag=True, help="Write page and tables of what is there, train nothing.")
@click.option("--costs", "only_costs", is_flag=True, help="Time a step of every row, in turn; train nothing.")
@click.option(
    "--jobs", default=1, show_default=True, type=click.IntRange(min=1), help="Processes at the same time."
)
@click.option("--quick", is_flag=True, help="Tiny sizes, to see that everything works.")
@command.device_option()
@command.out_option("Folder for the results. [bench/results/accuracy/PROTOCOL]")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for what is not kept. [build/accuracy]")
def main(
    name: str,
    tables: Sequence[str],
    again: str | None,
    budget: int | None,
    only_page: bool,
    only_costs: bool,
    jobs: int,
    quick: bool,
    device: torch.device,
    out: Path | None,
    work: Path | None,
) -> None:
    """Measure the cells of a PROTOCOL that are not measured yet: a name in bench/protocols, or a file."""
    deadline = None if budget is None else time.monotonic() + budget
    console = command.new_console()
    with command.refused():
        protocol = protocols.read(name, quick=quick)
        results = ResultFolder((out or RESULTS / protocol.name).resolve())
        scratch = (work or ACCURACY_WORK).resolve() / protocol.name
        workers = Workers((name, SIZES[quick]), results, scratch, str(device), jobs, deadline)
        write_page = partial(page.write, protocol, protocols.path_of(name).read_text(encoding="utf-8"), results)
        if only_costs:
            costs.measure(protocol, results, device, costs.ROUNDS_OF_SIZE[SIZES[quick]], console.print)
        if only_page or only_costs:
            write_page(console)
            return
        with _stopping():
            try:
                if again is None:
                    _measure(protocol, results, workers, tables or None, console, write_page)
                else:
                    _repeat(protocol, results, workers, again, console)
            except KeyboardInterrupt:
                raise click.ClickException("stopped; the same command goes on") from None
    if workers.failed:
        raise click.ClickException("; ".join(workers.failed))


def _measure(
    protocol: AccuracyProtocol,
    results: ResultFolder,
    workers: Workers,
    tables: Sequence[str] | None,
    console: Console,
    write_page: Callable[..., None],
) -> None:
    teachers = results.teachers(list(protocol.teachers))
    missing = [name for name in protocol.teachers if name not in teachers]
    # Of cells whose teachers are not there, nothing can have been measured.
    wanted = list(protocols.cells(protocol, teachers | dict.fromkeys(missing, ""), tables))
    waiting = [cell for cell in wanted if set(missing) & set(cell.teachers) or results.measured(cell) is None]
    console.print(f"{len(wanted) - len(waiting)} of {len(wanted)} cells are measured")
    needed = {section for cell in waiting for section in cell.teachers}
    jobs = [Job(name, name, NO_SEED) for name in missing if name in needed]
    jobs += [_job(cell, results) for cell in waiting]
    left = len(jobs)
    for name in workers.finished(jobs):
        console.print(_line(results, name))
        left -= 1
        try:
            write_page()
        except (OSError, ValueError) as error:  # the other cells are measured all the same
            console.print(f"no page: {error}", markup=False)
    if left > len(workers.failed):
        console.print(f"{left - len(workers.failed)} are left; the same command goes on")
    write_page(console)


def _job(cell: Cell, results: ResultFolder) -> Job:
    return Job(cell.name, cell.row, str(cell.seed), tuple(map(results.teacher, cell.teachers)))


def _line(results: ResultFolder, name: str) -> str:
    """A line on the accuracies of a cell or a teacher."""
    measured = results.read(name)
    assert measured is not None
    accuracies = ", ".join(f"{name} {found.share:.2%}" for name, found in measured.accuracies.items())
    return f"{name}: {accuracies}; {measured.epoch_seconds:.0f} s an epoch"


def _repeat(
    protocol: AccuracyProtocol, results: ResultFolder, workers: Workers, which: str, console: Console
) -> None:
    """Measure a cell in another place, and write what differs. Raises ValueError for a cell that is not there."""
    row, slash, seed = which.partition("/")
    if not slash or not seed.isdecimal():
        raise ValueError(f"--again: ROW/SEED is expected, such as {next(iter(protocol.rows()))}/0, got {which!r}")
    cell = protocols.cell_of(protocol, row, int(seed), results.teachers(list(protocol.teachers)))
    before = results.measured(cell)
    if before is None:
        raise ValueError(f"--again: {results.cell(cell.name)} is not there yet")
    number = next(n for n in itertools.count(1) if not results.again(cell.name, n).exists())
    anew = ResultFolder(workers.work / f"again-{number}" / "results")
    for section in cell.teachers:
        copy = anew.teacher(section)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(results.teacher(section), copy)
    for name in workers.elsewhere(anew).finished([_job(cell, anew)]):
        found = anew.read(name)
        assert found is not None
        differing = cells.differences((before, results.log(name)), (found, anew.log(name)))
        record = {"cell": name, "same_bits": not differing, "differs": differing, "facts": found.facts}
        results.again(name, number).parent.mkdir(parents=True, exist_ok=True)
        write_json(results.again(name, number), record | {"measured_on": before.facts})
        console.print(_line(anew, name))
        console.print(f"differs in {', '.join(differing)}" if differing else "the same, bit for bit")
        if differing:
            workers.failed.append(f"{name} differs from the cell that was measured before")


if __name__ == "__main__":
    main()
