"""Tables of docs/results.md and README.md, from the files in bench/results: `python -m tests.result_tables`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from bench.lib.accuracy import mechanism, report
from bench.lib.accuracy import protocol as protocols
from bench.lib.accuracy.cells import ResultFolder
from bench.lib.accuracy.collected import Collected, collect
from bench.lib.accuracy.statistics import NOT_MEASURED, ComparedRow, ComparedTable
from bench.lib.output import csv_rows
from bench.lib.output.csv_rows import PeerRow, TrialRow
from bench.lib.speedrun import records, trials
from bench.lib.speedrun.rules import TRACKS
from tests.method_tables import table

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "docs" / "results.md", ROOT / "README.md")
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(
    r"(<!-- table of ([\w-]+): python -m tests\.result_tables -->\n).*?(<!-- end of table -->)", re.DOTALL
)
PROTOCOL = "cpu"


def measured() -> Collected:
    """All that is measured of the protocol."""
    return collect(protocols.read(PROTOCOL), ResultFolder(RESULTS / "accuracy" / PROTOCOL))


def written(page: str) -> str:
    """The page with the tables as they must be."""
    found = measured()
    return BLOCK.sub(lambda block: "\n".join([block[1], *_lines(block[2], found), "", block[3]]), page)


def _lines(name: str, found: Collected) -> Iterator[str]:
    if name in found.protocol.tables:
        return accuracies(found, name)
    return OTHERS[name](found)


def accuracies(found: Collected, name: str) -> Iterator[str]:
    """A table of the protocol: means with deviations, and differences to the baseline with intervals."""
    wanted = found.protocol.tables[name]
    compared = found.compared(wanted)
    headings = ["", *(f"{each.attack}, n = {_images(each, wanted.attacks)}" for each in compared)]
    headings += [f"minus `{wanted.baseline}`, {each.attack}" for each in compared]

    def rows() -> Iterator[tuple[str, ...]]:
        for index, row in enumerate(wanted.rows):
            of_attacks = [each.rows[index] for each in compared]
            yield f"`{row}`", *map(_mean, of_attacks), *(_difference(each, wanted.baseline) for each in of_attacks)

    seeds = compared[0].seeds
    around = (
        "with 95 % intervals for other seeds"
        if len(seeds) > 1
        else "without intervals: one seed tells of no other"
    )
    yield f"Seeds compared: {len(seeds)}. Means in percent; differences in points, {around}."
    yield ""
    yield from table(tuple(headings), rows())
    if len(seeds) > 1 and any(row.against for each in compared for row in each.rows):
        yield ""
        yield from (f"- {sentence}" for each in compared for sentence in report.told_apart(each))
        yield ""
        yield report.power(compared)


def _images(compared: ComparedTable, wanted: dict[str, int]) -> str:
    return f"{compared.n or wanted[compared.attack]:,}"


def _mean(row: ComparedRow) -> str:
    if row.mean is None:
        return NOT_MEASURED
    spread = "" if row.deviation is None else f" ± {100 * row.deviation:.2f}"
    return f"{100 * row.mean:.2f}{spread}"


def _difference(row: ComparedRow, baseline: str) -> str:
    if row.row == baseline or row.against is None:
        return ""
    interval = row.against.interval
    around = "" if interval is None else f" ({100 * interval[0]:+.2f} to {100 * interval[1]:+.2f})"
    return f"{100 * row.against.difference:+.2f}{around}"


def state(found: Collected) -> Iterator[str]:
    """A sentence on how much is measured."""
    yield f"{len(found.cells)} of {found.wanted} trainings are measured."


def directions(found: Collected) -> Iterator[str]:
    """Every measured difference beside the paper's."""
    known = report.directions({name: found.compared(wanted) for name, wanted in found.protocol.tables.items()})
    if not known:
        yield f"{NOT_MEASURED.capitalize()}."
        return
    yield report.count_of_verdicts(known)
    yield ""
    rows = (
        (f"`{each.row}` - `{each.baseline}`", each.attack, each.points, each.interval, each.paper_points,
         each.ours.verdict)
        for each in known
    )  # fmt: skip
    yield from table(
        ("difference", "attack", "here, points", "95 % interval, other seeds", "paper, points", "verdict"), rows
    )


