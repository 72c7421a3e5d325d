"""Time epochs, beside the paper's Table 14: `python -m bench.epoch`. README.md says how."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.lib import command, machine
from bench.lib.memory import Peaks
from bench.lib.output import csv_rows
from bench.lib.output.csv_rows import EpochRow, cell
from bench.lib.steps import real_epoch
from bench.lib.steps.variants import TEXTBOOK, VARIANTS, Workload, images_of
from bench.lib.timing import EPOCH_IMAGES, SynchronisedClock, no_garbage_collection, rotated
from bench.step import STEPS_PER_ROUND, peaks_of_a_process, warmed_up

# Seconds an epoch and MiB of the paper's Table 14: CIFAR-10, ResNet-18, batch 128, on a GPU that it does not name.
TABLE_14 = {"ard": (156.12, 3253), "iad1": (182.01, 3977), "akd2": (147.10, 2397), "iad2": (167.23, 3249)}
REAL = "real"


# many parameters: one for each option
@command.command
@click.option("--table14", "scaled", is_flag=True, help="Some steps of each method, scaled to an epoch.")
@click.option("--real", is_flag=True, help="Two whole epochs of each by the trainer; the second counts.")
@click.option("--method", "names", multiple=True, type=click.Choice(list(TABLE_14)), help="Repeatable. [all]")
@click.option("--variant", "variants", type=click.Choice(list(VARIANTS)), multiple=True, help="Repeatable.")
@command.model_option()
@command.batch_size_option()
@click.option("--dataset", default="cifar10", show_default=True, help="Of the images; with --table14 also random.")
@command.device_option()
@click.option(
    "--steps", "rounds", default=3, show_default=True, type=click.IntRange(min=2), help="Rounds of each."
)
@click.option("--limit-train", type=click.IntRange(min=1), help="Images of an epoch of --real. [all]")
@click.option(
    "--budget", type=click.IntRange(min=1), help="Seconds of --real: a method that no longer fits waits."
)
@command.out_option()
def main(
    scaled: bool,
    real: bool,
    names: Sequence[str],
    variants: Sequence[str],
    model: str,
    batch_size: int,
    dataset: str,
    device: torch.device,
    rounds: int,
    limit_train: int | None,
    budget: int | None,
    out: Path | None,
) -> None:
    """Time an epoch of the methods of the paper's Table 14, after their warm-up: --table14 or --real."""
    if scaled == real:
        raise click.UsageError("one of --table14 and --real is needed")
    if (real and variants) or (scaled and (limit_train or budget)):
        raise click.UsageError("--variant belongs to --table14, --limit-train and --budget belong to --real")
    chosen = [name for name in TABLE_14 if name in (names or TABLE_14)]
    missing: list[str] = []
    if real:
        keys = {
            "model": model, "batch_size": batch_size, "dataset": dataset, "device": str(device), "amp": True,
            "limit_train": limit_train,
        }  # fmt: skip
        with command.refused():
            real_epoch.check(keys)
        with command.results(device, out) as results:
            show(real_rows(results, chosen, keys, budget, missing), results.console)
    else:
        with command.refused():
            images = images_of(dataset, batch_size)
        workloads = {name: Workload(name, model, batch_size, images, device) for name in chosen}
        variants = variants or (TEXTBOOK, "all" if device.type == "cuda" else "amp")
        with command.results(device, out) as results:
            rows = scaled_rows(results.facts, workloads, variants, rounds)
            results.write("epoch.csv", rows)
            steps = math.ceil(EPOCH_IMAGES / batch_size)
            results.console.print(
                f"Scaled from rounds of steps of {batch_size} images to {steps} steps, without evaluation."
            )
            show(rows, results.console)
    if missing:
        raise click.ClickException("; ".join(missing))


def show(rows: Sequence[EpochRow], console: Console) -> None:
    """Print the rows beside the paper's, and what cannot be compared."""
    if rows:
        console.print(table(rows))
        console.print(
            "The paper names no GPU, and its MiB hold context and allocator: across hardware compare ratios."
        )


def scaled_rows(
    facts: machine.Facts, workloads: Mapping[str, Workload], variants: Sequence[str], rounds: int
) -> list[EpochRow]:
    """Rows of each method: so many rounds of steps, scaled to an epoch of 50,000 images."""
    samples = measure(workloads, variants, rounds)
    rows = []
    for (variant, method), seconds in samples.items():
        workload = workloads[method]
        per_epoch = math.ceil(EPOCH_IMAGES / workload.batch_size)
        ard = csv_rows.speedup(samples.get((variant, "ard")), seconds)
        row = _row(
            facts, workload.method, workload.model, workload.batch_size, variant,
            peaks=peaks_of_a_process(workload, variant),
            images=EPOCH_IMAGES,
            steps=per_epoch,
            epoch_s=per_epoch * statistics.median(seconds),
            quantiles=[per_epoch * one for one in csv_rows.quantiles(seconds)],
            relative_to_ard=1 / ard if ard else None,
        )  # fmt: skip
        rows.append(row)
    return rows


