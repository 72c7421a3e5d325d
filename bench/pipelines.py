"""Time the pipelines, beside torch's DataLoader: `python -m bench.pipelines`. README.md says how."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import click
import torch
from rich import box
from rich.table import Table

from bench import gate
from bench.lib import command, loading, memory
from bench.lib.output import chart, csv_rows, targets
from bench.lib.output.csv_rows import PipelineRow
from bench.lib.timing import no_garbage_collection, processor_seconds, rotated
from engine.pipelines.selection import PIPELINE_KINDS

PIPELINE_TESTS = tuple(
    gate.CHECKOUT / "tests" / "pipelines" / name for name in ("test_contract.py", "test_tensor.py")
)
QUICK_IMAGES = 300


@command.command
@command.out_option()
@command.device_option()
@click.option("--data", "names", type=click.Choice(list(loading.DATA)), multiple=True, help="Repeatable. [all]")
@click.option("--rounds", type=click.IntRange(2), default=7, show_default=True, help="Epochs of each that count.")
@click.option("--quick", is_flag=True, help="Few images: to see that it works, not how fast.")
def main(out: Path | None, device: torch.device, names: Sequence[str], rounds: int, quick: bool) -> None:
    """Time epochs of the pipelines and of torch's DataLoader, once the pipelines' tests have passed."""
    if not gate.tests_pass(PIPELINE_TESTS, PIPELINE_KINDS, "cpu"):
        raise click.ClickException("the pipelines' tests do not pass, so nothing is timed")
    names = names or tuple(loading.DATA)
    with command.results(device, out) as results:
        rows: list[PipelineRow] = []
        for name in names:
            with TemporaryDirectory() as scratch:
                try:
                    found = loading.DATA[name](Path(scratch), device, QUICK_IMAGES if quick else None)
                except ValueError as error:
                    raise click.ClickException(str(error)) from None
                for line in found.absent:
                    results.console.print(line)
                results.console.print(
                    f"timing {name}: {len(found.epochs)} candidates, {found.images:,} images an epoch"
                )
                samples = measure(found.epochs, rounds, device)
            rows += csv_rows.pipeline_rows(
                results.facts, name, found.size, loading.BATCH_SIZE, found.images, samples
            )
            results.write("pipelines.csv", rows)
        chart.draw_pipelines(results.path("pipelines.png"), rows)
        results.console.print(table(rows))
        growth = memory.growth_of_a_process() if "cifar10" in names and not quick else None
        for line in targets.pipeline_verdicts(rows, growth):
            results.console.print(line)


class Sample(NamedTuple):
    """Seconds of an epoch: on the clock, and of processors, those of child processes too."""

    wall: float
    cpu: float


def measure(
    epochs: Mapping[str, Callable[[int], Iterator[Any]]], rounds: int, device: torch.device
) -> dict[str, list[Sample]]:
    """Samples of each candidate; a round begins with the next one each time. A first round is not counted."""
    samples: dict[str, list[Sample]] = {name: [] for name in epochs}
    with no_garbage_collection():
        for turn in range(rounds + 1):
            for name, epoch in rotated(list(epochs.items()), turn):
                samples[name].append(sample(epoch(turn), device))
    return {name: taken[1:] for name, taken in samples.items()}


def sample(batches: Iterator[Any], device: torch.device) -> Sample:
    """Seconds of one epoch, run through."""
    before, start = processor_seconds(), time.perf_counter()
    deque(batches, maxlen=0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Sample(time.perf_counter() - start, processor_seconds() - before)


def table(rows: Sequence[PipelineRow]) -> Table:
    """Table of the rows."""
    result = Table(box=box.SIMPLE)
    for heading in ("data", "by"):
        result.add_column(heading, no_wrap=True)
    for heading in ("images/s", "10 %", "90 %", f"x {loading.BASELINE}", "CPU s / 10,000 images"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        speeds = (f"{speed:,.0f}" for speed in (row.images_per_s, row.q10_images_per_s, row.q90_images_per_s))
        result.add_row(row.data, row.pipeline, *speeds, f"{row.speedup:.2f}", f"{row.cpu_s_per_10k_images:.2f}")
    return result


if __name__ == "__main__":
    main()
