"""Time the ops: `python -m bench.kernels`. The protocol stands in README.md."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench import gate
from bench.lib import cases, chart, csv_rows, machine, targets
from bench.lib.cases import Case
from bench.lib.csv_rows import COMPILE, COPY, EAGER, Row
from bench.lib.timing import Candidate, Clock, CudaClock, HostClock, captured, interleaved, preferring, warm_up
from engine.kernels import dispatch


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the results. [bench/results/NAME-DATE]")
@click.option("--device", "device_name", default="auto", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--op", "ops", type=click.Choice(cases.OPS), multiple=True, help="This op alone; repeatable. [all]")
@click.option("--quick", is_flag=True, help="Tiny sizes, no torch.compile: to see that it works, not how fast.")
def main(out: Path | None, device_name: str, ops: Sequence[str], quick: bool) -> None:
    """Time the ops, each implementation forward and backward, once their tests have passed."""
    try:
        device = machine.device(device_name)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    ops = ops or cases.OPS
    if not gate.tests_pass(gate.checks(ops, device.type), ops, device.type):
        raise click.ClickException("the ops' tests do not pass, so nothing is timed")
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    facts = machine.facts(device)
    folder = out or machine.results_folder(facts)
    folder.mkdir(parents=True, exist_ok=True)
    console.print(dispatch.describe(device))
    for line in absent(ops, device):
        console.print(line)
    bench = Bench(device, quick=quick)
    rows: list[Row] = []
    for case in cases.table(bench.cache_bytes, quick=quick):
        if case.op in ops:
            console.print(f"timing {case.op} {case.shape}, {case.setting}, {case.dtype}")
            rows += bench.rows(case, facts)
            csv_rows.write(folder / "kernels.csv", rows)  # each time: a run that is cut short leaves what it has
    chart.draw(folder / "kernels.png", rows)
    for op in ops:
        console.print(table(op, rows))
    for line in targets.verdicts(rows):
        console.print(line)
    console.print(f"written: {folder / 'kernels.csv'} and kernels.png")
    if bench.failures:
        raise click.ClickException("failed, and so not timed: " + "; ".join(bench.failures))


@dataclass
class Bench:
    """Times cases on a device. failures: what should have been timed and could not."""

    device: torch.device
    quick: bool
    failures: list[str] = field(default_factory=list)

    @property
    def cache_bytes(self) -> int:
        return machine.cache_bytes(self.device)

    def rows(self, case: Case, facts: machine.Facts) -> list[Row]:
        """Warm up, time and compare the candidates of a case, in each mode."""
        rounds, seconds = (3, 0.001) if self.quick else (15, 0.02)
        torch._dynamo.reset()  # or the compiler gives up after so many sizes
        candidates = list(self._candidates(case))
        rows: list[Row] = []
        for mode, clock, in_graph in self._modes():
            ready, counts = [], []
            for candidate in candidates:
                try:
                    if in_graph:
                        with preferring(candidate.preference):
                            candidate = Candidate(candidate.name, captured(candidate.call))
                    counts.append(warm_up(candidate, clock, seconds))
                    ready.append(candidate)
                except Exception as error:
                    if candidate.name == COPY:
                        raise
                    reason = (str(error).strip().splitlines() or [""])[0]
                    what = f"{case.op} {case.shape} {candidate.name} {mode}"
                    self.failures.append(f"{what}: {type(error).__name__} {reason}")
            samples = interleaved(ready, counts, clock, rounds)
            rows += csv_rows.rows(facts, case, mode, samples, self.cache_bytes)
        return rows

    def _modes(self) -> list[tuple[str, Clock, bool]]:
        """By name: the clock, and whether a call is captured as a CUDA graph."""
        if self.device.type == "cpu":
            return [("call", HostClock(), False)]
        idle, busy = CudaClock(self.device, idle=True), CudaClock(self.device, idle=False)
        return [("call", idle, False), ("graph", busy, True)]

    def _candidates(self, case: Case) -> Iterator[Candidate]:
        calls = case.calls(self.device)
        yield Candidate(EAGER, calls.eager)
        if not self.quick:
            yield Candidate(COMPILE, calls.compiled)
        for name in fused(case.op, self.device):
            if not dispatch.missing(name, self.device.type):
                yield Candidate(name, calls.public, preference=name)
        yield Candidate(COPY, cases.copy(case.footprint, self.device))


def fused(op: str, device: torch.device) -> list[str]:
    """The implementations that an op has for a device, the reference aside."""
    return [name for name in dispatch.TABLE[op][device.type] if name != "reference"]


def absent(ops: Sequence[str], device: torch.device) -> list[str]:
    """A line for each implementation that is not timed because it is not there."""
    reasons = {(op, name): dispatch.missing(name, device.type) for op in ops for name in fused(op, device)}
    return [f"not timed: {op} by {name}: {reason}" for (op, name), reason in reasons.items() if reason]


def table(op: str, rows: Sequence[Row]) -> Table:
    """What a reader wants of an op's rows."""
    result = Table(title=op, title_justify="left", box=box.SIMPLE)
    for heading in ("shape", "", "by"):
        result.add_column(heading, no_wrap=True)
    for heading in ("median", "10 %", "90 %", "x eager", "x compile", "GB/s", "of copy", "images/s"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.op == op:
            result.add_row(
                row.shape, row.variant, row.implementation + ("" if row.mode == "call" else f", {row.mode}"),
                *map(duration, (row.median_s, row.q10_s, row.q90_s)),
                number(row.speedup_over_eager), number(row.speedup_over_compile),
                f"{row.gb_per_s:.3g}", f"{row.share_of_copy:.0%}",
                "" if row.images_per_s is None else f"{row.images_per_s:,.0f}",
            )  # fmt: skip
    return result


def duration(seconds: float) -> str:
    """In microseconds below a millisecond."""
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def number(value: float | None) -> str:
    """With two decimals; nothing where there is none."""
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
