"""Time the pipelines and what users have today: `python -m bench.pipelines`. The protocol stands in README.md."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench import gate
from bench.lib import chart, csv_rows, loading, machine, memory, targets
from bench.lib.csv_rows import PipelineRow
from bench.lib.timing import no_garbage_collection, rotated
from engine.pipelines.choice import KINDS

TESTS = tuple(gate.ROOT / "tests" / "pipelines" / name for name in ("test_contract.py", "test_tensor.py"))
FEW = 300


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the results. [bench/results/NAME-DATE]")
@click.option("--device", "device_name", default="auto", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--data", "names", type=click.Choice(list(loading.DATA)), multiple=True, help="Repeatable. [all]")
@click.option("--rounds", type=click.IntRange(2), default=7, show_default=True, help="Epochs of each that count.")
@click.option("--quick", is_flag=True, help="Few images: to see that it works, not how fast.")
def main(out: Path | None, device_name: str, names: Sequence[str], rounds: int, quick: bool) -> None:
    """Time epochs of the pipelines and of torch's DataLoader, once the pipelines' tests have passed."""
    try:
        device = machine.device(device_name)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if not gate.tests_pass(TESTS, KINDS, "cpu"):
        raise click.ClickException("the pipelines' tests do not pass, so nothing is timed")
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    facts = machine.facts(device)
    folder = out or machine.results_folder(facts)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[PipelineRow] = []
    names = names or tuple(loading.DATA)
    for name in names:
        with TemporaryDirectory() as scratch:
            try:
                found = loading.DATA[name](Path(scratch), device, FEW if quick else None)
            except ValueError as error:
                raise click.ClickException(str(error)) from None
            for line in found.absent:
                console.print(line)
            console.print(f"timing {name}: {len(found.epochs)} candidates, {found.images:,} images an epoch")
            samples = measure(found.epochs, rounds, device)
        rows += csv_rows.pipeline_rows(facts, name, found.size, loading.BATCH, found.images, samples)
        csv_rows.write(folder / "pipelines.csv", rows)  # each time: a run that is cut short leaves what it has
    chart.draw_pipelines(folder / "pipelines.png", rows)
    console.print(table(rows))
    growth = memory.growth_of_a_process() if "cifar10" in names and not quick else None
    for line in targets.pipeline_verdicts(rows, growth):
        console.print(line)
    console.print(f"written: {folder / 'pipelines.csv'} and pipelines.png")


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
    """Run through an epoch."""
    before, start = processor_seconds(), time.perf_counter()
    deque(batches, maxlen=0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Sample(time.perf_counter() - start, processor_seconds() - before)


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def table(rows: Sequence[PipelineRow]) -> Table:
    """What a reader wants of the rows."""
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
