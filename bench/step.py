"""Time training steps beside a textbook's and an expert's: `python -m bench.step`. README.md says how."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from rich import box
from rich.table import Table

from bench import gate
from bench.lib import command, machine
from bench.lib.calls import convolutions
from bench.lib.calls.convolutions import Work
from bench.lib.memory import Peaks
from bench.lib.output import chart, csv_rows, targets
from bench.lib.output.csv_rows import StepRow, cell
from bench.lib.steps.variants import (
    ON_CPU,
    ON_CUDA,
    TEXTBOOK,
    VARIANTS,
    Flops,
    Variant,
    Workload,
    images_of,
)
from bench.lib.timing import Call, SynchronisedClock, no_garbage_collection, rotated
from engine import models
from engine.common.lookup import is_on
from engine.runs import assemble
from engine.system import precision

STEP_TESTS = gate.CHECKOUT / "tests" / "training" / "test_exactness.py"
STEPS_PER_ROUND = {"cpu": 1, "cuda": 10}
WARM_UP = {"cpu": 1, "cuda": 4}  # a CUDA graph is captured at the second or third step


# many parameters: one for each option
@command.command
@command.methods_option(("ard", "iad1", "akd2", "iad2"))
@click.option("--variant", "variants", type=click.Choice(list(VARIANTS)), multiple=True, help="Repeatable.")
@command.model_option()
@command.batch_size_option()
@click.option("--dataset", default="cifar10", show_default=True, help="Of the images, or random.")
@command.device_option()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=2), help="Of each that count.")
@click.option(
    "--steps-per-round",
    type=click.IntRange(min=1),
    help="Between two waits for the device. [10 on a GPU, 1 on a CPU]",
)
@click.option("--no-memory", is_flag=True, help="Do not measure peak memory, a process for each variant.")
@command.out_option()
def main(
    names: Sequence[str],
    variants: Sequence[str],
    model: str,
    batch_size: int,
    dataset: str,
    device: torch.device,
    rounds: int,
    steps_per_round: int | None,
    no_memory: bool,
    out: Path | None,
) -> None:
    """Time a training step of each method in each variant, once the engine's step equals the textbook's."""
    with command.refused():
        images = images_of(dataset, batch_size)
    if not gate.tests_pass([STEP_TESTS], ["textbook"], "cpu"):
        raise click.ClickException("the engine's step is not the textbook's, so nothing is timed")
    variants = (TEXTBOOK, *(name for name in variants or _usual(device) if name != TEXTBOOK))
    count = steps_per_round or STEPS_PER_ROUND[device.type]
    with command.results(device, out) as results:
        rows: list[StepRow] = []
        for name in names:
            workload = Workload(name, model, batch_size, images, device)
            results.console.print(f"timing {name}: {', '.join(variants)}; {rounds} rounds of {count} steps")
            rows += measure(workload, variants, rounds, count, results.facts, with_memory=not no_memory)
            results.write("step.csv", rows)
            results.console.print(table(name, rows))
        chart.draw_steps(results.path("step.png"), rows)
        for line in targets.step_verdicts(rows):
            results.console.print(line)


def _usual(device: torch.device) -> tuple[str, ...]:
    return ON_CUDA if device.type == "cuda" else ON_CPU


def measure(
    workload: Workload,
    variants: Sequence[str],
    rounds: int,
    count: int,
    facts: machine.Facts,
    *,
    with_memory: bool,
) -> list[StepRow]:
    """Rows of one method. count: steps of a round."""
    peaks = {name: peaks_of_a_process(workload, name) for name in variants} if with_memory else {}
    calls, flops = {}, {}
    for name in variants:
        calls[name], flops[name] = warmed_up(workload, name)
    alone = Alone(workload)
    clock = SynchronisedClock(workload.device)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    with no_garbage_collection():
        for turn in range(rounds):
            for name, step in rotated(list(calls.items()), turn):
                with VARIANTS[name].conditions():
                    samples[name].append(clock.seconds(step, count))
            alone.time(clock, max(2, count))
    return [
        csv_rows.step_row(facts, workload, name, samples, count, alone.of_step(VARIANTS[name]), flops[name], peaks)
        for name in variants
    ]


def warmed_up(workload: Workload, name: str) -> tuple[Call, int | None]:
    """A variant's step once all is compiled, captured and allocated, and its floating-point operations.

    None where compilation hides them.
    """
    variant = VARIANTS[name]
    with variant.conditions():
        step = workload.step(variant)
        flops = None if is_on("compile", workload.config(variant).compile, auto=False) else executed(step)
        for _ in range(WARM_UP[workload.device.type] - (flops is not None)):
            step()
    return step, flops


class Alone:
    """The convolutions of a network's step, each alone, in float32 and in the format of AMP."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        device = workload.device
        amp = precision.choose(workload.config(VARIANTS["amp"])).amp_dtype or torch.float32
        self._formats = {True: amp, False: torch.float32}
        self._layers = convolutions.layers(
            models.build(workload.model, 10), (workload.batch_size, *_size(workload))
        )
        self._calls = {dtype: convolutions.calls(self._layers, dtype, device) for dtype in {amp, torch.float32}}
        self._seconds: dict[torch.dtype, list[dict[Work, float]]] = {dtype: [] for dtype in self._calls}

    def time(self, clock: SynchronisedClock, count: int) -> None:
        """A round: the mean of so many calls of each, in the trainer's conditions."""
        for dtype, group in self._calls.items():
            with VARIANTS["fp32" if dtype == torch.float32 else "amp"].conditions():
                self._seconds[dtype].append({work: clock.seconds(call, count) for work, call in group.items()})

    def of_step(self, variant: Variant) -> list[float]:
        """Seconds of the convolutions of a variant's step in each round."""
        run = self._workload.config(variant)
        method = assemble.method_of(run)
        work = convolutions.of_step(self._layers, method, run)
        return [convolutions.seconds(work, one) for one in self._seconds[self._formats[run.amp]]]


