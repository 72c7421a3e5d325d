"""Content of a protocol's page: its sentences, tables and pictures, of what is measured so far."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from bench.lib.accuracy import figures
from bench.lib.accuracy.cells import AttackAccuracy, MeasuredCell
from bench.lib.accuracy.chapters import Chapter, Folded, Heading, Items, Picture
from bench.lib.accuracy.collected import Collected, Hardware, hardware
from bench.lib.accuracy.mechanism_chapter import mechanism_chapter
from bench.lib.accuracy.protocol import ProtocolTable
from bench.lib.accuracy.statistics import (
    AGREES,
    DISAGREES,
    NO_DIFFERENCE,
    NOT_MEASURED,
    NOT_RESOLVED,
    ComparedRow,
    ComparedTable,
    Difference,
)
from engine.common.numbers import duration
from engine.evaluation.statistics.intervals import CONFIDENCE, wilson
from engine.evaluation.statistics.paired import POWER, Interval
from engine.runs.reporting.tables import Cell, Name, Number, Percent, ReportTable

_MIB = 2**20
_LEVEL = f"{1 - CONFIDENCE:.0%}"
_BY_SEEDS, _BY_IMAGES = (f"{CONFIDENCE:.0%} interval\nother {of}" for of in ("seeds", "test images"))
_NATURAL = "natural"

FURTHER: tuple[Callable[[Collected], Chapter | None], ...] = (mechanism_chapter,)
"""Further chapters, which follow the tables: functions that give one, or None where there is nothing to tell."""


def chapters(found: Collected, source: str) -> list[Chapter]:
    """The page in its order. source: text of the protocol's file."""
    tables = {name: found.compared(table) for name, table in found.protocol.tables.items()}
    result = [_data(found), *filter(None, [_beside_paper(found, tables)])]
    result += [_table(found, name, table, tables[name]) for name, table in found.protocol.tables.items()]
    result += filter(None, (make(found) for make in FURTHER))
    return [*result, *filter(None, [_teachers(found)]), _reading(), _machines(found), _protocol(source)]


def headline(found: Collected) -> list[str]:
    """First sentences of the page."""
    measured = f"{len(found.cells)} of {found.wanted} cells are measured"
    return [
        f"{found.protocol.title}.",
        f"{measured}. A cell is a row of a table with a seed: one training, and its attacks on test images.",
        *_warnings(found),
    ]


# ---------------------------------------------------------------- data, protocol, machines


def _data(found: Collected) -> Chapter:
    result = Chapter("Images and attacks")
    if found.protocol.images:
        result.add(found.protocol.images)
    seen: dict[str, set[tuple[int, str]]] = defaultdict(set)
    for cell in (*found.cells.values(), *found.teachers.values()):
        for attack, accuracy in cell.accuracies.items():
            seen[attack].add((accuracy.n, accuracy.images))
    wanted: dict[str, set[int]] = defaultdict(set)
    for table in found.protocol.tables.values():
        for attack, images in table.attacks.items():
            wanted[attack].add(images)
    rows: list[list[Cell]] = []
    for attack, numbers in wanted.items():
        told = "; ".join(f"{n:,} ({images})" for n, images in sorted(seen[attack])) or NOT_MEASURED
        rows.append([Name(attack), ", ".join(f"{n:,}" for n in sorted(numbers)), told])
    result.add(
        ReportTable("attacks", ("attack", "test images wanted", "measured on (digest of the images)"), rows),
        f"Attacks draw their random numbers by seed {found.protocol.evaluation_seed}, the same for all cells.",
    )
    digests = {cell.data for cell in (*found.teachers.values(), *found.cells.values())}
    if digests:
        result.add(f"SHA-256 of the data set: {_and(sorted(digests))}.")
    return result


def _protocol(source: str) -> Chapter:
    return Chapter("Protocol", [Folded("The protocol's file, which decides all of it", source)])


