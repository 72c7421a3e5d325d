"""Groups of runs of one configuration with several seeds: each an ordinary run with a process of its own.

A group is a directory that holds the run directories seed-0, seed-1, ...; nothing else marks it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
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
from engine.common.files import seeds_in
from engine.common.stopping import (
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    RELAYED,
    Interrupted,
    RunFailed,
    signal_handler,
)
from engine.config import RunConfig, Tree, assignments, differences, differing, with_absolute_paths
from engine.plugins import imports
from engine.runs import lifecycle, resuming, teachers
from engine.runs.assemble import teacher_sections
from engine.runs.run_directory import PreparedRun, RunDir, new_folder, usable
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
    config: RunConfig
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

    @property
    def has_begun(self) -> bool:
        """True unless it has failed before anything was written: the mended command can be given again then."""
        failed = self.code not in (None, 0, *_STOPPED)
        return not failed or (self.begun is not None and not self.begun.is_unused)

    def begin(self, say: Callable[[str], None], *, again: bool) -> None:
        """Find or make the run directory. Raises ValueError as `lifecycle.begin` does."""
        self.begun = lifecycle.begin(self.config, again=again, say=say)

    def start(self, environment: Mapping[str, str], profile: int) -> subprocess.Popen[bytes]:
        """The process that trains it; what it prints goes to the log."""
        assert self.begun is not None
        self.began = time.monotonic()
        changes = assignments(self.begun.changes)
        command = launcher.command(
            "train",
            "--resume",
            str(self.path),
            "--profile",
            str(profile),
            *imports.arguments(self.config),
            *changes,
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

    def result(self) -> dict[str, Any] | None:
        """summary.json of a run that has all its epochs."""
        return None if self.begun is None else self.begun.run.result(self.config)


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

    The runs are those of `engine train --seed N`, in seed-N of the group `out`, or of a new group below runs/. All
    directories are made before the first run is trained: `resume` knows of all. again: each goes on where it was
    stopped, without `out` in the latest such group below runs/, and finished ones are not run again. A failure
    does not stop the others; where every run fails before it has begun, the group is removed again.
    Raises ValueError where runs failed by what the user can mend, RunFailed where one failed otherwise, and
    Interrupted after a signal, when all are saved.
    """
    group, is_new = _group(config, again=again)
    runs = [_SeedRun(seed, _of_seed(config, seed, group)) for seed in seeds]
    for run in runs:
        try:
            run.begin(lambda line, seed=run.seed: reporter.message(f"seed {seed}: {line}"), again=again)  # type: ignore[misc]
        except (ValueError, OSError) as error:
            _refuse(run, error, reporter)
    try:
        _train_group(group, runs, places, reporter, profile)
    finally:
        if not any(run.has_begun for run in runs):
            for run in runs:
                if run.begun is not None:
                    run.begun.remove_if_unused(LOG)
            if is_new and not any(group.iterdir()):
                group.rmdir()


def resume(
    group: Path, changes: Tree, places: Sequence[Mapping[str, str]], reporter: ConsoleReporter, *, profile: int = 0
) -> None:
    """Go on with all runs of a group that are not finished, and compare all.

    changes: keys that are given anew, see `engine.runs.resuming`. Raises as `train` does, and ValueError where the
    runs differ in more than the seed.
    """
    _train_group(group, _existing(group, changes), places, reporter, profile)


def _existing(group: Path, changes: Tree) -> list[_SeedRun]:
    """The runs of a group, with some keys given anew. Raises ValueError where not the seed alone differs."""
    runs = []
    for seed, path in seeds_in(group).items():
        directory, begun = RunDir.existing(path)
        wanted = resuming.carried_on(begun, resuming.changed(begun, changes))
        runs.append(_SeedRun(seed, wanted, PreparedRun(directory, changes)))
    first = runs[0]
    for run in runs:
        same = first.config.model_copy(update={"seed": run.seed})
        if keys := differing(run.config, same):
            raise ValueError(
                f"--resume: {group} is no group of one configuration: seed-{run.seed} differs from "
                f"seed-{first.seed} in {', '.join(keys)}; --resume {run.path} goes on with that one"
            )
    return runs


def _group(config: RunConfig, *, again: bool) -> tuple[Path, bool]:
    """The group's directory, and whether it is new. Raises ValueError where there can be none."""
    if config.out is not None:
        group = Path(config.out)
        with usable("--out", group):
            if (group / "config.yaml").exists():
                raise ValueError(f"--out {group} holds a single run; choose another place for a group of seeds")
            is_new = not group.exists()
            group.mkdir(parents=True, exist_ok=True)
            return group, is_new
    found = _latest(config) if again else None
    if found is not None:
        return found, False
    with usable("runs", Path("runs")):
        return new_folder(config), True


def _latest(config: RunConfig) -> Path | None:
    """The group below runs/ that began last of those of this configuration."""
    with usable("runs", Path("runs")):
        folders = [path for path in Path("runs").glob("*") if seeds_in(path)]
        folders.sort(key=lambda path: max(run.stat().st_mtime for run in seeds_in(path).values()), reverse=True)
    for folder in folders:
        try:
            pairs = [(RunDir.existing(path)[1], _of_seed(config, n, None)) for n, path in seeds_in(folder).items()]
        except ValueError:  # of another version, or damaged: it is not the one
            continue
        if not any(differences(begun, wanted) for begun, wanted in pairs):
            return folder
    return None


