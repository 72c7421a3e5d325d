"""Time the ops: `python -m bench.kernels`. README.md says how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from rich import box
from rich.table import Table

from bench import gate
from bench.lib import command, machine
from bench.lib.calls import op_cases
from bench.lib.calls.op_cases import COMPILE, COPY, EAGER, OpCase
from bench.lib.output import chart, csv_rows, targets
from bench.lib.output.csv_rows import OpRow, cell
from bench.lib.timing import Candidate, Clock, CudaClock, HostClock, captured, interleaved, preferring, warm_up
from engine.kernels import dispatch


@command.command
@command.out_option()
@command.device_option()
@click.option(
    "--op", "ops", type=click.Choice(op_cases.OPS), multiple=True, help="This op alone; repeatable. [all]"
)
@click.option("--quick", is_flag=True, help="Tiny sizes, no torch.compile: to see that it works, not how fast.")
def main(out: Path | None, device: torch.device, ops: Sequence[str], quick: bool) -> None:
    """Time the ops, each implementation forward and backward, once their tests have passed."""
    ops = ops or op_cases.OPS
    if not gate.tests_pass(gate.checks(ops, device.type), ops, device.type):
        raise click.ClickException("the ops' tests do not pass, so nothing is timed")
    bench = Bench(device, quick=quick)
    with command.results(device, out) as results:
        for line in (dispatch.describe(device), *absent(ops, device)):
            results.console.print(line)
        rows: list[OpRow] = []
        for case in op_cases.table(bench.cache_bytes, quick=quick):
            if case.op in ops:
                results.console.print(f"timing {case.op} {case.shape}, {case.setting}, {case.dtype}")
                rows += bench.rows(case, results.facts)
                results.write("kernels.csv", rows)
        chart.draw(results.path("kernels.png"), rows)
        for op in ops:
            results.console.print(table(op, rows))
        for line in targets.verdicts(rows):
            results.console.print(line)
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

    def rows(self, case: OpCase, facts: machine.Facts) -> list[OpRow]:
        """Warm up, time and compare the candidates of a case, in each mode."""
        rounds, seconds = (3, 0.001) if self.quick else (15, 0.02)
        torch._dynamo.reset()  # or the compiler gives up after so many sizes
        candidates = list(self._candidates(case))
        rows: list[OpRow] = []
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
        """Name of each mode, its clock, and True if a call is captured as a CUDA graph."""
        if self.device.type == "cpu":
            return [("call", HostClock(), False)]
        idle, busy = CudaClock(self.device, idle=True), CudaClock(self.device, idle=False)
        return [("call", idle, False), ("graph", busy, True)]

    def _candidates(self, case: OpCase) -> Iterator[Candidate]:
        calls = case.calls(self.device)
        yield Candidate(EAGER, calls.eager)
        if not self.quick:
            yield Candidate(COMPILE, calls.compiled)
        for name in fused(case.op, self.device):
            if not dispatch.missing(name, self.device.type):
                yield Candidate(name, calls.public, preference=name)
        yield Candidate(COPY, op_cases.copy(case.footprint, self.device))


def fused(op: str, device: torch.device) -> list[str]:
    """The implementations that an op has for a device, the reference aside."""
    return [name for name in dispatch.SERVED_BY[op].get(device.type, ()) if name != "reference"]


def absent(ops: Sequence[str], device: torch.device) -> list[str]:
    """A line for each implementation that is not timed because it is not there."""
    reasons = {(op, name): dispatch.missing(name, device.type) for op in ops for name in fused(op, device)}
    return [f"not timed: {op} by {name}: {reason}" for (op, name), reason in reasons.items() if reason]


def table(op: str, rows: Sequence[OpRow]) -> Table:
    """Table of an op's rows."""
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
                cell("{:.2f}", row.speedup_over_eager), cell("{:.2f}", row.speedup_over_compile),
                f"{row.gb_per_s:.3g}", f"{row.share_of_copy:.0%}",
                cell("{:,.0f}", row.images_per_s),
            )  # fmt: skip
    return result


def duration(seconds: float) -> str:
    """Text of a duration: microseconds below a millisecond."""
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


if __name__ == "__main__":
    main()
