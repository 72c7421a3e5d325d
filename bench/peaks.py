"""Time what torch reaches on this machine: `python -m bench.peaks`. README.md says how.

Unlike the other benchmarks it runs no tests first: nothing of the engine is timed, only torch.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import torch
from rich import box
from rich.table import Table

from bench.lib import command, machine
from bench.lib.calls import convolutions, op_cases, peak_cases
from bench.lib.calls.op_cases import COPY
from bench.lib.calls.peak_cases import (
    BATCH_NORM,
    BENCHMARK,
    BFLOAT16,
    CHANNELS_LAST,
    CONVOLUTION,
    DETERMINISTIC,
    FLOAT16,
    FLOAT32,
    MATMUL,
    STEM,
    PeakCase,
    PeakSetting,
)
from bench.lib.output import csv_rows
from bench.lib.output.csv_rows import PeakRow
from bench.lib.timing import Call, Clock, HostClock, QueuedClock, calls_within, no_garbage_collection, rotated
from engine import config, models
from engine.runs import assemble

STEP = "step"
METHOD = "iad1"
NO_TIME = "not measured: no time was left"
MIN_ROUNDS = 3
MAX_OPERANDS, MAX_QUEUED = 16, 64


@command.command
@command.device_option()
@click.option(
    "--seconds",
    default=60.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="For everything.",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Images of a pass. [128 on a GPU, 8 on a CPU]")
@command.model_option("Whose convolutions and BatchNorms.")
@click.option("--quick", is_flag=True, help="Tiny sizes: to see that it works, not how fast.")
@command.out_option()
def main(
    device: torch.device, seconds: float, batch_size: int | None, model: str, quick: bool, out: Path | None
) -> None:
    """Time copies, matrix products, and a network's convolutions and BatchNorms, each alone, in plain torch."""
    setting = sizes(device, quick=quick)
    groups = table_of_cases(model, batch_size or usual_batch(device, quick=quick), setting)
    timer = Timer(setting, QueuedClock(device) if device.type == "cuda" else HostClock(), seconds)
    measured: list[Timed] = []
    with command.results(device, out) as results:
        results.console.print(f"timing {sum(map(len, groups))} cases within {seconds:g} s, shapes of {model}")
        rows: list[PeakRow] = []
        with no_garbage_collection():
            for group in timer.timed(groups):
                measured += group
                rows += rows_of(results.facts, group, measured)
                results.write("peaks.csv", rows)
        rows += steps_of(rows)
        results.write("peaks.csv", rows)
        for shown in (*tables(rows), *summary(rows), *notes(measured)):
            results.console.print(shown)
    if any(one.failed for one in measured):
        raise click.ClickException("cases failed, and so were not timed: see above")


def sizes(device: torch.device, *, quick: bool) -> PeakSetting:
    """Sizes that are large for the device."""
    if quick:
        return PeakSetting(device, 64, 2**16, MIN_ROUNDS, 1e-3)
    beyond = op_cases.beyond(machine.cache_bytes(device))
    return (
        PeakSetting(device, 8192, beyond, sample_s=1e-3)
        if device.type == "cuda"
        else PeakSetting(device, 512, beyond)
    )


def usual_batch(device: torch.device, *, quick: bool) -> int:
    """Default of --batch-size."""
    return 2 if quick else 128 if device.type == "cuda" else 8


def table_of_cases(model: str, batch_size: int, setting: PeakSetting) -> list[list[PeakCase]]:
    """Groups of cases of a network, on images of 32x32 pixels or of the size that it is made for."""
    meant = models.get(model).input_sizes
    side = 32 if 32 in meant else meant[0]
    network, images = models.build(model, 10), (batch_size, 3, side, side)
    layers = convolutions.layers(network, images)
    run = config.load({"method": METHOD, "model": model})
    work = convolutions.of_step(layers, assemble.method_of(run), run)
    return peak_cases.groups(layers, peak_cases.norms(network, images), work, setting)


@dataclass
class Timed:
    """A case, its seconds in each round, or why there are none. failed: it should have run."""

    case: PeakCase
    seconds: list[float] = field(default_factory=list)
    note: str = ""
    failed: bool = False
    call: Call | None = None
    count: int = 1

    def rate(self, amount: int | None) -> float | None:
        """Amount a second, of that amount in a call."""
        return amount / statistics.median(self.seconds) if amount and self.seconds else None