def _machines(found: Collected) -> Chapter:
    """Hardware, versions and commits of all cells."""
    columns = ("device", "processor", "cores", "threads", "python", "torch", "triton", "commit")
    dates: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for cell in (*found.teachers.values(), *found.cells.values()):
        dates[tuple(cell.facts[name] for name in columns)].append(str(cell.facts["date"]))
    rows: list[list[Cell]] = []
    for (*others, commit), of in dates.items():
        first, last = min(of)[:10], max(of)[:10]
        rows.append([
            *map(str, others), _short(str(commit)), len(of), first if first == last else f"{first} to {last}",
        ])  # fmt: skip
    result = Chapter("Hardware, versions and commits", list(_warnings(found)))
    if not rows:
        result.add(f"Cells: {NOT_MEASURED}.")
        return result
    result.add(ReportTable("hardware", (*columns, "cells and teachers", "dates"), rows))
    result.add("A commit with +changes had files that differ from it; cells.csv has all digits.")
    return result


def _short(commit: str) -> str:
    """Twelve digits of a commit, and what follows its digits."""
    digits, plus, changes = commit.partition("+")
    return digits[:12] + plus + changes


def _warnings(found: Collected) -> Iterator[str]:
    for name, table in found.protocol.tables.items():
        if len(machines := {hardware(cell) for cell in found.of_table(table)}) > 1:
            yield (
                f"Warning: cells of the table {name} were measured on {len(machines)} different machines "
                f"({'; '.join(sorted(map(_machine, machines)))}): seconds and memory are compared on one alone."
            )


def _machine(of: Hardware) -> str:
    device, processor, cores, threads = of
    where = processor if device == "cpu" else f"{device} beside {processor}"
    return f"{where}, {cores} cores, {threads} thread{'s' * (threads != 1)}"


# ---------------------------------------------------------------- tables


def _table(found: Collected, name: str, table: ProtocolTable, tables: Sequence[ComparedTable]) -> Chapter:
    result = Chapter(table.title)
    if not any(each.is_measured for each in tables):
        result.add(f"None of its rows is measured: {', '.join(table.rows)}.")
        return result
    result.add(_seeds(table, tables[0]), Heading("Accuracies"), _accuracies(name, table, tables))
    others = [row for row in table.rows if row != table.baseline]
    is_compared = [each for each in tables if any(row.against for row in each.rows)]
    if is_compared:
        result.add(Items([sentence for each in tables for sentence in told_apart(each)]), power(tables))
    result.add(
        Picture(
            f"{name}-accuracies", figures.accuracies, (tuple(tables),),
            f"Accuracies of {', '.join(table.rows)} under {', '.join(table.attacks)}, as in the table.",
            "All seeds measured, and means of those compared. Bars: of a row's own seeds, by Student's t.",
        )
    )  # fmt: skip
    if is_compared:
        result.add(
            Picture(
                f"{name}-differences", figures.differences, (tuple(tables),),
                f"Differences of {', '.join(others)} to {table.baseline}, as in the tables below.",
            )
        )  # fmt: skip
    result.add(*_trade_off(name, tables))
    if is_compared:
        for each in is_compared:
            result.add(Heading(f"Differences to {table.baseline} under {each.attack}"), _differences(name, each))
    result.add(*_costs(found, name, table))
    return result


def _seeds(table: ProtocolTable, compared: ComparedTable) -> str:
    """Sentence on which seeds are compared, and which rows are not."""
    absent = [row.row for row in compared.rows if row.mean is None]
    told = f"Seeds {_and(compared.seeds)}, which all rows with numbers have: {len(compared.seeds)} trainings each."
    if len(compared.seeds) == 1:
        told = f"Seed {compared.seeds[0]} alone: one training each, so nothing is known of other seeds."
    more = {seed for row in compared.rows for seed in row.by_seed} - set(compared.seeds)
    if more:
        told += f" Left out, since not all of them have it: seed {_and(sorted(more))}."
    return told + (f" Not measured, or without a seed in common: {', '.join(absent)}." if absent else "")


def _accuracies(name: str, table: ProtocolTable, tables: Sequence[ComparedTable]) -> ReportTable:
    rows: list[list[Cell]] = []
    for place, row in enumerate(table.rows):
        cells = [_accuracy(each.rows[place], each.seeds) for each in tables]
        rows.append([Name(f"{row} (baseline)" if row == table.baseline else row), *cells])
    heads = [f"{each.attack}\nn = {each.n:,}" for each in tables]
    return ReportTable(f"{name}-accuracies", ("row", *heads), rows)


