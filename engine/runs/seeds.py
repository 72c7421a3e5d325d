"""Runs of one configuration with several seeds, side by side: each an ordinary run with a process of its own."""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from engine.attacks.table import title
from engine.common.console import ConsoleReporter
from engine.common.stopping import (
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    RELAYED,
    Interrupted,
    RunFailed,
    signal_handler,
)
from engine.config import RunConfig, assignments, with_absolute_paths
from engine.plugins import imports
from engine.runs import lifecycle
from engine.runs.run_directory import PreparedRun, RunDir
from engine.system import launcher

MOST = 1000
LOG = "log.txt"
_SECONDS_BETWEEN_LOOKS = 0.1
_STOPPED = (EXIT_INTERRUPTED, -signal.SIGTERM, -signal.SIGINT)  # the signals themselves: before the run heeds them


def parse(text: str) -> tuple[int, ...]:
    """Seeds of `0..7`, `0,3,5`, or a mix, in that order.

    Raises ValueError for what is neither, for a seed given twice, and for more than 1,000 seeds.
    """
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,19})(?:\.\.([0-9]{1,19}))?\s*", part)
        if found is None:
            raise ValueError(
                f"--seeds {text}: {part.strip()!r} is no seed and no range; known: 0..7, 0,3,5, 0..3,8"
            )
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ValueError(f"--seeds {text}: the range {part.strip()} runs backwards")
        if last >= 2**63:
            raise ValueError(f"--seeds {text}: {last} is too large; a seed is below 2**63")
        if len(seeds) + last - first >= MOST:
            raise ValueError(f"--seeds {text}: more than {MOST:,} seeds")
        seeds += range(first, last + 1)
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise ValueError(f"--seeds {text}: {twice[0]} is given twice")
    return tuple(seeds)


