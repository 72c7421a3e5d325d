"""Lifecycle of training runs: begin, train, resume, and the ways in which they end.

```python
from engine import train
result = train({"method": "at", "dataset": "digits", "model": "resnet8", "epochs": 2})
print(result.summary["best"]["robust_accuracy"])
```
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from engine import models
from engine.attacks.autoattack import NO_ATTACK
from engine.common.console import Reporter, usual_reporter
from engine.common.lookup import is_on, nearest
from engine.common.stopping import Interrupted, RunFailed, Stop, graceful_stop
from engine.config import RunConfig, differing, flat, load, merge, semantics, with_absolute_paths
from engine.evaluation.measure import check_names
from engine.kernels import dispatch
from engine.models.weights import origin
from engine.objectives import STUDENT, TERMS
from engine.pipelines import datasets
from engine.pipelines.datasets import AnyDataset
from engine.plugins import imports, loggers
from engine.plugins.builtin_loggers.run_facts import History, RunFacts
from engine.plugins.loggers import Loggers, RowFunction
from engine.plugins.objects import Model, Objects
from engine.runs import checkpoints, format_probe, provenance, resuming
from engine.runs.assemble import assemble, check_extra_labels, method_of
from engine.runs.checkpoints import Progress
from engine.runs.metrics_writer import MetricsWriter
from engine.runs.run_directory import PreparedRun, RunDir
from engine.runs.session import Session
from engine.runs.trainer import Trainer, restored
from engine.system import precision
from engine.system.distributed import World, is_launched, small_batch_warning
from engine.system.precision import describe_fast
from engine.training import plan, schedule
from engine.training.performance.profiling import Profiler
from engine.training.weights import optimizer


@dataclass(frozen=True)
class RunResult:
    """Path of a run directory, and its summary.json."""

    path: Path
    summary: dict[str, Any]


# many parameters: the public door; the last four are what a configuration cannot hold.
def train(
    run_config: RunConfig | Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
    *,
    profile: int = 0,
    world: World | None = None,
    again: bool = False,
    model: str | Model | None = None,
    dataset: Any = None,
    teachers: Mapping[str, nn.Module] | None = None,
    callbacks: Sequence[RowFunction] = (),
    **keys: Any,
) -> RunResult:
    """Train a configuration in a new run directory.

    run_config: a RunConfig, or nested keys of one; keys: further ones, e.g. epochs=2, which win.
    model: a name; or a torch.nn.Module, a copy of which is trained, or a function of the number of classes.
    dataset: a name; or (train, test), see `engine.plugins.own_data.as_images`, or a function that gives them.
    teachers: networks by section, "teacher" and "teacher_st". callbacks: functions that get every row of
    metrics.jsonl, in the main process; what they raise ends the call. A run with objects goes on by `resume`.
    reporter: who tells the user; None: one with a progress bar in a notebook, and elsewhere one that says nothing.
    profile: that many steps are traced, see `engine.training.performance.profiling`. world: processes that train
    together; all call this with the same arguments. again: see `begin`.
    Raises ValueError for what the user can mend, RunFailed for a run that cannot go on, and Interrupted after a
    signal, when everything is saved for `resume`.
    """
    world, console = world or World(), reporter or usual_reporter()
    imports.load_installed(console.message)
    named = {"model": model, "dataset": dataset}
    keys |= {key: given for key, given in named.items() if isinstance(given, str)}
    given = {key: None if isinstance(given, str) else given for key, given in named.items()}
    objects = Objects(**given, teachers=teachers or {}, callbacks=callbacks)
    config = _complete(run_config, merge(keys, objects.names()))
    mine: list[PreparedRun] = []  # of the main process alone: it made them

    def prepare() -> tuple[str, dict[str, Any]]:
        mine.append(begin(config, again=again, processes=world.size, say=console.message))
        return str(mine[0].run.path), dict(mine[0].changes)

    with console.speaking_of(STUDENT), objects.registered(config):
        path, changes = world.broadcast_from_main(prepare)
        with mine[0].removed_on_failure() if mine else nullcontext():
            return _resume(path, changes, objects, console, world, profile=profile)


def begin(
    config: RunConfig, *, again: bool = False, processes: int = 1, say: Callable[[str], None] = lambda line: None
) -> PreparedRun:
    """The directory of a new run of a configuration, with nothing but that in it: `resume` does the rest.

    again: go on where such a run was stopped: the one in `out`, or without `out` the latest unfinished one below
    runs/; where there is none a new one begins. processes: how many will train. say: is told what was decided.
    Raises ValueError for a configuration that cannot be run, and for an `out` that is taken.
    """
    config = with_absolute_paths(config)
    _check(config)
    if config.batch_size % processes:
        raise ValueError(f"batch_size {config.batch_size} must be a multiple of the {processes} processes")
    found = RunDir.find(config) if again else None
    return found or RunDir.create(format_probe.resolve(config, say=say))


def resume(
    path: Path | str,
    reporter: Reporter | None = None,
    *,
    profile: int = 0,
    world: World | None = None,
    model: Model | None = None,
    dataset: Any = None,
    teachers: Mapping[str, nn.Module] | None = None,
    callbacks: Sequence[RowFunction] = (),
    **changes: Any,
) -> RunResult:
    """Continue the run in that directory from its last checkpoint; a finished run is returned as it is.

    The number of processes may be another than before. changes: keys that are given anew, see
    `engine.runs.resuming`; more epochs extend the run, a finished one too.
    model, dataset, teachers, callbacks: as of `train`; a run that began with objects needs the same ones.
    Raises as `train` does.
    """
    console = reporter or usual_reporter()
    imports.load_installed(console.message)
    objects = Objects(model, dataset, teachers or {}, callbacks)
    begun = RunDir.existing(Path(path))[1]
    objects.check(begun)
    with console.speaking_of(STUDENT), objects.registered(begun):
        return _resume(path, changes, objects, console, world or World(), profile=profile)


def _resume(
    path: Path | str,
    changes: Mapping[str, Any],
    objects: Objects,
    console: Reporter,
    world: World,
    *,
    profile: int,
) -> RunResult:
    run, begun = RunDir.existing(Path(path))
    config = resuming.carried_on(begun, resuming.changed(begun, changes))
    _check_names(config)
    if summary := world.broadcast_from_main(lambda: run.result(config)):
        console.message(f"{path} is finished: nothing to resume")
        return RunResult(run.path, summary)
    if config.amp and config.amp_dtype == "auto":  # config.yaml is older than the key
        kept = world.broadcast_from_main(
            lambda: provenance.amp_dtype(run) or format_probe.resolve(config).amp_dtype
        )
        config = config.model_copy(update={"amp_dtype": kept})
    if config.winograd == "auto":
        config = config.model_copy(update={"winograd": begun.winograd})
    with graceful_stop(console.message, launched=is_launched()) as stop:
        try:
            with world.collective_errors(stop):
                summary = _run(run, config, world, console, stop, objects=objects, profile=profile)
        except Interrupted:
            raise Interrupted("interrupted, all saved; to continue", _resuming(run, config, world)) from None
    return RunResult(run.path, summary)


def _resuming(run: RunDir, config: RunConfig, world: World) -> list[str]:
    """The command that continues a run, with as many processes as it had."""
    kind = "gpus" if precision.device(config.device, world.local_rank).type == "cuda" else "procs"
    processes = [f"--{kind}", str(world.size)] if world.size > 1 else []
    return ["engine", "train", "--resume", str(run.path), *processes, *imports.arguments(config)]


def _complete(given: RunConfig | Mapping[str, Any] | None, keys: Mapping[str, Any]) -> RunConfig:
    if isinstance(given, RunConfig):
        return load(given.tree(), keys) if keys else given
    if given is None or isinstance(given, Mapping):
        return load(given or {}, keys)
    raise ValueError(f"run_config: a RunConfig or a mapping of its keys is expected, got {given!r:.200}")


def _check(config: RunConfig) -> None:
    """Refuse what would fail only after data were loaded, before a run directory is made."""
    _check_names(config)
    plan.check_whole_batches(method_of(config), config)
    check_extra_labels(config)
    for section in ("teacher", "teacher_st"):
        name, known = getattr(config, section).method, semantics.TEACHER_METHODS
        if name not in known:
            raise ValueError(f"{section}.method: {name!r} trains no teacher; {nearest(name, known)}")
    if config.eval.attack == NO_ATTACK:
        raise ValueError(f"eval.attack: {NO_ATTACK!r} is no attack; take e.g. 'pgd10'")
    if config.optim.implementation == "apex":
        optimizer.check_apex()
    precision.device(config.device)


def _check_names(config: RunConfig) -> None:
    """Refuse names that nobody has registered, and imports that its user did not ask for."""
    imports.check_loaded(config)
    method_of(config)
    models.check(config.model)
    datasets.check(config.dataset)
    check_names((config.eval.attack, *config.eval.final))
    loggers.check(config.loggers)


# many parameters: a session's, which it makes, and two of a teacher's run alone
def _run(
    run: RunDir,
    config: RunConfig,
    world: World,
    console: Reporter,
    stop: Stop,
    *,
    dataset: AnyDataset | None = None,
    objects: Objects | None = None,
    student: RunConfig | None = None,
    profile: int = 0,
) -> dict[str, Any]:
    """Train the run to its end; its summary.

    dataset: that of a teacher's student; None: it is loaded. student: its configuration.
    """
    try:
        with ExitStack() as resources:
            fast = precision.is_fast(config, precision.device(config.device, world.local_rank))
            resources.enter_context(precision.deterministic(amp=config.amp, fast=fast))
            world.broadcast_from_main(lambda: resources.enter_context(run.locked()))
            saved = checkpoints.read(run.last) if world.broadcast_from_main(run.last.exists) else None
            config = _carried_on(run, saved, config, console)
            # A damaged provenance.json is told of before the work.
            if sessions := world.broadcast_from_main(run.sessions):
                for line in imports.changed(sessions[-1].get("plugins", {}), imports.record(config)):
                    console.message(f"Warning: {line}")
            at = precision.choose(config, world.local_rank)
            session = Session(config, at, world, console, stop, run, objects or Objects(), student)
            _announce(session, saved)
            return _make_trainer(session, saved, resources, dataset, profile).fit()
    except FloatingPointError as error:
        good = f"the last good checkpoint is {run.last}" if run.last.exists() else "there is no checkpoint yet"
        raise RunFailed(f"{error}; {good}") from None
    except OSError as error:
        raise RunFailed(
            f"{error.filename or run.path}: {error.strerror or error}; what was saved before is whole"
        ) from error


def _carried_on(run: RunDir, saved: Mapping[str, Any] | None, config: RunConfig, console: Reporter) -> RunConfig:
    """The configuration that a run goes on with, after what its last checkpoint was trained with."""
    if saved is None:
        if run.summary.exists():
            raise ValueError(f"--resume: {run.last} is gone, and with it the state to go on from")
        return config
    begun, progress = load(saved["config"]), saved["progress"]
    config = resuming.carried_on(begun, config, progress["epoch"] + (progress["step_in_epoch"] > 0))
    if config.epochs > begun.epochs:
        console.message(resuming.describe(begun, config))
    return config


def _announce(session: Session, saved: Mapping[str, Any] | None) -> None:
    """Tell of kernels, processes, and what is special about a checkpoint that is gone on from."""
    config, precision, size = session.config, session.precision, session.world.size
    say = session.console.message
    method = method_of(config)
    weighted = [term for phase in method.phases for term in phase.weights]
    kinds = tuple(dict.fromkeys(TERMS[term].kind for term in weighted))
    say(dispatch.describe(precision.device, fused=precision.fused, kinds=kinds))
    for warning in schedule.misfit_warmups(config, method):
        say(f"Warning: {warning}")
    if size > 1:
        share = config.batch_size // size
        of = f"all {config.batch_size}" if is_on("sync_bn", config.sync_bn) else f"its own {share}"
        say(f"Processes: {size}, {share} images each; BatchNorm in each by {of} images")
        if precision.device.type == "cuda" and (warning := small_batch_warning(share)):
            say(warning)
    if config.fast:
        say(describe_fast(precision.device))
    if saved is not None and precision.note:
        say(precision.note)
    for note in origin(saved) if saved is not None else ():
        say(f"Note: {session.run.last} is {note}")


def _make_trainer(
    session: Session,
    saved: Mapping[str, Any] | None,
    resources: ExitStack,
    dataset: AnyDataset | None,
    profile: int,
) -> Trainer:
    """The trainer of a run at the state of its checkpoint. resources: closes what the trainer uses."""
    run, world = session.run, session.world
    parts = assemble(session, saved, resources, partial(_train_teacher, session), dataset)
    progress = Progress() if saved is None else restored(parts, run.last, saved)
    hooks: dict[str, Callable[..., object]] = {}
    if world.is_main:
        run.update(session.config)  # what was given anew fits: the hashes are those of before
        withdrawn = run.rows_after(progress.rows_size)
        writer = MetricsWriter(run, progress.rows_size, progress.step)
        resources.enter_context(closing(writer))
        others = _loggers(session, withdrawn)
        resources.enter_context(others)

        def write_row(row: Mapping[str, Any]) -> None:
            writer.write(row)
            others.write(row)

        def cut_rows(size: int, step: int) -> None:
            writer.cut(size, step)
            others.cut(sum(1 for _ in run.rows()))

        hooks["write_row"] = write_row
        hooks["cut_rows"] = cut_rows
        if profile:
            profiler = Profiler(profile, run.path, session.precision.device, session.console)
            hooks["on_step"] = resources.enter_context(closing(profiler)).step
    return Trainer(session, parts, progress, **hooks)


def _loggers(session: Session, withdrawn: Sequence[Mapping[str, Any]]) -> Loggers:
    """Those of a run, before its first row of this session. withdrawn: rows that it will write again."""
    run, config = session.run, session.config
    tree = config.tree()
    facts = RunFacts(run.path, tree, flat(tree), run.sessions()[-1])
    history = History(facts, run.rows, sum(1 for _ in run.rows()), withdrawn, run.read_summary)
    return Loggers(config.loggers, run.path, session.console.message, session.objects.callbacks, history)


def _train_teacher(session: Session, wanted: RunConfig, path: Path, dataset: AnyDataset) -> Path:
    """Train a teacher of the session's student in a run directory of its own, see `teachers.TrainRun`."""
    config, run, world = wanted.model_copy(update={"out": str(path)}), RunDir(path), session.world
    prepared = PreparedRun(run)

    def prepare() -> bool:
        """True if it is finished already."""
        nonlocal prepared
        if not run.config.exists():
            prepared = RunDir.create(config)
        elif differing(RunDir.existing(path)[1], wanted):
            raise ValueError(f"--out: {path} holds the run of another teacher; remove it, or choose another --out")
        if run.result(config) is None:
            return False
        if checkpoints.read(run.last)["data_sha256"] != dataset.sha256:
            raise ValueError(f"--out: {path} holds a teacher of other data; remove it, or choose another --out")
        return True

    finished = world.broadcast_from_main(prepare)
    with prepared.removed_on_failure():
        if not finished:
            with session.console.speaking_of(path.name):  # that of its section
                _run(run, config, world, session.console, session.stop, dataset=dataset, student=session.config)
    return run.best