def _size(workload: Workload) -> tuple[int, ...]:
    height, width, channels = workload.images.images.shape[1:]
    return channels, height, width


def executed(call: Call) -> int:
    """Floating-point operations of convolutions and matrix products in one call."""
    with Flops() as counted:
        call()
    total: int = counted.total
    return total


def peaks_of_a_process(workload: Workload, variant: str) -> Peaks:
    """Peak memory of a variant, measured by a new process."""
    what = (variant, workload.method, workload.model, str(workload.batch_size), str(workload.device))
    command = [sys.executable, "-m", "bench.lib.steps.variants", *what]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603  # no shell
    return Peaks(**json.loads(done.stdout))


def table(method: str, rows: Sequence[StepRow]) -> Table:
    """Table of a method's rows, without the columns that none of them has."""
    mine = [row for row in rows if row.method == method]
    result = Table(
        title=f"{method}, {mine[0].model}, batch of {mine[0].batch_size}", title_justify="left", box=box.SIMPLE
    )
    columns = {
        "variant": [row.variant for row in mine],
        "s/step": [f"{row.median_s:.3f}" for row in mine],
        "10 %": [f"{row.q10_s:.3f}" for row in mine],
        "90 %": [f"{row.q90_s:.3f}" for row in mine],
        "images/s": [f"{row.images_per_s:,.1f}" for row in mine],
        "x textbook": [f"{row.speedup:.2f}" for row in mine],
        "x expert": [cell("{:.2f}", row.speedup_over_expert) for row in mine],
        "of expert-fp32": [cell("{:.3f}", row.of_expert_fp32) for row in mine],
        "from": [cell("{:.3f}", row.q10_of_expert_fp32) for row in mine],
        "to": [cell("{:.3f}", row.q90_of_expert_fp32) for row in mine],
        "GFLOP": [cell("{:,.0f}", row.gflop) for row in mine],
        "GFLOP/s": [cell("{:,.0f}", row.gflop_per_s) for row in mine],
        "of convolutions": [f"{row.share_of_convolutions:.0%}" for row in mine],
        "MiB": [cell("{:,.0f}", row.peak_mib) for row in mine],
        "reserved": [cell("{:,.0f}", row.reserved_mib) for row in mine],
        "nvidia-smi": [cell("{:,.0f}", row.smi_mib) for row in mine],
        "of textbook": [cell("{:.0%}", row.share_of_textbook_memory) for row in mine],
    }
    shown = {heading: cells for heading, cells in columns.items() if any(cells)}
    for heading in shown:
        result.add_column(heading, justify="left" if heading == "variant" else "right")
    for cells in zip(*shown.values(), strict=True):
        result.add_row(*cells)
    return result


if __name__ == "__main__":
    main()
