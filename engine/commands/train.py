"""`engine train`: a run, several side by side, or the next part of one."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.commands.completion import ASSIGNMENT, CONFIG, RUN
from engine.commands.options import GroupedCommand, Processes, import_option, imported, option, process_options
from engine.common.files import seeds_in

if TYPE_CHECKING:
    from engine.config import RunConfig, Tree

_RECIPE = "recipe:"  # begin of a --config that is no file


class _Train(GroupedCommand):
    """Adds the options of keys when they are needed: `engine --help` does not wait for the configuration."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from engine.commands.key_options import key_options

        return [*key_options(), *super().get_params(ctx)]


@dataclass(frozen=True)
class _Request:
    """The configuration to train and how; directory: of a run or group to go on with, with `changes` of its keys.

    The configuration of a group is that of its first run.
    """

    config: RunConfig
    changes: Tree
    directory: Path | None
    again: bool
    processes: Processes
    profile: int


@click.command(cls=_Train)
@option(
    "--config",
    "config_file",
    type=CONFIG,
    group="essentials",
    metavar="FILE",
    help="YAML file of keys, or recipe:NAME.",
)
@option(
    "--set",
    "assignments",
    type=ASSIGNMENT,
    multiple=True,
    group="essentials",
    metavar="KEY=VALUE",
    help="Any key, e.g. attack.num_steps=7.",
)
@option(
    "--resume",
    type=RUN,
    group="essentials",
    metavar="DIR",
    help="Continue that run or group; auto: the one of these settings, if it began.",
)
@import_option
@process_options
@option(
    "--seeds",
    "seed_list",
    group="many processes",
    metavar="LIST",
    help="A run for each, e.g. 0..7 or 0,3,5: N at a time.",
)
@option(
    "--profile",
    type=click.IntRange(min=0),
    default=0,
    group="output",
    metavar="N",
    help="Trace N steps. [none]",
)
def train(
    config_file: str | None,
    assignments: tuple[str, ...],
    resume: str | None,
    seed_list: str | None,
    profile: int,
    processes: Processes,
    **flags: Any,
) -> None:
    """Train a student, and its teachers where none are given.

    \b
    engine train --method iad1 --amp                 CIFAR-10, ResNet-18, the paper's hyper-parameters
    engine train --config recipe:table2-cifar10-at-iad1
    engine train --resume runs/...                   after Ctrl-C, SIGTERM or a crash
    engine train --method iad1 --amp --gpus 8        on the GPUs of this machine
    engine train --method iad1 --amp --gpus 8 --seeds 0..7   a run on each GPU, side by side
    """  # noqa: D301  # click knows the backspace as a mark, and only as a character
    given = {name: value for name, value in flags.items() if value is not None}
    directory = None if resume in (None, "auto") else Path(str(resume))
    if directory is not None:
        for flag, value in (("--config", config_file), ("--out", given.get("out"))):
            if value is not None:
                raise ValueError(f"--resume DIR continues the run in DIR as it was configured; drop {flag}")
    if seed_list is not None:
        _check_seeds(given, assignments, begins=directory is None)

    from engine.config import load, merge, nested, parse_assignment
    from engine.runs import seeds
    from engine.system import distributed

    wanted = None if seed_list is None else seeds.parse(seed_list)
    changes = merge(
        *(nested(name, value) for name, value in given.items()),
        *(parse_assignment(text) for text in assignments),
        {"imports": imported()} if imported() else {},
    )
    if directory is None:
        config = load(_read_config(config_file), changes)
        _tell_of_recipe(config_file, config)
    else:
        config = _continued(directory, changes)
    again = resume == "auto" or distributed.is_restarted()
    request = _Request(config, changes, directory, again, processes, profile)
    if wanted is not None or (directory is not None and seeds_in(directory)):
        _train_seeds(request, wanted)
    elif not distributed.is_launched() and (count := processes.count(config.device)):
        _launch(request, count)
    else:
        _train(request)


def _continued(directory: Path, changes: Tree) -> RunConfig:
    from engine.runs import resuming
    from engine.runs.run_directory import RunDir

    first = next(iter(seeds_in(directory).values()), directory)
    _, begun = RunDir.existing(first)
    return resuming.carried_on(begun, resuming.changed(begun, changes))


def _train_seeds(request: _Request, wanted: Sequence[int] | None) -> None:
    """Train with each seed, or go on with a group, as many at a time as there may be processes."""
    from engine.common.console import ConsoleReporter
    from engine.runs import seeds
    from engine.system import distributed

    if distributed.is_launched():
        raise ValueError("--seeds starts processes of its own, and none under torchrun; use --gpus or --procs")
    group, reporter = request.directory, ConsoleReporter()
    runs = len(seeds_in(group) if group is not None else wanted or ())
    at_once = min(request.processes.count(request.config.device) or 1, runs)
    places = seeds.slots(at_once, gpus=request.processes.gpus is not None)
    if group is not None:
        seeds.resume(group, request.changes, places, reporter, profile=request.profile)
    elif wanted is not None:
        seeds.train(request.config, wanted, places, reporter, again=request.again, profile=request.profile)


