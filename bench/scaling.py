"""Time steps by several processes, and predict those of many GPUs: `python -m bench.scaling`; see README.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import torch
from rich import box
from rich.table import Table
from torch import nn

from bench import predict
from bench.lib import command, machine, roofline
from bench.lib.output import csv_rows
from bench.lib.output.csv_rows import PredictedScalingRow, ScalingRow
from bench.lib.roofline import GPUS
from bench.lib.steps import several_processes
from bench.lib.steps.several_processes import Taken
from bench.lib.steps.variants import images_of
from bench.lib.timing import rotated
from engine import config, models
from engine.attacks.pgd import bn_mode
from engine.runs import assemble
from engine.system.precision import Precision
from engine.training import plan

Group = tuple[int, bool]
"""Number of processes, and whether their BatchNorm is synchronised."""


class Network(NamedTuple):
    """Connection of GPUs. bandwidth: bytes a second from a GPU, each way; latency: seconds of a message."""

    bandwidth: float
    latency: float


# Assumed, from data sheets: NVLink 4 has 450 GB/s each way, and each GPU a 400 Gb/s adapter; both reach 80 %.
NVLINK, FABRIC = Network(360e9, 10e-6), Network(40e9, 20e-6)
GPUS_PER_NODE = 8
LAST_BUCKET = 25 * 2**20  # torch's default: what is sent when the backward is over
SCALING_ASSUMPTIONS = (
    "a step is that of bench.predict, compiled, without lanes, as two CUDA graphs, of gradients and of update;",
    "with synchronised BatchNorm nothing is captured, and the host launches each kernel, in at least 5 us",
    "BatchNorm over each GPU's own images",
    "gradients in float32; within a node each GPU sends 2 (N-1)/N of them over NVLink, 360 GB/s, 10 us a message",
    "between nodes each GPU sends 2 (M-1)/M of its eighth over an adapter of its own, 40 GB/s, 20 us a message",
    "they travel in one message between the graphs, beside nothing; with synchronised BatchNorm all but the last",
    "bucket (25 MiB) beside the backward of the student, two thirds of a trained pass",
    "synchronised BatchNorm adds a message of two latencies for each layer in each direction of each pass",
)


# many parameters: one for each option
@command.command
@click.option("--procs", "sizes", type=click.IntRange(min=1), multiple=True, help="Repeatable. [1 and 2]")
@click.option("--method", default="iad1", show_default=True)
@command.model_option()
@command.batch_size_option(32, "Of all processes.")
@click.option("--dataset", default="random", show_default=True, help="Of the images, or random.")
@command.device_option("cpu, or cuda: a GPU a process.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=2))
@click.option("--steps", "count", default=3, show_default=True, type=click.IntRange(min=1), help="Of a round.")
@click.option("--gpu", type=click.Choice(list(GPUS)), default="h100", show_default=True, help="To predict for.")
@command.out_option()
def main(
    sizes: Sequence[int],
    method: str,
    model: str,
    batch_size: int,
    dataset: str,
    device: torch.device,
    rounds: int,
    count: int,
    gpu: str,
    out: Path | None,
) -> None:
    """Time steps of one global batch by 1, 2, ... processes on the same cores, and predict those of many GPUs."""
    keys = {
        "method": method, "model": model, "batch_size": batch_size, "amp": True, "loss": {"warmup": 0},
        "device": device.type,
    }  # fmt: skip
    with command.refused():
        images_of(dataset, batch_size)
        run = config.load(keys)
    groups = [(size, sync) for size in sizes or (1, 2) for sync in (False, True)[: 1 if size == 1 else 2]]
    taken: dict[Group, list[Taken]] = {group: [] for group in groups}
    with command.results(device, out) as results:
        for turn in range(rounds):
            for size, sync in rotated(groups, turn):
                sync_bn = {"sync_bn": "on" if sync else "off"}
                taken[size, sync].append(several_processes.timed(size, keys | sync_bn, dataset, count))
        rows, predicted = measured_rows(results.facts, run, taken), predictions(run, gpu, results.facts)
        results.write("scaling.csv", rows)
        results.write("scaling-predicted.csv", predicted)
        results.console.print(table(rows))
        results.console.print(f"PREDICTED for {GPUS[gpu].name}, not measured:")
        results.console.print(predicted_table(predicted))
        for assumption in SCALING_ASSUMPTIONS:
            results.console.print(f"assumed: {assumption}")


def measured_rows(
    facts: machine.Facts, run: config.RunConfig, taken: Mapping[Group, Sequence[Taken]]
) -> list[ScalingRow]:
    """Row of each group, beside the first one. taken: in each round."""
    rows = []
    first: list[float] = []
    for (size, synchronised), found in taken.items():
        seconds = [statistics.median(one.steps) for one in found]
        first = first or seconds
        q10, q90 = csv_rows.quantiles(seconds)
        sent = [one.sent for one in found if one.sent is not None]
        rows.append(
            ScalingRow(
                **facts,
                method=run.method,
                model=run.model,
                batch_size=run.batch_size,
                processes=size,
                sync_bn=synchronised,
                rounds=len(found),
                median_s=statistics.median(seconds),
                q10_s=q10,
                q90_s=q90,
                speedup=csv_rows.speedup(first, seconds) or 0.0,
                sent_bytes=statistics.median(sent) if sent else None,
                ring_bytes=2 * (size - 1) * gradient_bytes(run.model),
                save_stall_s=statistics.median(one.stall for one in found),
                save_write_s=statistics.median(one.writing for one in found),
            )
        )
    return rows


def gradient_bytes(model: str) -> int:
    """Bytes of all gradients of a network, in float32."""
    with torch.device("meta"):
        return 4 * sum(value.numel() for value in models.build(model, 10).parameters())


def predictions(run: config.RunConfig, gpu: str, facts: machine.Facts) -> list[PredictedScalingRow]:
    """Predict one node and sixteen; with the paper's 128 images a step in all, and with as many on each GPU."""
    rows = []
    for per_gpu, gpus in ((128, 1), (128, 8), (128, 128), (16, 8)):
        for sync_bn in (False, True) if gpus > 1 else (False,):
            step_s, exposed_s = predicted_step(run, gpu, per_gpu, gpus, sync_bn=sync_bn)
            alone_s = predicted_step(run, gpu, 128, 1, sync_bn=False)[0]
            rows.append(
                PredictedScalingRow(
                    date=facts["date"],
                    commit=facts["commit"],
                    torch=facts["torch"],
                    gpu=GPUS[gpu].name,
                    method=run.method,
                    model=run.model,
                    gpus=gpus,
                    batch_size=per_gpu * gpus,
                    sync_bn=sync_bn,
                    step_s=step_s,
                    exposed_s=exposed_s,
                    efficiency=alone_s / 128 * per_gpu / step_s,
                )
            )
    return rows