def _accuracy(row: ComparedRow, seeds: Sequence[int]) -> Cell:
    if row.mean is None:
        return NOT_MEASURED
    return Percent(row.mean, deviation=row.deviation, seeds=len(seeds))


def told_apart(table: ComparedTable) -> Iterator[str]:
    """Sentence on rows that differ from the baseline after Holm's adjustment; none without an interval."""
    known = [(row.row, row.against) for row in table.rows if row.against]
    apart = [
        (row, found) for row, found in known if found.adjusted is not None and found.adjusted < 1 - CONFIDENCE
    ]
    if table.df and known:
        others = [row for row, found in known if (row, found) not in apart]
        told = ", ".join(f"{row} ({_points(found.difference)})" for row, found in apart)
        yield "; ".join(
            filter(None, [
                f"{table.attack}: told apart from {table.baseline} (Holm, {_LEVEL}): {told or 'none'}",
                f"not told apart: {', '.join(others)}" if others else "",
            ])
        ) + "."  # fmt: skip


def power(tables: Sequence[ComparedTable]) -> str:
    """Sentence on the differences that these seeds can tell."""
    found = [
        (each.attack, each.resolvable, each.resolvable_together)
        for each in tables
        if each.resolvable is not None and each.resolvable_together is not None
    ]
    if not found:
        return "These seeds do not tell how much others would differ: there is no interval for other seeds."
    alone = _and([f"{100 * bound:.2f} points ({attack})" for attack, bound, _ in found])
    together = _and([f"{100 * bound:.2f} ({attack})" for attack, _, bound in found])
    seeds = len(tables[0].seeds)
    return (
        f"Differences below {alone} cannot be told apart by these {seeds} seeds: one of that size is found with a "
        f"probability of {POWER:.0%}, a smaller one more rarely. Where all differences of the table are tested "
        f"together, the bounds are up to {together}. Not told apart is not the same as equal."
    )


def _differences(name: str, table: ComparedTable) -> ReportTable:
    """Each row minus the baseline."""
    head = (
        "row", f"minus {table.baseline}\npoints", _BY_SEEDS, "p", "p, by Holm", _BY_IMAGES,
        f"by seed\n{_and(table.seeds)}",
    )  # fmt: skip
    rows: list[list[Cell]] = []
    for row in table.rows:
        if row.row == table.baseline:
            continue
        if row.against is None:
            rows.append([Name(row.row), NOT_MEASURED, *[""] * (len(head) - 2)])
            continue
        found = row.against
        rows.append([
            Name(row.row), _signed(found.difference), _interval(found.interval), _p(found.p_value),
            _p(found.adjusted), _interval(found.images_interval), ", ".join(map(_points, found.by_seed)),
        ])  # fmt: skip
    return ReportTable(f"{name}-{table.attack.replace(':', '-')}-differences", head, rows)


def _trade_off(name: str, tables: Sequence[ComparedTable]) -> Iterator[Picture]:
    """Natural against robust accuracy: of the attacks on the most images, the last one."""
    natural = next((each for each in tables if each.attack == _NATURAL), None)
    attacked = [each for each in tables if each.attack != _NATURAL and each.is_measured]
    if natural is None or not natural.is_measured or not attacked:
        return
    robust = max(reversed(attacked), key=lambda each: each.n)
    yield Picture(
        f"{name}-trade-off", figures.trade_off, (natural, robust),
        f"Natural accuracy of each row against that under {robust.attack}, as in the table of accuracies.",
        "Large: the mean over seeds. Small: a seed.",
    )  # fmt: skip


