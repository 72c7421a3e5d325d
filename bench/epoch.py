"""Seconds an epoch, beside the paper's Table 14: `python -m bench.epoch --table14`. README.md says how."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.table import Table

from bench import machine, results, steps
from bench.results import EpochRow
from bench.step import SynchronisedClock, peak_of_a_process
from bench.steps import TEXTBOOK, VARIANTS, Workload
from bench.timing import no_garbage_collection, rotated

EPOCH_IMAGES = 50_000
# Seconds an epoch and MiB of the paper's Table 14: CIFAR-10, ResNet-18, batch 128, on a GPU that it does not name.
TABLE_14 = {"ard": (156.12, 3253), "iad1": (182.01, 3977), "akd2": (147.10, 2397), "iad2": (167.23, 3249)}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--table14", "_", is_flag=True, required=True, help="The four methods of the paper's Table 14.")
@click.option("--variant", "variants", type=click.Choice(list(VARIANTS)), multiple=True, help="Repeatable.")
@click.option("--model", default="resnet18", show_default=True, help="Student and teachers.")
@click.option("--batch-size", default=128, show_default=True, type=click.IntRange(min=1))
@click.option("--dataset", default="cifar10", show_default=True, help="Of the images, or random.")
@click.option("--device", "device_name", default="auto", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--steps", "count", default=3, show_default=True, type=click.IntRange(min=2), help="Steps of each.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the results. [bench/results/NAME-DATE]")
def main(
    _: bool,
    variants: Sequence[str],
    model: str,
    batch_size: int,
    dataset: str,
    device_name: str,
    count: int,
    out: Path | None,
) -> None:
    """Time so many steps of each method, after their warm-up, and scale them to an epoch of 50,000 images."""
    try:
        device = machine.device(device_name)
        images = steps.images_of(dataset, batch_size)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    variants = variants or (TEXTBOOK, "all" if device.type == "cuda" else "amp")
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    facts = machine.facts(device)
    folder = out or machine.results_folder(facts)
    folder.mkdir(parents=True, exist_ok=True)
    workloads = {name: Workload(name, model, batch_size, images, device) for name in TABLE_14}
    per_epoch = math.ceil(EPOCH_IMAGES / batch_size)
    samples = measure(workloads, variants, count)
    rows = []
    for (variant, method), seconds in samples.items():
        q10, q90 = results.quantiles(seconds)
        rows.append(
            EpochRow(
                **facts,
                method=method,
                model=model,
                batch_size=batch_size,
                variant=variant,
                steps=len(seconds),
                epoch_s=per_epoch * statistics.median(seconds),
                q10_epoch_s=per_epoch * q10,
                q90_epoch_s=per_epoch * q90,
                relative_to_ard=1 / (results.speedup(samples[variant, "ard"], seconds) or 1),
                peak_mib=peak_of_a_process(workloads[method], variant),
                table14_epoch_s=TABLE_14[method][0],
                table14_relative_to_ard=TABLE_14[method][0] / TABLE_14["ard"][0],
                table14_mib=TABLE_14[method][1],
            )
        )
    results.write(folder / "epoch.csv", rows)
    console.print(table(rows))
    console.print(f"Scaled from {count} steps of {batch_size} images to {per_epoch}; evaluation is not in it.")
    console.print(
        "The paper names no GPU, and its MiB hold context and allocator: across hardware compare the ratios."
    )
    console.print(f"written: {folder / 'epoch.csv'}")


def measure(
    workloads: dict[str, Workload], variants: Sequence[str], count: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of each step, by variant and method; they take turns, and a first one is not counted."""
    calls = {
        (variant, method): workload.step(VARIANTS[variant])
        for variant in variants
        for method, workload in workloads.items()
    }
    clock = SynchronisedClock(next(iter(workloads.values())).device)
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    with no_garbage_collection():
        for turn in range(count + 1):
            for key, step in rotated(list(calls.items()), turn):
                VARIANTS[key[0]].settle()
                samples[key].append(clock.seconds(step, 1))
    return {key: taken[1:] for key, taken in samples.items()}


def table(rows: Sequence[EpochRow]) -> Table:
    """Ours beside the paper's."""
    first = rows[0]
    where = first.processor if first.device == "cpu" else first.device
    title = f"{first.model}, batch of {first.batch_size}, {where}, beside Table 14"
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading in ("variant", "method"):
        result.add_column(heading, no_wrap=True)
    for heading in ("s/epoch", "x ARD", "MiB", "Table 14: s/epoch", "x ARD", "MiB"):
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(
            row.variant, row.method, f"{row.epoch_s:,.1f}", f"{row.relative_to_ard:.3f}", f"{row.peak_mib:,.0f}",
            f"{row.table14_epoch_s:.2f}", f"{row.table14_relative_to_ard:.3f}", f"{row.table14_mib:,}",
        )  # fmt: skip
    return result


if __name__ == "__main__":
    main()