def slots(count: int, *, gpus: bool) -> list[dict[str, str]]:
    """Environment of each process of those that run at once: one GPU, and its share of the cores."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // count))
    shared = {RELAYED: "1"}
    if count > 1 and "OMP_NUM_THREADS" not in os.environ:
        shared["OMP_NUM_THREADS"] = threads
    if not gpus:
        return [dict(shared) for _ in range(count)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(count)] if visible is None else visible.split(",")[:count]
    return [shared | {"CUDA_VISIBLE_DEVICES": name.strip()} for name in names]


@dataclass(eq=False)
class _SeedRun:
    seed: int
    begun: PreparedRun | None = None
    began: float = 0.0
    code: int | None = None  # None: not ended

    @property
    def log(self) -> Path:
        return self.path / LOG

    @property
    def path(self) -> Path:
        """Its directory, once it has begun."""
        assert self.begun is not None
        return self.begun.run.path

    def begin(self, config: RunConfig, say: Callable[[str], None], *, again: bool) -> None:
        """Find or make the run directory. Raises ValueError as `lifecycle.begin` does."""
        out = None if config.out is None else str(Path(config.out) / f"seed-{self.seed}")
        mine = with_absolute_paths(config.model_copy(update={"seed": self.seed, "out": out}))
        found = RunDir.find(mine, finished=True) if again else None
        self.begun = found or lifecycle.begin(mine, say=say)

    def start(self, config: RunConfig, environment: Mapping[str, str], profile: int) -> subprocess.Popen[bytes]:
        """The process that trains it; what it prints goes to the log."""
        assert self.begun is not None
        self.began = time.monotonic()
        changes = assignments(self.begun.changes)
        command = launcher.command(
            "train", "--resume", str(self.path), "--profile", str(profile), *imports.arguments(config), *changes
        )
        with self.log.open("ab") as log:
            return subprocess.Popen(  # noqa: S603  # this program
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,  # Ctrl-C on the terminal reaches it once, from here
            )

    def why(self) -> str:
        """One line: how a failed process ended."""
        assert self.code is not None
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"exit code {self.code}: {last.removeprefix('engine: ')}"

    def summary(self) -> dict[str, Any] | None:
        """summary.json of a finished run."""
        return None if self.begun is None else self.begun.run.read_summary()

    def remove_if_unused(self) -> None:
        """Remove what failed before it began, with its log."""
        if self.begun is not None:
            self.begun.remove_if_unused(LOG)


def train(
    config: RunConfig,
    seeds: Sequence[int],
    places: Sequence[Mapping[str, str]],
    reporter: ConsoleReporter,
    *,
    again: bool = False,
    profile: int = 0,
) -> None:
    """Train a configuration once with each seed, as many at a time as there are places (`slots`), and compare.

    The runs are those of `engine train --seed N`, in `out`/seed-N or below runs/. again: each goes on where it was
    stopped, and finished ones are not run again. A failure does not stop the others.
    Raises ValueError where runs failed by what the user can mend, RunFailed where one failed otherwise, and
    Interrupted after a signal, when all are saved.
    """
    runs = [_SeedRun(seed) for seed in seeds]
    heard = launcher.SignalFlags()
    with signal_handler(heard.handle):
        _train_all(runs, config, list(places), reporter, heard, again=again, profile=profile)
    finished = {run.seed: found for run in runs if run.code == 0 and (found := run.summary()) is not None}
    if finished:
        for which in ("best", "last"):
            reporter.table(table(finished, which))
    if heard.received or any(run.code in _STOPPED for run in runs):
        raise Interrupted(
            f"interrupted, all saved; {len(finished)} of {len(runs)} runs are finished; to continue: the same "
            "command with --resume auto"
        )
    if failed := [run for run in runs if run.code != 0]:
        error = ValueError if all(run.code == EXIT_USER_ERROR for run in failed) else RunFailed
        names = ", ".join(str(run.seed) for run in failed)
        raise error(f"{len(failed)} of {len(runs)} runs failed: seed {names}; --resume auto runs these again")


def _train_all(
    runs: Sequence[_SeedRun],
    config: RunConfig,
    free: list[Mapping[str, str]],
    reporter: ConsoleReporter,
    heard: launcher.SignalFlags,
    *,
    again: bool,
    profile: int,
) -> None:
    waiting = list(runs)
    at_work: dict[_SeedRun, tuple[subprocess.Popen[bytes], Mapping[str, str]]] = {}
    while at_work or (waiting and not heard.received):
        while free and waiting and not heard.received:
            run = waiting.pop(0)
            process = _start(run, config, free[0], reporter, again=again, profile=profile)
            if process is not None:
                at_work[run] = process, free.pop(0)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        if heard.pending:
            heard.pending = False
            reporter.message(f"Stopping {len(at_work)} runs at their next safe point")
            for process, _ in at_work.values():
                process.send_signal(signal.SIGTERM)
        for run, (process, environment) in list(at_work.items()):
            if process.poll() is not None:
                del at_work[run]
                free.append(environment)
                run.code = process.returncode
                _tell(run, reporter)


def _start(
    run: _SeedRun,
    config: RunConfig,
    environment: Mapping[str, str],
    reporter: ConsoleReporter,
    *,
    again: bool,
    profile: int,
) -> subprocess.Popen[bytes] | None:
    """The process of a run; None where it is finished already, or cannot begin."""
    try:
        run.begin(config, lambda line: reporter.message(f"seed {run.seed}: {line}"), again=again)
        if run.summary() is not None:
            run.code = 0
            reporter.message(f"seed {run.seed}: finished before, {run.path}")
            return None
        process = run.start(config, environment, profile)
    except (ValueError, OSError) as error:
        run.code = EXIT_USER_ERROR
        run.remove_if_unused()
        reporter.message(f"seed {run.seed}: failed: {' '.join(str(error).split())}")
        return None
    gpu = environment.get("CUDA_VISIBLE_DEVICES")
    reporter.message(f"seed {run.seed}: begins{'' if gpu is None else f' on GPU {gpu}'}, {run.log}")
    return process


def _tell(run: _SeedRun, reporter: ConsoleReporter) -> None:
    """Report how a process ended."""
    seconds = f"{time.monotonic() - run.began:,.0f} s"
    if run.code == 0:
        summary = run.summary()
        assert summary is not None
        numbers = (f"{name} {value:.2%}" for name, value in accuracies(summary, "best").items())
        reporter.message(f"seed {run.seed}: ended after {seconds}, best epoch: {', '.join(numbers)}")
    elif run.code in _STOPPED:
        reporter.message(f"seed {run.seed}: stopped after {seconds}")
    else:
        reporter.message(f"seed {run.seed}: failed after {seconds}, {run.why()}")
        run.remove_if_unused()


def accuracies(summary: Mapping[str, Any], which: str) -> dict[str, float]:
    """Accuracies of the "best" or "last" epoch, by attack: on test images, else on held-out ones."""
    if tested := summary.get(f"test_of_{which}"):
        return {title(name, result): result["accuracy"] for name, result in tested.items()}
    row = summary[which]
    held_out = f"on {row['measured_on']} images"
    return {f"{name} {held_out}": row[f"{name}_accuracy"] for name in ("natural", "robust")}


def _mean(values: Sequence[float]) -> str:
    spread = f" +- {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2%}{spread}"


def table(summaries: Mapping[int, Mapping[str, Any]], which: str) -> Table:
    """Accuracies of the "best" or "last" epoch by seed, and their mean and sample standard deviation (n - 1)."""
    rows = {seed: accuracies(summary, which) for seed, summary in summaries.items()}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    result = Table("seed", "epoch", *names, title=f"{which} epoch", title_justify="left", box=box.SIMPLE)
    for seed, row in rows.items():
        result.add_row(
            str(seed),
            str(summaries[seed][which]["epoch"]),
            *(f"{row[name]:.2%}" if name in row else "" for name in names),
        )
    columns = [[row[name] for row in rows.values() if name in row] for name in names]
    # An attack that was added where gradients were masked has no mean over the seeds.
    means = (_mean(column) if len(column) == len(rows) else "" for column in columns)
    result.add_row(f"mean{' +- std' if len(rows) > 1 else ''}, n = {len(rows)}", "", *means)
    return result
