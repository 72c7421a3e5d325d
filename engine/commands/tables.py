"""Tables that commands print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Column, Table
from rich.text import Text

from engine.common import standard_streams
from engine.common.console import ConsoleReporter
from engine.common.numbers import percent

if TYPE_CHECKING:
    from engine.runs.lifecycle import RunResult


def print_list(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print what a command lists, below its title. Raises OSError as `standard_streams.check_stdout` does."""
    table = Table(*columns, box=box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    reporter = ConsoleReporter()
    if title:
        reporter.message(title)
    reporter.table(table)
    standard_streams.check_stdout()


def print_accuracies(reporter: ConsoleReporter, results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Print named results by attack, with the number of images, and each attack with all its numbers."""
    from engine.attacks.table import title

    # Not every network needs the attacks that were added where gradients were masked, nor has each all parts.
    rows = {
        row: {(name, title(name, result)): result for name, result in found.items()}
        for row, found in results.items()
    }
    any_of = {column: result for found in rows.values() for column, result in found.items()}
    heads = (Text(f"{head}\nn = {result['n']:,}") for (_, head), result in any_of.items())  # a path is no markup
    table = Table("", *map(Column, heads), box=box.SIMPLE)
    for row, found in rows.items():
        table.add_row(Text(row), *(_accuracy(found[column]) if column in found else "" for column in any_of))
    reporter.table(table)
    for (_, head), result in any_of.items():
        reporter.message(f"{head}: {result['description']}")
    if any(result.get("warnings") for found in results.values() for result in found.values()):
        reporter.message("* may be too high: see the warnings")


def print_by_radius(reporter: ConsoleReporter, title: str, found: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Print results by attack and by radius of one network, and each attack with its numbers at the largest."""
    from engine.attacks import table as attacks

    radii = list(dict.fromkeys(radius for results in found.values() for radius in results))
    heads = (Text(title), Text("n"), *(Text(f"epsilon\n{radius}") for radius in radii))
    table = Table(*map(Column, heads), box=box.SIMPLE)
    for attack, results in found.items():
        last = results[max(results, key=radii.index)]
        cells = (_accuracy(results[radius]) if radius in results else "" for radius in radii)
        table.add_row(Text(attacks.title(attack, last)), f"{last['n']:,}", *cells)
        reporter.message(f"{attacks.title(attack, last)}: {last['description']}")
    reporter.table(table)
    if any(result.get("warnings") for results in found.values() for result in results.values()):
        reporter.message("* may be too high: see the warnings")


def _accuracy(result: dict[str, Any]) -> str:
    return f"{percent(result['accuracy'])}{'*' * bool(result.get('warnings'))}"


def print_summary(reporter: ConsoleReporter, result: RunResult) -> None:
    """Print the accuracies of a finished run, its files, and the commands that go on with them."""
    from engine.attacks.table import find
    from engine.plugins import imports
    from engine.runs.run_directory import RunDir

    summary = result.summary
    run, config = RunDir.existing(result.path)
    best = summary["best"]
    if "test_of_best" in summary:
        name = f"best (epoch {best['epoch']}, selected on {summary['selected_on']})"
        last = f"last (epoch {summary['last']['epoch']})"
        reporter.message("Accuracy on test images:")
        print_accuracies(reporter, {name: summary["test_of_best"], last: summary["test_of_last"]})
    else:
        held_out = f"{best.get('measured_n', 'the'):,} {best['measured_on']} images"
        reporter.message(
            f"Best epoch: {best['epoch']}, natural {percent(best['natural_accuracy'])}, "
            f"{find(config.eval.attack).title} {percent(best['robust_accuracy'])} of {held_out}, "
            f"{find(config.eval.attack).numbers(2, (config.attack.epsilon, config.attack.threat_model))}"
        )
    reporter.message("Written:")
    for path in sorted(run.path.iterdir()):
        reporter.message(f"  {path}")
    print_next(reporter, run.path, imports.arguments(config))


def print_next(reporter: ConsoleReporter, path: Path, also: Sequence[str]) -> None:
    """Print the commands that one runs after a training. also: arguments that its plugins need."""
    reporter.message("Next:")
    where = str(path)
    reporter.command(("engine", "eval", where, "--attacks", "natural,pgd20,aa", *also))
    reporter.command(("engine", "report", where))
    reporter.command(("engine", "export", where, "--format", "onnx", *also))