def real_rows(
    results: command.Results,
    names: Sequence[str],
    keys: Mapping[str, Any],
    budget: float | None,
    missing: list[str],
) -> list[EpochRow]:
    """A row of each method, written as soon as it is there. missing: takes the others, and why."""
    rows: list[EpochRow] = []
    began, longest = time.monotonic(), 0.0
    for name in names:
        left = None if budget is None else budget - (time.monotonic() - began)
        if left is not None and left < longest:
            missing.append(f"{name}: left out, {left:.0f} s of the budget are left, and one took {longest:.0f} s")
            continue
        start = time.monotonic()
        try:
            epoch = real_epoch.timed({"method": name, **keys}, left)
        except ChildProcessError as error:
            missing.append(f"{name}: {error}")
            continue
        longest = max(longest, time.monotonic() - start)
        ard = next((row.epoch_s for row in rows if row.method == "ard"), epoch.seconds if name == "ard" else None)
        row = _row(
            results.facts, name, keys["model"], keys["batch_size"], REAL,
            peaks=epoch.peaks,
            images=epoch.images,
            steps=epoch.steps,
            epoch_s=epoch.seconds,
            evaluation_s=epoch.evaluation_s,
            relative_to_ard=epoch.seconds / ard if ard else None,
        )  # fmt: skip
        rows.append(row)
        results.write("epoch-real.csv", rows)
    return rows


def _row(
    facts: machine.Facts,
    method: str,
    model: str,
    batch_size: int,
    variant: str,
    *,
    peaks: Peaks,
    quantiles: Sequence[float | None] = (None, None),
    evaluation_s: float | None = None,
    **measured: Any,
) -> EpochRow:
    """Row of a method, beside its figures in Table 14."""
    seconds, mebibytes = TABLE_14[method]
    return EpochRow(
        **facts,
        method=method,
        model=model,
        batch_size=batch_size,
        variant=variant,
        q10_epoch_s=quantiles[0],
        q90_epoch_s=quantiles[1],
        evaluation_s=evaluation_s,
        peak_mib=peaks.allocated,
        reserved_mib=peaks.reserved,
        smi_mib=peaks.smi,
        table14_epoch_s=seconds,
        table14_relative_to_ard=seconds / TABLE_14["ard"][0],
        table14_mib=mebibytes,
        **measured,
    )


def measure(
    workloads: Mapping[str, Workload], variants: Sequence[str], rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of a step, the mean of a round, by variant and method, which take turns."""
    calls = {
        (variant, method): warmed_up(workload, variant)[0]
        for variant in variants
        for method, workload in workloads.items()
    }
    device = next(iter(workloads.values())).device
    clock, count = SynchronisedClock(device), STEPS_PER_ROUND[device.type]
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    with no_garbage_collection():
        for turn in range(rounds):
            for key, step in rotated(list(calls.items()), turn):
                with VARIANTS[key[0]].conditions():
                    samples[key].append(clock.seconds(step, count))
    return samples


def table(rows: Sequence[EpochRow]) -> Table:
    """Table of our epochs beside the paper's."""
    first = rows[0]
    where = first.processor if first.device == "cpu" else first.device
    title = f"{first.model}, batch of {first.batch_size}, {where}, beside Table 14"
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading in ("variant", "method"):
        result.add_column(heading, no_wrap=True)
    headings = ("images", "s/epoch", "s/evaluation", "x ARD", "MiB", "reserved", "nvidia-smi")
    for heading in (*headings, "Table 14: s/epoch", "x ARD", "MiB"):
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(
            row.variant, row.method, f"{row.images:,}", f"{row.epoch_s:,.1f}",
            *(cell(form, value) for form, value in (
                ("{:,.1f}", row.evaluation_s), ("{:.3f}", row.relative_to_ard), ("{:,.0f}", row.peak_mib),
                ("{:,.0f}", row.reserved_mib), ("{:,.0f}", row.smi_mib),
            )),
            f"{row.table14_epoch_s:.2f}", f"{row.table14_relative_to_ard:.3f}", f"{row.table14_mib:,}",
        )  # fmt: skip
    return result


if __name__ == "__main__":
    main()