def predicted_step(
    run: config.RunConfig, gpu: str, per_gpu: int, gpus: int, *, sync_bn: bool
) -> tuple[float, float]:
    """Seconds of a step, and of those in which nothing but gradients and statistics travels."""
    at = Precision(torch.device("cpu"), torch.float32, torch.bfloat16)
    method = assemble.method_of(run)
    hardware = GPUS[gpu]
    passes = predict.gpu_passes(run, per_gpu, at).compiled
    count = plan.passes(method, run.attack, run.forwards)
    ops = predict.step_ops(count, passes, at)
    alone = roofline.seconds(ops, hardware, launched=sync_bn) + predict.BESIDE_GRAPH * hardware.launch
    if gpus == 1:
        return alone, 0.0
    exposed = travel(4.0 * passes.parameters, gpus)
    if sync_bn:
        last = travel(min(4.0 * passes.parameters, LAST_BUCKET), gpus)
        backward = 2 / 3 * roofline.seconds(passes.trained, hardware, launched=True)
        with torch.device("meta"):
            layers = sum(isinstance(module, nn.BatchNorm2d) for module in models.build(run.model, 10).modules())
        attacked = count.attacked if bn_mode(run.attack.bn).by_batch else 0
        latency = (NVLINK if gpus <= GPUS_PER_NODE else FABRIC).latency
        exposed = max(last, exposed - backward) + 2 * latency * layers * 2 * (attacked + count.trained)
    return alone + exposed, exposed


def travel(size: float, gpus: int) -> float:
    """Seconds in which gradients of so many bytes are summed over all GPUs."""
    inside = min(gpus, GPUS_PER_NODE)
    nodes = gpus // inside
    seconds = 2 * (inside - 1) * (size / inside / NVLINK.bandwidth + NVLINK.latency)
    part = size / inside
    return seconds + 2 * (nodes - 1) * (part / nodes / FABRIC.bandwidth + FABRIC.latency)


def table(rows: Sequence[ScalingRow]) -> Table:
    """Table of the measured groups."""
    first = rows[0]
    title = f"{first.method} {first.model}, global batch of {first.batch_size}, {first.processor}, the same cores"
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    headings = ("processes", "ms/step", "q10", "q90", "x first", "MB sent", "of a ring", "saving stalls", "writes")
    for heading in headings:
        result.add_column(heading, justify="right")
    for row in rows:
        sent = "" if row.sent_bytes is None else f"{row.sent_bytes / 1e6:.1f}"
        result.add_row(
            f"{row.processes}{' sync' if row.sync_bn else ''}", f"{row.median_s * 1e3:,.0f}",
            f"{row.q10_s * 1e3:,.0f}", f"{row.q90_s * 1e3:,.0f}", f"{row.speedup:.2f}", sent,
            f"{row.ring_bytes / 1e6:.1f}",
            f"{row.save_stall_s * 1e3:.0f} ms", f"{row.save_write_s * 1e3:.0f} ms",
        )  # fmt: skip
    return result


def predicted_table(rows: Sequence[PredictedScalingRow]) -> Table:
    """Table of the predictions."""
    result = Table(box=box.SIMPLE)
    for heading in ("GPUs", "global batch", "sync BN", "ms/step", "of it exposed", "efficiency"):
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(
            f"{row.gpus}", f"{row.batch_size:,}", "on" if row.sync_bn else "off", f"{row.step_s * 1e3:.2f}",
            f"{row.exposed_s * 1e3:.2f}", f"{row.efficiency:.0%}",
        )  # fmt: skip
    return result


if __name__ == "__main__":
    main()