class Timer:
    """Times groups of cases; the time that is left is divided over the cases that are left. now: in seconds."""

    def __init__(
        self, setting: PeakSetting, clock: Clock, seconds: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._setting = setting
        self._clock = clock
        self._now = now
        self._end = now() + seconds
        # torch keeps what cuDNN chose by thread and shape, however it was chosen: each plan needs its own thread.
        self._threads = {plan: ThreadPoolExecutor(1) for plan in peak_cases.PLANS}

    def timed(self, groups: Sequence[Sequence[PeakCase]]) -> Iterator[list[Timed]]:
        """Time the groups, and give each when it is done."""
        left = sum(map(len, groups))
        for group in groups:
            share = (self._end - self._now()) * len(group) / left
            left -= len(group)
            yield self._take_turns([Timed(case) for case in group], self._now() + share)

    def _take_turns(self, group: list[Timed], until: float) -> list[Timed]:
        for one in group:
            self._attempt(one, self._prepare)
        for turn in range(self._setting.rounds):
            if turn >= MIN_ROUNDS and self._now() >= until:
                break
            for one in rotated(group, turn):
                self._attempt(one, self._sample)
        for one in group:
            one.call = None  # its operands make room for others
            if len(one.seconds) < MIN_ROUNDS:
                one.seconds, one.note = [], one.note or NO_TIME
        return group

    def _attempt(self, one: Timed, work: Callable[[Timed], None]) -> None:
        if one.note or self._now() >= self._end:
            return
        try:
            with peak_cases.settled(one.case):
                if one.case.plan:
                    self._threads[one.case.plan].submit(work, one).result()
                else:
                    work(one)
        except NotImplementedError as error:
            one.note = f"not supported: {first_line(error)}"
        except RuntimeError as error:
            one.note, one.failed = f"failed: {type(error).__name__}: {first_line(error)}", True

    def _prepare(self, one: Timed) -> None:
        """The first call, which chooses an algorithm, and how many calls make a sample."""
        beyond = math.ceil(self._setting.beyond_bytes / one.case.bytes_moved)
        operands = 1 if one.case.cached else min(MAX_OPERANDS, beyond)
        turns = itertools.cycle([one.case.make() for _ in range(operands)])
        one.call = lambda: next(turns)()
        one.call()
        one.count = min(MAX_QUEUED, calls_within(self._setting.sample_s, self._seconds(one)))

    def _sample(self, one: Timed) -> None:
        one.seconds.append(self._seconds(one))

    def _seconds(self, one: Timed) -> float:
        assert one.call is not None
        seconds = self._clock.seconds(one.call, one.count)
        if not 0 < seconds < math.inf:
            raise RuntimeError(f"the clock told {seconds} s")
        return seconds


def first_line(error: Exception) -> str:
    """First line of an error's message."""
    return (str(error).strip().splitlines() or [""])[0]


def rows_of(facts: machine.Facts, group: Sequence[Timed], measured: Sequence[Timed]) -> list[PeakRow]:
    """Rows of a group, beside the matrix product of its format and the largest copy. measured: up to the group."""
    copies = [one.rate(one.case.bytes_moved) for one in measured if one.case.op == COPY]
    rows = []
    for one in group:
        same = (other for other in measured if (other.case.op, other.case.format) == (MATMUL, one.case.format))
        product = next((other.rate(other.case.flops) for other in same), None)
        rows.append(
            csv_rows.peak_row(facts, one.case, one.seconds, one.note, product, copies[-1] if copies else None)
        )
    return rows


def steps_of(rows: Sequence[PeakRow]) -> list[PeakRow]:
    """A step's convolutions together, by format and plan; the first of them in float32, as the engine runs it."""
    result = []
    for form, plan in dict.fromkeys((row.format, row.plan) for row in rows if row.op == CONVOLUTION):
        parts = [row for row in rows if row.plan == plan and _of_step(row, form)]
        missing = sum(row.median_s is None for row in parts)
        seconds, gflop = total(parts), sum((row.times or 0) * (row.gflop or 0.0) for row in parts)
        product = next((row.tflop_per_s for row in rows if row.op == MATMUL and row.format == form), None)
        tflop_per_s = gflop / seconds / 1e3 if seconds else None
        row = replace(
            parts[0],
            op=STEP,
            kind=METHOD,
            shape="all convolutions",
            format=form,
            times=1,
            rounds=min(row.rounds for row in parts),
            median_s=seconds,
            q10_s=None,
            q90_s=None,
            gflop=gflop,
            tflop_per_s=tflop_per_s,
            share_of_matmul=tflop_per_s / product if tflop_per_s and product else None,
            bytes_moved=None,
            gb_per_s=None,
            share_of_copy=None,
            note=f"not measured: {missing} of {len(parts)} convolutions are missing" if missing else "",
        )
        result.append(row)
    return result


def _of_step(row: PeakRow, form: str) -> bool:
    if row.op == STEM:
        return row.format == FLOAT32.name and row.layout == CHANNELS_LAST
    return row.op == CONVOLUTION and row.format == form


def total(rows: Sequence[PeakRow]) -> float | None:
    """Seconds of all, each as often as it runs; None where one was not measured."""
    seconds = [None if row.median_s is None else row.median_s * (row.times or 0) for row in rows]
    measured = [one for one in seconds if one is not None]
    return sum(measured) if measured and len(measured) == len(seconds) else None


# The number that a table shows of a row, and its unit.
SHOWN: dict[str, tuple[str, Callable[[PeakRow], float | None]]] = {
    COPY: ("GB/s", lambda row: row.gb_per_s),
    MATMUL: ("TFLOP/s", lambda row: row.tflop_per_s),
    CONVOLUTION: ("TFLOP/s", lambda row: row.tflop_per_s),
    STEM: ("us", lambda row: None if row.median_s is None else row.median_s * 1e6),
    BATCH_NORM: ("GB/s", lambda row: row.gb_per_s),
}


def tables(rows: Sequence[PeakRow]) -> Iterator[Table]:
    """Table of each op: a line for a shape, a column for a way to run it."""
    for op, (unit, shown) in SHOWN.items():
        mine = [row for row in rows if row.op == op]
        ways = dict.fromkeys(_way(row) for row in mine)
        table = Table(title=f"{op}, {unit}", title_justify="left", box=box.SIMPLE)
        for heading in ("shape", "kind"):
            table.add_column(heading, no_wrap=True)
        for way in ways:
            table.add_column("\n".join(filter(None, way)), justify="right")
        cells = {(row.shape, row.kind, _way(row)): shown(row) for row in mine}
        for line in dict.fromkeys((row.shape, row.kind) for row in mine):
            values = (cells.get((*line, way)) for way in ways)
            table.add_row(*line, *("-" if value is None else f"{value:.4g}" for value in values))
        yield table


def _way(row: PeakRow) -> tuple[str, str, str]:
    return row.format, row.layout, row.plan


def summary(rows: Sequence[PeakRow]) -> list[str]:
    """Lines that compare plans, formats and layouts."""
    return [*_plans(rows), *_formats(rows), *_layouts(rows), *_stems(rows)]


def _plans(rows: Sequence[PeakRow]) -> Iterator[str]:
    steps = [row for row in rows if row.op == STEP]
    for form in dict.fromkeys(row.format for row in steps):
        mine = {row.plan: row for row in steps if row.format == form}
        told = []
        for plan, row in mine.items():
            share = "" if row.share_of_matmul is None else f" ({row.share_of_matmul:.0%} of the matrix product)"
            told.append(f"{plan} {_ms(row.median_s)}{share}".strip())
        line = f"a step's convolutions in {form}: {', '.join(told)}"
        pair = [mine[plan].median_s for plan in (DETERMINISTIC, BENCHMARK) if plan in mine]
        yield line + (f"; deterministic by benchmark {_ratio(*pair)}" if len(pair) == 2 else "")


def _formats(rows: Sequence[PeakRow]) -> Iterator[str]:
    seconds = {(row.format, row.plan): row.median_s for row in rows if row.op == STEP}
    told = [
        f"{plan} {_ratio(seconds.get((FLOAT16.name, plan)), seconds.get((BFLOAT16.name, plan)))}".strip()
        for plan in dict.fromkeys(plan for _, plan in seconds)
    ]
    yield f"a step's convolutions in float16 by bfloat16: {', '.join(told)}"


def _layouts(rows: Sequence[PeakRow]) -> Iterator[str]:
    norms = [row for row in rows if row.op == BATCH_NORM]
    copies = [row.gb_per_s for row in rows if row.op == COPY]
    for form in dict.fromkeys(row.format for row in norms):
        told = []
        for layout in dict.fromkeys(row.layout for row in norms):
            mine = [row for row in norms if (row.format, row.layout) == (form, layout)]
            seconds = total(mine)
            moved = sum((row.times or 0) * (row.bytes_moved or 0) for row in mine)
            told.append(f"{layout} {_gb_per_s(moved / seconds / 1e9 if seconds else None)}")
        yield f"BatchNorm in {form}: {', '.join(told)}; the copy {_gb_per_s(copies[-1] if copies else None)}"


def _stems(rows: Sequence[PeakRow]) -> Iterator[str]:
    stems = [row for row in rows if row.op == STEM and row.plan in ("", DETERMINISTIC)]
    for layout in dict.fromkeys(row.layout for row in stems):
        told = []
        for form in dict.fromkeys(row.format for row in stems):
            mine = [row for row in stems if (row.format, row.layout) == (form, layout)]
            told.append(f"{form} {_ms(total(mine))}")
        yield f"a step's first convolution, {layout}: {', '.join(told)}"


def _ms(seconds: float | None) -> str:
    return "not measured" if seconds is None else f"{seconds * 1e3:.4g} ms"


def _gb_per_s(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g} GB/s"


def _ratio(one: float | None, other: float | None) -> str:
    return "not measured" if one is None or other is None else f"{one / other:.3g}"


def notes(measured: Sequence[Timed]) -> list[str]:
    """A line for each case that has no figures."""
    return [f"{one.case.name}: {one.note}" for one in measured if one.note]


if __name__ == "__main__":
    main()