def _launch(request: _Request, count: int) -> None:
    """Train in so many new processes, and exit with their code."""
    from engine.common.console import ConsoleReporter
    from engine.common.stopping import EXIT_INTERRUPTED
    from engine.config import assignments
    from engine.plugins import imports
    from engine.runs import lifecycle
    from engine.runs.run_directory import PreparedRun, RunDir
    from engine.system import launcher

    if request.directory is None:
        say = ConsoleReporter().message
        prepared = lifecycle.begin(request.config, again=request.again, processes=count, say=say)
    else:
        prepared = PreparedRun(RunDir.existing(request.directory)[0], request.changes)
    arguments = [
        "train",
        "--resume",
        str(prepared.run.path),
        *assignments(prepared.changes),
        *imports.arguments(request.config),
    ]
    arguments += [
        "--timeout",
        str(request.processes.timeout),
        "--profile",
        str(request.profile),
    ]
    code = launcher.launch(count, launcher.command(*arguments), prepared.run.path / "logs")
    if code != EXIT_INTERRUPTED:
        prepared.remove_if_unused()
    sys.exit(code)


def _train(request: _Request) -> None:
    """Train in this process, alone or as one of those that were launched together."""
    from engine.commands.tables import print_summary
    from engine.common import host_memory
    from engine.common.console import ConsoleReporter, Reporter
    from engine.runs import lifecycle
    from engine.system import distributed

    profile = request.profile
    host_memory.keep_freed_memory()
    with distributed.joined(request.config, request.processes.timeout) as world:
        reporter = ConsoleReporter(share_of_peak=profile > 0) if world.is_main else Reporter()
        if request.directory is None:
            result = lifecycle.train(
                request.config,
                reporter,
                profile=profile,
                world=world,
                again=request.again,
            )
        else:
            result = lifecycle.resume(
                request.directory,
                reporter,
                profile=profile,
                world=world,
                **request.changes,
            )
    if isinstance(reporter, ConsoleReporter):
        print_summary(reporter, result)


def _check_seeds(given: Mapping[str, Any], assignments: Sequence[str], *, begins: bool) -> None:
    """Refuse what contradicts --seeds."""
    if not begins:
        raise ValueError(
            "--resume DIR and --seeds exclude each other: --resume auto takes seeds, and a group knows its own"
        )
    if "seed" in given:
        raise ValueError("--seed and --seeds exclude each other")
    if any(text.partition("=")[0].strip() == "seed" for text in assignments):
        raise ValueError("--set seed and --seeds exclude each other")


def _tell_of_recipe(config_file: str | None, config: RunConfig) -> None:
    """Tell of the row of the paper that a run without a file resembles, or of the teacher that a recipe wants."""
    from engine.common.console import ConsoleReporter
    from engine.system.distributed import is_launched

    if is_launched():
        return
    if config_file is None:
        told = _row_alike(config)
    elif config_file.startswith(_RECIPE):
        told = _wanted_teacher(config_file, config)
    else:
        told = ""
    if told:
        ConsoleReporter().message(told)


def _row_alike(config: RunConfig) -> str:
    """The row of the paper's Tables 2-4 that a run resembles: its settings may not be the defaults."""
    from engine.config import load, recipes

    if config.limit_train is not None:
        return ""
    for recipe in recipes.paper_rows():
        if recipe.table in (2, 3, 4):
            row = load(recipe.config)
            if all(getattr(row, key) == getattr(config, key) for key in ("method", "dataset", "model")) and (
                row.teacher.method == config.teacher.method
            ):
                return f"The paper's own settings of this row: --config {_RECIPE}{recipe.name}"
    return ""


def _wanted_teacher(name: str, config: RunConfig) -> str:
    """The recipe of the teacher, where a run of a recipe that wants one is given none."""
    from engine.config import KEYS, recipes

    recipe = recipes.get(name.removeprefix(_RECIPE))
    if not isinstance(recipe, recipes.ModernRecipe) or recipe.teacher is None or config.teacher.checkpoint:
        return ""
    components = recipes.modern_recipe(recipe.teacher).components
    lacking = [component.title for key, component in components.items() if not KEYS[key].teacher]
    return (
        f"The teacher of this recipe is a run of --config {_RECIPE}{recipe.teacher}: --teacher DIR. None is "
        f"given: one is trained on the way, without {', '.join(lacking)}."
    )


def _read_config(name: str | None) -> Tree:
    from engine.config import read_file

    if name is None:
        return {}
    if name.startswith(_RECIPE):
        from engine.config import recipes

        return recipes.get(name.removeprefix(_RECIPE)).run_keys()
    return read_file(Path(name), "--config")
