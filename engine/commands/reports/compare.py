"""`engine compare`: networks, or groups of seeds, by their verdicts on the same images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.commands.completion import FILE
from engine.commands.options import SEED, import_option

if TYPE_CHECKING:
    from engine.evaluation.files.verdicts import ComparedNetwork, MatchedAttack
    from engine.evaluation.statistics.paired import PairedComparison

COMPARISON_FORMAT = 1


@dataclass(frozen=True)
class _Row:
    """PairedComparison of two subjects under one attack. adjusted: p of all comparisons together, by Holm."""

    a: ComparedNetwork
    b: ComparedNetwork
    match: MatchedAttack
    found: PairedComparison
    adjusted: float | None = None


@click.command("compare")
@click.argument("networks", nargs=-1, required=True, type=FILE, metavar="A B...")
@click.option("--json", "json_path", type=FILE, metavar="FILE", help="Write everything as JSON into a new file.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the bootstrap.")
@import_option
def compare_networks(networks: tuple[str, ...], json_path: str | None, seed: int) -> None:
    """Tell whether networks differ on the same images, by what `engine eval` has measured.

    A, B: checkpoints, run directories for their best, reports (.eval.json), or groups of seeds. Nothing is run.
    """
    _check(networks, json_path)
    run(networks, seed, json_path)


def run(networks: Sequence[str], seed: int, json_path: str | None) -> None:
    """Compare, print, and write. Raises ValueError where there is nothing to compare."""
    from engine.common import standard_streams
    from engine.common.console import ConsoleReporter
    from engine.evaluation.files.verdicts import read_subject

    reporter = ConsoleReporter()
    subjects = [read_subject(name) for name in networks]
    notes = [
        f"{network.checkpoint}: {note}" for each in subjects for network in each.networks for note in network.notes
    ]
    reporter.notes(notes)
    rows, told = _compared(subjects, seed)
    for a, b in itertools.combinations(subjects, 2):
        _show(reporter, a, b, [row for row in rows if row.a is a and row.b is b], told[a.name, b.name])
    if not rows:
        raise ValueError("compare: no two of these were measured under the same attack on the same images")
    if json_path is not None:
        _write(Path(json_path), subjects, rows, told)
        reporter.message(f"Written: {json_path}")
    standard_streams.check_stdout()


def _check(networks: Sequence[str], json_path: str | None) -> None:
    """Raise ValueError for fewer than two networks, for one that stands twice, and for a file that is there."""
    if len(networks) < 2:
        raise ValueError(f"compare: two networks or more are expected, got {len(networks)}")
    if twice := [name for name in networks if networks.count(name) > 1]:
        raise ValueError(f"compare: {twice[0]} is given twice")
    if json_path is not None and Path(json_path).exists():
        raise ValueError(f"--json: {json_path} exists")


def _compared(
    subjects: Sequence[ComparedNetwork], seed: int
) -> tuple[list[_Row], dict[tuple[str, str], list[str]]]:
    """Rows of all pairs under all attacks, and what cannot be compared, by the names of the pair."""
    from engine.evaluation.files.verdicts import matches
    from engine.evaluation.statistics.intervals import holm
    from engine.evaluation.statistics.paired import compare

    pairs, told = [], {}
    for a, b in itertools.combinations(subjects, 2):
        matched, told[a.name, b.name] = matches(a, b)
        pairs += [(a, b, match) for match in matched]
    rows = [
        _Row(
            a,
            b,
            match,
            compare(
                match.verdicts_a,
                match.verdicts_b,
                paired_seeds=bool(a.seeds) and a.seeds == b.seeds,
                comparisons=len(pairs),
                seed=seed,
            ),
        )
        for a, b, match in pairs
    ]
    adjusted = iter(holm([row.found.p_value for row in rows if row.found.p_value is not None]))
    rows = [row if row.found.p_value is None else replace(row, adjusted=next(adjusted)) for row in rows]
    return rows, told


# ---------------------------------------------------------------- output


def _show(
    reporter: Any, a: ComparedNetwork, b: ComparedNetwork, rows: Sequence[_Row], told: Sequence[str]
) -> None:
    """Print the comparison of two subjects."""
    from engine.evaluation.statistics.paired import PAIRED_TESTS

    reporter.message(f"A: {a.name}{_seeds(a)}")
    reporter.message(f"B: {b.name}{_seeds(b)}")
    if rows:
        reporter.table(_table(rows))
        for row in rows:
            reporter.message(sentence(row.match.label, row.found, row.adjusted))
        test = rows[0].found.test
        reporter.message(f"Test: {PAIRED_TESTS[test]}; p, Holm: adjusted for all comparisons of this command")
    warnings = dict.fromkeys(line for row in rows for line in (*few_seeds(row.found), *row.match.notes()))
    for warning in warnings:
        reporter.message(f"Warning: {warning}")
    for line in told:
        reporter.message(line)


def _seeds(subject: ComparedNetwork) -> str:
    return f", seeds {', '.join(map(str, subject.seeds))}" if subject.seeds else ""


def _table(rows: Sequence[_Row]) -> Any:
    """Accuracies, differences and tests by attack."""
    from rich import box
    from rich.table import Column, Table
    from rich.text import Text

    from engine.runs.seeds import mean_and_deviation

    of_groups = rows[0].found.only_a is None
    heads = ["attack", "n", "A", "B", "A - B, points", "95 % interval"]
    heads += ["bootstrap, seeds and images"] if of_groups else ["only A", "only B"]
    table = Table(*map(Column, (*heads, "p", "p, Holm")), box=box.SIMPLE)
    for row in rows:
        found = row.found
        middle = [_points(found.bootstrap)] if of_groups else [f"{found.only_a:,}", f"{found.only_b:,}"]
        table.add_row(
            Text(row.match.label),
            f"{found.n:,}",
            mean_and_deviation(row.match.verdicts_a.mean(1).tolist()),
            mean_and_deviation(row.match.verdicts_b.mean(1).tolist()),
            f"{100 * found.difference:+.2f}",
            "not known" if found.interval is None else _points(found.interval),
            *middle,
            _probability(found.p_value),
            _probability(row.adjusted),
        )
    return table


def _points(interval: tuple[float, float]) -> str:
    low, high = (100 * bound for bound in interval)
    return f"{low:+.2f} to {high:+.2f}"


def _probability(p_value: float | None) -> str:
    if p_value is None:
        return "not known"
    return f"{p_value:.4f}" if p_value >= 0.0001 else "< 0.0001"


def sentence(attack: str, found: PairedComparison, adjusted: float | None) -> str:
    """Comparison in plain words. adjusted: p of all comparisons that are made together; None: not known."""
    from engine.evaluation.statistics.intervals import CONFIDENCE
    from engine.evaluation.statistics.paired import POWER

    images = f"n = {found.n:,}"
    if (found.seeds_a, found.seeds_b) != (1, 1):
        images += f", {found.seeds_a} and {found.seeds_b} seeds"
    if found.interval is None or adjusted is None:
        difference = f"A - B is {100 * found.difference:+.2f} points whatever the seed ({images})"
        known = f"the bootstrap over images gives {_points(found.bootstrap)}"
        return f"{attack}: {difference}: their spread, and an interval over seeds, is not known; {known}"
    if adjusted < 1 - CONFIDENCE:
        low, high = found.interval if found.difference > 0 else (-found.interval[1], -found.interval[0])
        better = "A is better than B" if found.difference > 0 else "B is better than A"
        by = f"{100 * abs(found.difference):.2f} points ({100 * low:.2f} to {100 * high:.2f})"
        return f"{attack}: {better} by {by}, {images}"
    could = "these images are too few to tell any"
    if found.resolvable is not None:
        could = f"one of {100 * found.resolvable:.2f} points would be, with a probability of {POWER:.0%}"
    between = f"A - B = {100 * found.difference:+.2f}, {_points(found.interval)}"
    return f"{attack}: no difference can be told ({between}, {images}); {could}"


def few_seeds(found: PairedComparison) -> list[str]:
    """Sentences on what too few seeds do not tell."""
    sizes = (found.seeds_a, found.seeds_b)
    if sizes == (1, 1):
        return ["one network each: other seeds of the same trainings may differ by more than the interval tells"]
    return [
        f"{letter} has {size} seed{'s' * (size > 1)}: the spread of fewer than 3 is hardly known"
        for letter, size in zip("AB", sizes, strict=True)
        if size < 3
    ]


def _write(
    path: Path, subjects: Sequence[ComparedNetwork], rows: Sequence[_Row], told: dict[tuple[str, str], list[str]]
) -> None:
    """Write the comparisons as JSON. Raises ValueError where that cannot be written."""
    from engine.common.files import write_json

    networks = [
        {
            "name": each.name,
            "seeds": list(each.seeds),
            "checkpoints": [str(network.checkpoint) for network in each.networks],
        }
        for each in subjects
    ]
    comparisons = [
        {"a": row.a.name, "b": row.b.name, "attack": row.match.a[0].attack, "title": row.match.label}
        | {"conditions": dict(row.match.conditions)}
        | asdict(row.found)
        | {"p_value_holm": row.adjusted, "sentence": sentence(row.match.label, row.found, row.adjusted)}
        | {"warnings": [*few_seeds(row.found), *row.match.notes()]}
        for row in rows
    ]
    left = [{"a": a, "b": b, "reason": line} for (a, b), lines in told.items() for line in lines]
    content = {"format": COMPARISON_FORMAT, "networks": networks, "comparisons": comparisons, "not_compared": left}
    try:
        write_json(path, content)
    except OSError as error:
        raise ValueError(f"--json: cannot write {path}: {error.strerror}") from None
