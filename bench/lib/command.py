"""Options, console and folder of results that the commands have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
import torch
from rich.console import Console

from bench.lib import machine
from bench.lib.output import csv_rows
from engine import methods, models

Function = TypeVar("Function", bound=Callable[..., Any])


class Option(Protocol):
    """Decorator that adds an option to a command's function."""

    def __call__(self, function: Function, /) -> Function:
        """Add it."""


def command(function: Callable[..., None]) -> click.Command:
    """A command of click's that knows `-h`."""
    return click.command(context_settings={"help_option_names": ["-h", "--help"]})(function)


@contextmanager
def refused() -> Iterator[None]:
    """A ValueError inside ends the command with exit code 2 and its one line."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _read_by(read: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Callback of an option whose value is read by a function that raises ValueError."""

    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        with refused():
            return read(value)

    return callback


def _model(name: str) -> str:
    models.check(name)
    return name


def _methods(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        methods.get(name)
    return names


def device_option(help: str = "cpu, cuda or cuda:N.") -> Option:
    """`device`: a torch.device that is there."""
    return click.option(
        "--device", default="auto", show_default=True, callback=_read_by(machine.device), help=help
    )


def model_option(help: str = "Student and teachers.") -> Option:
    """`model`: the name of a network."""
    return click.option("--model", default="resnet18", show_default=True, callback=_read_by(_model), help=help)


def methods_option(usual: Sequence[str]) -> Option:
    """`names`: of methods, in the order given."""
    return click.option(
        "--method", "names", multiple=True, default=usual, callback=_read_by(_methods),
        help=f"Repeatable. [{', '.join(usual)}]",
    )  # fmt: skip


def batch_size_option(usual: int = 128, help: str | None = None) -> Option:
    """`batch_size`: images of a step."""
    return click.option("--batch-size", default=usual, show_default=True, type=click.IntRange(min=1), help=help)


def out_option(help: str = "Folder for the results. [bench/results/NAME-DATE]") -> Option:
    """`out`: a folder, None for the usual one."""
    return click.option("--out", type=click.Path(path_type=Path), help=help)


def new_console() -> Console:
    """A console as wide as the terminal, of 160 characters where there is none."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


@dataclass(frozen=True)
class Results:
    """Folder of a command's results, facts of the machine for their rows, and the console."""

    folder: Path
    facts: machine.Facts
    console: Console
    _names: dict[str, None] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Path of a file of the results, which the last line will name."""
        self._names[name] = None
        return self.folder / name

    def write(self, name: str, rows: csv_rows.Rows) -> None:
        """Write all rows so far: a run that is cut short leaves what it has."""
        csv_rows.write(self.path(name), rows)

    @property
    def written(self) -> str:
        """Tables by their paths, pictures by their names; empty where nothing was written."""
        tables = ", ".join(str(self.folder / name) for name in self._names if name.endswith(".csv"))
        return tables + "".join(f" and {name}" for name in self._names if not name.endswith(".csv"))


@contextmanager
def results(device: torch.device, out: Path | None) -> Iterator[Results]:
    """Make the folder, `out` or that of machine and day; in the end name the files on the console."""
    facts = machine.facts(device)
    found = Results(out or machine.results_folder(facts), facts, new_console())
    found.folder.mkdir(parents=True, exist_ok=True)
    yield found
    if found.written:
        found.console.print(f"written: {found.written}")