def _costs(found: Collected, name: str, table: ProtocolTable) -> Iterator[Heading | str | ReportTable | Picture]:
    of_table = found.costs(table)
    if of_table is None:
        return
    where, costs = of_table
    rows: list[list[Cell]] = [
        [
            Name(cost.row),
            NOT_MEASURED
            if cost.epoch_seconds is None
            else Number(cost.epoch_seconds, f"{cost.epoch_seconds:.1f}"),
            _ratio(cost.relative),
            None
            if cost.peak_memory is None
            else Number(cost.peak_memory / _MIB, f"{cost.peak_memory / _MIB:,.0f}"),
            _ratio(cost.relative_memory),
        ]
        for cost in costs
    ]
    by = f"by {table.baseline}'s"
    yield Heading("Time and memory")
    yield ReportTable(f"{name}-costs", ("row", "s/epoch", by, "peak MiB", by), rows)
    yield (
        f"{_seconds(found, where)} Memory is of cells on one machine, {_machine(where)}; "
        + ("that of tensors." if where[0] != "cpu" else "that of the whole process.")
    )
    if any(cost.relative is not None for cost in costs):
        yield Picture(
            f"{name}-costs", figures.costs, (tuple(costs), table.baseline),
            f"Seconds an epoch and peak memory of each row by those of {table.baseline}, as in the table.",
        )  # fmt: skip


def _seconds(found: Collected, where: Hardware) -> str:
    """Sentences on what the seconds are of."""
    if found.in_turn is None:
        return (
            f"Seconds are of cells on one machine, {_machine(where)}: medians over seeds, ratios seed by seed, of "
            "the training without evaluations. Other work may have run at the same time: only --costs times the "
            "rows in turn."
        )
    facts = found.in_turn.facts
    rounds = len(next(iter(found.in_turn.rows.values())).seconds)
    timed_on = facts["device"], facts["processor"], facts["cores"], facts["threads"]
    return (
        f"Seconds are of the steps of an epoch, after the warm-up and without evaluations, by {rounds} rounds in "
        f"which the rows took turns: {_machine(timed_on)}, {facts['date'][:10]}. The median round, and the median "
        "ratio of a round."
    )


# ---------------------------------------------------------------- the paper


class Direction(NamedTuple):
    """Difference of a row to the baseline of its table that the paper has, too; ours.verdict compares the two."""

    table: str
    attack: str
    row: str
    baseline: str
    ours: Difference
    paper: float

    @property
    def interval(self) -> str:
        """Ours, for other seeds, in points; "" where there is none."""
        return _interval(self.ours.interval)

    @property
    def points(self) -> str:
        """Ours, in points."""
        return _points(self.ours.difference)

    @property
    def paper_points(self) -> str:
        """The paper's, in points."""
        return _points(self.paper)


def directions(tables: Mapping[str, Sequence[ComparedTable]]) -> list[Direction]:
    """All measured differences that the paper has, in the order of the tables."""
    return [
        Direction(name, each.attack, row.row, each.baseline, row.against, row.against.paper)
        for name, compared in tables.items()
        for each in compared
        for row in each.rows
        if row.against is not None and row.against.paper is not None
    ]


def count_of_verdicts(known: Sequence[Direction]) -> str:
    """Sentence on how many agree with the paper."""
    counts = Counter(each.ours.verdict for each in known)
    verdicts = (AGREES, DISAGREES, NOT_RESOLVED, NO_DIFFERENCE)
    told = "; ".join(f"{verdict}: {counts[verdict]}" for verdict in verdicts if counts[verdict])
    return f"{len(known)} measured differences are in the paper, too. Here beside there: {told}."


def _beside_paper(found: Collected, tables: Mapping[str, Sequence[ComparedTable]]) -> Chapter | None:
    """Directions of all differences that the paper has, and those that contradict it."""
    if not any(table.recipes for table in found.protocol.tables.values()):
        return None
    result = Chapter("Beside the paper")
    known = directions(tables)
    if not known:
        result.add(f"Differences that the paper has: {NOT_MEASURED}.")
        return result
    contradicted = [
        f"{each.table}: {each.row} minus {each.baseline} under {each.attack} is {each.points} points here "
        f"({each.interval}), and {each.paper_points} in the paper."
        for each in known
        if each.ours.verdict == DISAGREES
    ]
    rows: list[list[Cell]] = [
        [
            Name(f"{each.row} - {each.baseline}"), each.attack, _signed(each.ours.difference), each.interval,
            _signed(each.paper), each.ours.verdict, each.table,
        ]
        for each in known
    ]  # fmt: skip
    head = ("difference", "attack", "here\npoints", _BY_SEEDS, "paper\npoints", "verdict", "table")
    result.add(
        count_of_verdicts(known),
        Heading("Contradictions"),
        Items(contradicted) if contradicted else "No measured difference contradicts the paper's.",
        Heading("All directions"),
        ReportTable("directions", head, rows),
        "Directions alone are compared: network, epochs and images are the protocol's, not the paper's, and its "
        f"numbers are of one training each. {AGREES.capitalize()}: the interval excludes 0 on the paper's side; "
        f"{DISAGREES}: on the other side; {NOT_RESOLVED}: 0 is in the interval, or there is none. Nothing is "
        "adjusted for how many there are: of 20 intervals one is expected to miss.",
    )
    return result


