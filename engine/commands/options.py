"""Options that commands share, the groups in which a help lists them, and its form on a terminal of any width."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click

from engine.commands.completion import FILE, named, one_of
from engine.common import wrapping
from engine.common.stopping import Interrupted

COUNT, SEED = click.IntRange(1, 2**31 - 1), click.IntRange(0, 2**63 - 1)


class GroupedOption(click.Option):
    """An option with its place in the help."""

    def __init__(self, *arguments: Any, group: str = "other", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help lists its options by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from engine.config import GROUPS

        groups: dict[str, list[tuple[str, str]]] = {group: [] for group in (*GROUPS, "other")}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                groups[getattr(parameter, "group", "other")].append(record)
        for group, records in groups.items():
            with formatter.section(group.capitalize()):
                formatter.write_dl(records)


class _Help(click.HelpFormatter):
    """Text of a help, broken between words; what an option means stands below it where there is little room."""

    _LEAST_BESIDE = 60  # columns from which on meanings stand beside the options

    def __init__(self, *, max_width: int | None = None, **settings: Any) -> None:
        super().__init__(**settings | {"width": max(min(wrapping.columns(), max_width or 80) - 2, 20)})

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        self._write_lines(f"{prefix or 'Usage: '}{prog} {args}".rstrip(), hang=4)

    def write_text(self, text: str) -> None:
        for number, paragraph in enumerate(text.split("\n\n")):
            is_kept = paragraph.startswith("\b")
            self.write("\n" if number else "")
            if is_kept:
                self._write_lines(paragraph.removeprefix("\b").strip("\n"), hang=4)
            else:
                self._write_lines(" ".join(paragraph.split()))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        rows = list(rows)
        longest = max((len(first) for first, _ in rows), default=0)
        beside = min(longest, col_max) + col_spacing if self.width >= self._LEAST_BESIDE else 0
        for first, second in rows:
            room = self.width - (beside or 4) - self.current_indent
            told = wrapping.wrapped(" ".join(second.split()), room, hang=0)
            fits = beside and len(first) + col_spacing <= beside
            if fits:
                self.write(f"{'':{self.current_indent}}{first:{beside}}{told.pop(0)}".rstrip() + "\n")
            else:
                self._write_lines(first, hang=4)
            for line in told if second else ():
                self.write(f"{'':{self.current_indent + (beside or 4)}}{line}\n")

    def _write_lines(self, text: str, hang: int = 0) -> None:
        for line in wrapping.wrapped(text, self.width - self.current_indent, hang):
            self.write(f"{'':{self.current_indent}}{line}\n")


class _Context(click.Context):
    formatter_class = _Help


def wrap_help_at_words(command: click.Command) -> None:
    """Give the help of a command, and of those below it, this form; lists of commands have whole sentences."""
    command.context_class = _Context
    if command.short_help is None and command.help:
        command.short_help = " ".join(command.help.partition("\n\n")[0].split()).partition(". ")[0]
    for below in getattr(command, "commands", {}).values():
        wrap_help_at_words(below)


@dataclass(frozen=True)
class Processes:
    """Options of the processes of a command: how many, and how long one may not answer the others."""

    gpus: int | None
    procs: int | None
    timeout: float

    def count(self, device: str) -> int:
        """Processes to launch; 0 where none are asked for. Raises ValueError as `launcher.count` does."""
        from engine.system import launcher

        return launcher.count(self.gpus, self.procs, device)


def _checked_timeout(context: click.Context, parameter: click.Parameter, seconds: float) -> float:
    from engine.system.distributed import check_timeout

    check_timeout(seconds)
    return seconds


weights_option = click.option(
    "--weights-key",
    "--weights",
    "weights",
    metavar="KEY",
    help="Which of a file's networks, e.g. state_dict_ema. [the only one]",
)
device_option = click.option(
    "--device", type=named("device"), default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)
threat_model_option = click.option(
    "--threat-model", type=one_of("Linf", "L2"), help="Linf or L2. [as in training, else Linf]"
)
batch_size_option = click.option(
    "--batch-size",
    type=COUNT,
    help="Images per forward. [250, on a CPU 64; of large images as many as have the pixels of 32 of 224x224]",
)
_NORMALISATION = (
    click.option(
        "--normalize",
        type=named("normalisation"),
        help="What its loader normalised by: cifar10, imagenet, ... [as the file tells]",
    ),
    click.option("--normalize-mean", metavar="R,G,B", help="The mean itself, of images in [0, 1]."),
    click.option("--normalize-std", metavar="R,G,B", help="The standard deviation itself."),
)
_IMPORTS = "engine.imports"
option = functools.partial(click.option, cls=GroupedOption)
_PROCESS_OPTIONS = (
    option(
        "--gpus",
        type=click.IntRange(min=1),
        metavar="N",
        group="many processes",
        help="Use N GPUs. [one if there is any]",
    ),
    option(
        "--procs",
        type=click.IntRange(min=1),
        metavar="N",
        group="many processes",
        help="Use N processes on the CPU. [one]",
    ),
    option(
        "--timeout",
        type=float,
        callback=_checked_timeout,
        default=600,
        metavar="SECONDS",
        group="many processes",
        help="Time after which a process that does not answer the others is lost. [600]",
    ),
)


def import_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add --import: files, modules and the plugins of installed packages are loaded before the command runs."""

    @option(
        "--import",
        "files",
        multiple=True,
        type=FILE,
        metavar="FILE|MODULE",
        group="essentials",
        help="Python file or module that registers methods, models, data sets, attacks or loggers; repeatable.",
    )
    @functools.wraps(command)
    def with_imports(*, files: tuple[str, ...], **others: Any) -> None:
        from engine.plugins import imports

        imports.load_installed(_warn)
        click.get_current_context().meta[_IMPORTS] = imports.load(*files)
        command(**others)

    return with_imports


def normalisation_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --normalize, --normalize-mean and --normalize-std."""
    for decorate in reversed(_NORMALISATION):
        command = decorate(command)
    return command


def normalisation_of(options: dict[str, Any]) -> Any:
    """Normalisation as `load_model` takes it, in place of the three options, which leave the dict."""
    from engine.models import normalize

    return normalize.from_text(*(options.pop(f"normalize{part}") for part in ("", "_mean", "_std")))


def imported() -> tuple[str, ...]:
    """Files and modules that --import of the running command has loaded."""
    names: tuple[str, ...] = click.get_current_context().meta[_IMPORTS]
    return names


@contextmanager
def continued_by_itself(kept: str, again: str = "to continue") -> Iterator[None]:
    """Context in which Interrupted names the running command, which goes on. kept: what is there of its work."""
    try:
        yield
    except Interrupted:
        raise Interrupted(f"interrupted; {kept}; {again}", ("engine", *sys.argv[1:])) from None


def _warn(line: str) -> None:
    from engine.system.distributed import is_launched

    if not is_launched():  # else the command that launched this one has said it
        click.echo(f"engine: {line}", err=True)


def process_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --gpus, --procs and --timeout, which the command gets as `processes`."""

    @functools.wraps(command)
    def with_processes(*, gpus: int | None, procs: int | None, timeout: float, **others: Any) -> None:
        command(processes=Processes(gpus, procs, timeout), **others)

    for decorate in reversed(_PROCESS_OPTIONS):
        with_processes = decorate(with_processes)
    return with_processes