def _of_seed(config: RunConfig, seed: int, group: Path | None) -> RunConfig:
    """The configuration of one run of a group."""
    out = None if group is None else str(group / f"seed-{seed}")
    return with_absolute_paths(config.model_copy(update={"seed": seed, "out": out}))


def _train_group(
    group: Path,
    runs: Sequence[_SeedRun],
    places: Sequence[Mapping[str, str]],
    reporter: ConsoleReporter,
    profile: int,
) -> None:
    """Train what is not finished, and show all. Raises as `train` does."""
    ready = [run for run in runs if run.code is None]
    if ready:
        reporter.message(f"Group of {len(runs)} seeds: {group}")
        with contextlib.suppress(ValueError):  # each run tells why it cannot begin
            reporter.notes(_teachers(ready[0].config))
    heard = launcher.SignalFlags()
    with signal_handler(heard.handle):
        _train_all(ready, list(places), reporter, heard, profile)
    finished = {run.seed: found for run in runs if run.code == 0 and (found := run.result()) is not None}
    if finished:
        for which in ("best", "last"):
            reporter.table(table(finished, which))
    place = shlex.quote(str(group))
    if heard.received or any(run.code in _STOPPED for run in runs):
        raise Interrupted(
            f"interrupted, all saved; {len(finished)} of {len(runs)} runs are finished; to continue: "
            f"engine train --resume {place}"
        )
    if finished:
        reporter.message(f"Next: engine report {place}")
        reporter.message(f"Next: engine eval {place}/seed-*")
    if failed := [run for run in runs if run.code != 0]:
        error = ValueError if all(run.code == EXIT_USER_ERROR for run in failed) else RunFailed
        names = ", ".join(str(run.seed) for run in failed)
        again = f"; to run these again: engine train --resume {place}" * any(run.has_begun for run in runs)
        raise error(f"{len(failed)} of {len(runs)} runs failed: seed {names}{again}")


def _teachers(config: RunConfig) -> list[str]:
    """A sentence for each teacher: whether the seeds share it."""
    lines = []
    for section in teacher_sections(config):
        wanted = getattr(config, section)
        if wanted.checkpoint is not None:
            lines.append(f"{section}: all seeds learn from {wanted.checkpoint}")
        elif wanted.seed is not None:
            lines.append(
                f"{section}: all seeds learn from the same one, of seed {wanted.seed}: from the teacher cache, or "
                "trained once by the first run, for which the others wait"
            )
        else:
            offset = teachers.run_config(config, section).seed - config.seed
            lines.append(
                f"{section}: every seed has its own, of seed + {offset}, from the teacher cache or trained first; "
                f"--set {section}.seed=N gives all the same one"
            )
    return lines


def _train_all(
    runs: Sequence[_SeedRun],
    free: list[Mapping[str, str]],
    reporter: ConsoleReporter,
    heard: launcher.SignalFlags,
    profile: int,
) -> None:
    waiting = list(runs)
    at_work: dict[_SeedRun, tuple[subprocess.Popen[bytes], Mapping[str, str]]] = {}
    while at_work or (waiting and not heard.received):
        while free and waiting and not heard.received:
            run = waiting.pop(0)
            process = _start(run, free[0], reporter, profile)
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
    run: _SeedRun, environment: Mapping[str, str], reporter: ConsoleReporter, profile: int
) -> subprocess.Popen[bytes] | None:
    """The process of a run; None where it is finished already, or cannot begin."""
    try:
        if run.result() is not None:
            run.code = 0
            reporter.message(f"seed {run.seed}: finished before, {run.path}")
            return None
        process = run.start(environment, profile)
    except (ValueError, OSError) as error:
        _refuse(run, error, reporter)
        return None
    gpu = environment.get("CUDA_VISIBLE_DEVICES")
    reporter.message(f"seed {run.seed}: begins{'' if gpu is None else f' on GPU {gpu}'}, {run.log}")
    return process


def _refuse(run: _SeedRun, error: Exception, reporter: ConsoleReporter) -> None:
    """Note and tell that a run cannot begin."""
    run.code = EXIT_USER_ERROR
    reporter.message(f"seed {run.seed}: failed: {' '.join(str(error).split())}")


def _tell(run: _SeedRun, reporter: ConsoleReporter) -> None:
    """Report how a process ended."""
    seconds = f"{time.monotonic() - run.began:,.0f} s"
    if run.code == 0:
        summary = run.result()
        assert summary is not None
        numbers = (f"{name} {value:.2%}" for name, value in accuracies(summary, "best").items())
        reporter.message(f"seed {run.seed}: ended after {seconds}, best epoch: {', '.join(numbers)}")
    elif run.code in _STOPPED:
        reporter.message(f"seed {run.seed}: stopped after {seconds}")
    else:
        reporter.message(f"seed {run.seed}: failed after {seconds}, {run.why()}")


def accuracies(summary: Mapping[str, Any], which: str) -> dict[str, float]:
    """Accuracies of the "best" or "last" epoch, by attack: on test images, else on held-out ones."""
    if tested := summary.get(f"test_of_{which}"):
        return {title(name, result): result["accuracy"] for name, result in tested.items()}
    row = summary[which]
    held_out = f"on {row['measured_on']} images"
    return {f"{name} {held_out}": row[f"{name}_accuracy"] for name in ("natural", "robust")}


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean of accuracies in percent, and their sample standard deviation (n - 1) where there are several."""
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
    means = (mean_and_deviation(column) if len(column) == len(rows) else "" for column in columns)
    result.add_row(f"mean{' +- std' if len(rows) > 1 else ''}, n = {len(rows)}", "", *means)
    return result