# ---------------------------------------------------------------- teachers, and what the numbers mean


def _teachers(found: Collected) -> Chapter | None:
    if not found.protocol.teachers:
        return None
    result = Chapter("Teachers")
    attacks = list(dict.fromkeys(name for cell in found.teachers.values() for name in cell.accuracies))
    rows: list[list[Cell]] = []
    for section in found.protocol.teachers:
        cell = found.teachers.get(section)
        if cell is None:
            rows.append([Name(section), NOT_MEASURED, *[""] * (len(attacks) + 4)])
            continue
        rows.append([
            Name(section), str(cell.keys.get("method", "")), str(cell.keys.get("seed", "")),
            f"{cell.epoch} of {cell.epochs}", *(_of_images(cell.accuracies.get(name)) for name in attacks),
            duration(cell.seconds), cell.weights[:12],
        ])  # fmt: skip
    heads = [f"{name}\nn = {_images(found.teachers.values(), name)}" for name in attacks]
    result.add(
        ReportTable("teachers", ("section", "method", "seed", "best epoch", *heads, "training", "weights"), rows),
        f"In brackets: {CONFIDENCE:.0%} interval of other test images (Wilson). There is one training of each, "
        "the same for all rows and seeds: what another teacher would give is not known.",
    )
    return result


def _images(cells: Iterable[MeasuredCell], attack: str) -> str:
    return ", ".join(sorted({f"{cell.accuracies[attack].n:,}" for cell in cells if attack in cell.accuracies}))


def _of_images(accuracy: AttackAccuracy | None) -> Cell:
    if accuracy is None:
        return NOT_MEASURED
    low, high = wilson(accuracy.correct, accuracy.n)
    return Number(accuracy.share, f"{accuracy.share:.2%} ({100 * low:.1f} to {100 * high:.1f})")


def _reading() -> Chapter:
    """Assumptions of the intervals."""
    sentences = (
        "± is the standard deviation over seeds (with n - 1). A seed decides initial weights and the order "
        "of images, the same for all rows, so rows are compared seed by seed.",
        "Other seeds: would other seeds say the same on these test images? Rows and seeds are a randomised "
        "complete block design: what the means of row and seed leave over is pooled over all rows of the "
        "table, and the interval of a difference is ± t s sqrt(2 / seeds). It is assumed that this rest "
        "varies alike in all rows, which so few seeds cannot test.",
        "Other test images: would other images say the same of these very networks? The interval is of the "
        "difference image by image, averaged over the seeds. Neither question is answered by the other's "
        "interval.",
        "p: of no difference, by the block design. By Holm: adjusted for all rows of the table under that "
        f"attack; below {1 - CONFIDENCE:.2f} a row is told apart. It is not adjusted for the number of "
        "attacks and tables.",
        "Not measured: other teachers, networks, data sets and longer trainings.",
    )
    return Chapter("What the numbers mean", [Items(sentences)])


# ---------------------------------------------------------------- cells of tables


def _points(share: float) -> str:
    """A difference of shares in points."""
    return f"{100 * share:+.2f}" if round(100 * share, 2) else "0.00"


def _signed(share: float) -> Number:
    return Number(100 * share, _points(share))


def _interval(found: Interval | None) -> str:
    return "" if found is None else f"{_points(found[0])} to {_points(found[1])}"


def _p(value: float | None) -> Cell:
    return None if value is None else Number(value, f"{value:.3f}" if value >= 0.001 else "< 0.001")


def _ratio(value: float | None) -> Cell:
    return None if value is None else Number(value, f"{value:.2f}")


def _and(items: Sequence[object]) -> str:
    """Items in a sentence."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last