def statements(found: Collected) -> Iterator[str]:
    """The paper's statements on the mechanism, and what the logs say."""
    heading, rows = mechanism.table(mechanism.claims(found.protocol, found.results))
    wanted = ("Statement", "Paper", "Row", "From and to", "Mean", "95 % interval", "Verdict")
    places = [heading.index(name) for name in wanted]
    return table(wanted, (tuple(row[place] for place in places) for row in rows))


def speedrun(found: Collected) -> Iterator[str]:
    """Records of every track, the best first."""

    def rows() -> Iterator[tuple[str, ...]]:
        for name, track in TRACKS.items():
            valid, _ = records.leaderboard(RESULTS / "speedrun" / name, track)
            plain = [record for _, record in valid if record.recipe == "baseline"]
            baselines = {record.machine: record.summary.seconds for record in plain}
            for path, record in valid:
                means = record.summary
                ratio = baselines.get(record.machine, math.nan) / means.seconds
                yield (
                    f"`{name}`", f"[{record.recipe}](../{path.relative_to(ROOT)})", f"{means.seconds:,.1f}",
                    "" if math.isnan(ratio) else f"{ratio:.1f}", f"{means.flops / 1e12:,.0f}",
                    f"{100 * means.natural:.2f}", f"{100 * means.pgd20:.2f} ± {100 * means.pgd20_std:.2f}",
                    f"{100 * means.checked:.2f}", record.machine, str(record.facts["date"])[:10],
                )  # fmt: skip
            if not valid:
                yield f"`{name}`", NOT_MEASURED, *[""] * 8

    heading = ("track", "recipe", "seconds", "x baseline", "TFLOP", "natural", "PGD-20", "AA", "machine", "date")
    return table(heading, rows())


def tried(found: Collected) -> Iterator[str]:
    """Variants of the best recipe on held-out images."""
    path = RESULTS / "speedrun" / "cpu" / "trials-best.csv"
    if not path.exists():
        yield f"{NOT_MEASURED.capitalize()}."
        return
    measured_rows = csv_rows.read(path, TrialRow)

    def rows() -> Iterator[tuple[str, ...]]:
        for means in trials.means(measured_rows):
            yield (
                f"`{means.variant}`", f"`{means.keys}`" if means.keys else "", f"{means.seconds:,.0f}",
                f"{means.flops / 1e12:,.1f}", f"{100 * means.natural:.2f}", f"{100 * means.pgd20:.2f}",
                "" if means.variant == trials.BASE else f"{100 * means.pgd20_minus_base:+.2f}",
            )  # fmt: skip

    first, seeds = measured_rows[0], len({row.seed for row in measured_rows})
    yield (
        f"{first.held_out:,} held-out training images, {seeds} seed{'s' * (seeds > 1)}, {first.processor}, "
        f"{first.threads} threads, torch {first.torch}, {first.date[:10]}. Accuracies in percent."
    )
    yield ""
    heading = ("variant", "keys changed", "seconds", "TFLOP", "natural", "PGD-20", "minus base, PGD-20")
    yield from table(heading, rows())


def peers(found: Collected) -> Iterator[str]:
    """Seconds an epoch and memory of the published scripts, others and the engine."""
    path = RESULTS / "cpu" / "peers.csv"
    if not path.exists():
        yield f"{NOT_MEASURED.capitalize()}."
        return
    measured_rows = csv_rows.read(path, PeerRow)

    def rows() -> Iterator[tuple[str, ...]]:
        for row in measured_rows:
            published = "" if row.speedup_over_published is None else f"{row.speedup_over_published:.2f}"
            plain = "" if row.speedup_over_plain is None else f"{row.speedup_over_plain:.2f}"
            yield (
                f"`{row.method}`", row.candidate, f"{row.epoch_s:,.0f}", published, plain, f"{row.peak_mib:,.0f}",
            )  # fmt: skip

    first = measured_rows[0]
    yield (
        f"{first.model}, batches of {first.batch_size}, {first.processor}, {first.threads} threads, torch "
        f"{first.torch}, {first.date[:10]}; seconds of 50,000 images, scaled from {first.rounds} rounds of steps."
    )
    yield ""
    yield from table(("method", "candidate", "s/epoch", "x published", "x plain", "peak MiB"), rows())


OTHERS = {
    "state": state,
    "directions": directions,
    "mechanism": statements,
    "speedrun": speedrun,
    "trials": tried,
    "peers": peers,
}

if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
