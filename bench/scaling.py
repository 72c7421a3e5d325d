"""A step by several processes, and what it would be on many GPUs: `python -m bench.scaling`; see README.md."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from bench import predict
from bench.lib import csv_rows, machine, roofline, step_variants
from bench.lib.csv_rows import PredictedScalingRow, ScalingRow
from bench.lib.roofline import GPUS
from bench.lib.step_variants import Workload
from bench.lib.timing import rotated
from engine import config, methods, models
from engine.attacks.pgd import bn_mode
from engine.common.lookup import is_on
from engine.models.sync_batch_norm import synchronise
from engine.pipelines.sampling import Sampling
from engine.pipelines.tensor import TensorPipeline
from engine.runs import checkpoints
from engine.system import distributed, launcher, precision
from engine.system.precision import Precision
from engine.training import plan
from engine.training.learner import Learner

WARMUP = 2  # steps that are not counted: the replicas arrange their buckets in the first


class Network(NamedTuple):
    """What carries gradients. bandwidth: bytes a second from a GPU, each way; latency: seconds of a message."""

    bandwidth: float
    latency: float


# Assumed, from data sheets: NVLink 4 has 450 GB/s each way, and each GPU a 400 Gb/s adapter; both reach 80 %.
NVLINK, FABRIC = Network(360e9, 10e-6), Network(40e9, 20e-6)
GPUS_PER_NODE = 8
LAST_BUCKET = 25 * 2**20  # torch's default: what is sent when the backward is over
# Counted for IAD-I with ResNet-18 under AMP on a mock of the CUDA runtime, attack captured, nothing compiled:
# 856 launches beside the graph and 2,481 nodes, where the model of bench.predict sees 465 and 1,430 ops.
KERNELS_PER_OP = (856 + 2481) / (465 + 1430)
ASSUMPTIONS = (
    "an op takes its time by the roofline of bench.predict, and at least that of 1.8 kernels: 1.6 us each in the",
    "graph of the attack, 5 us each elsewhere, launched by the host; ops one after the other, no lanes",
    "BatchNorm over each GPU's own images",
    "gradients in float32; within a node each GPU sends 2 (N-1)/N of them over NVLink, 360 GB/s, 10 us a message",
    "between nodes each GPU sends 2 (M-1)/M of its eighth over an adapter of its own, 40 GB/s, 20 us a message",
    "all but the last bucket (25 MiB) travel beside the backward of the student, two thirds of a trained pass",
    "synchronised BatchNorm adds a message of two latencies for each layer in each direction of each pass",
)


class Taken(NamedTuple):
    """Of a group of processes: seconds of each step, bytes sent in one; seconds that saving stalls, and takes."""

    steps: list[float]
    sent: float | None
    stall: float
    writing: float


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--procs", "sizes", type=click.IntRange(min=1), multiple=True, help="Repeatable. [1 and 2]")
@click.option("--method", default="iad1", show_default=True)
@click.option("--model", default="resnet18", show_default=True, help="Student and teachers.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1), help="Of all processes.")
@click.option("--dataset", default="random", show_default=True, help="Of the images, or random.")
@click.option("--device", "device_name", default="auto", show_default=True, help="cpu, or cuda: a GPU a process.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=2))
@click.option("--steps", "count", default=3, show_default=True, type=click.IntRange(min=1), help="Of a round.")
@click.option("--gpu", type=click.Choice(list(GPUS)), default="h100", show_default=True, help="To predict for.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the results. [bench/results/NAME-DATE]")
@click.option(
    "--process", "answer", type=click.Path(path_type=Path), hidden=True, help="Where one of them answers."
)
@click.option("--sync-bn", is_flag=True, hidden=True, help="Its BatchNorm is synchronised.")
def main(
    sizes: Sequence[int],
    method: str,
    model: str,
    batch_size: int,
    dataset: str,
    device_name: str,
    rounds: int,
    count: int,
    gpu: str,
    out: Path | None,
    answer: Path | None,
    sync_bn: bool,
) -> None:
    """Time steps of one global batch by 1, 2, ... processes on the same cores, and predict those of many GPUs."""
    try:
        device = machine.device(device_name)
        workload = Workload(method, model, batch_size, step_variants.images_of(dataset, batch_size), device)
        complete = config.load(
            {"method": method, "model": model, "batch_size": batch_size, "amp": True, "loss": {"warmup": 0}},
            {"device": device.type, "sync_bn": "on" if sync_bn else "off"},
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if answer is not None:
        with distributed.joined(complete) as world:
            taken = _run(world, complete, workload, count)
            if world.is_main:
                answer.write_text(json.dumps(taken))
        return
    groups = [(size, sync) for size in sizes or (1, 2) for sync in (False, True)[: 1 if size == 1 else 2]]
    arguments = ["--method", method, "--model", model, "--batch-size", str(batch_size), "--dataset", dataset]
    arguments += ["--device", device.type, "--steps", str(count)]
    measured: dict[tuple[int, bool], list[Taken]] = {key: [] for key in groups}
    for turn in range(rounds):
        for key in rotated(groups, turn):
            measured[key].append(group(key[0], [*arguments, *["--sync-bn"][: key[1]]]))
    facts = machine.facts(device)
    folder = out or machine.results_folder(facts)
    folder.mkdir(parents=True, exist_ok=True)
    first = [statistics.median(taken.steps) for taken in measured[groups[0]]]
    rows = []
    for (size, synchronised), found in measured.items():
        seconds = [statistics.median(taken.steps) for taken in found]
        q10, q90 = csv_rows.quantiles(seconds)
        sent = [taken.sent for taken in found if taken.sent is not None]
        rows.append(
            ScalingRow(
                **facts,
                method=method,
                model=model,
                batch_size=batch_size,
                processes=size,
                sync_bn=synchronised,
                rounds=rounds,
                median_s=statistics.median(seconds),
                q10_s=q10,
                q90_s=q90,
                speedup=csv_rows.speedup(first, seconds) or 0.0,
                sent_bytes=statistics.median(sent) if sent else None,
                ring_bytes=2 * (size - 1) * gradient_bytes(model),
                save_stall_s=statistics.median(taken.stall for taken in found),
                save_write_s=statistics.median(taken.writing for taken in found),
            )
        )
    predicted = predictions(complete, gpu, facts)
    csv_rows.write(folder / "scaling.csv", rows)
    csv_rows.write(folder / "scaling-predicted.csv", predicted)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table(rows))
    console.print(f"PREDICTED for {GPUS[gpu].name}, not measured:")
    console.print(predicted_table(predicted))
    for assumption in ASSUMPTIONS:
        console.print(f"assumed: {assumption}")
    console.print(f"written: {folder}/scaling.csv, {folder}/scaling-predicted.csv")


def group(size: int, arguments: Sequence[str]) -> Taken:
    """What so many processes of this benchmark measured together, which share the cores of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "taken.json"
        command = [sys.executable, "-m", "bench.scaling", "--process", str(answer), *arguments]
        if launcher.launch(size, command, None, max_restarts=0):
            raise RuntimeError(f"{size} processes of the benchmark failed")
        return Taken(*json.loads(answer.read_text()))


def _run(world: distributed.World, complete: config.RunConfig, workload: Workload, count: int) -> Taken:
    """Steps of this process, with all others."""
    at = precision.choose(complete, world.local_rank)
    method = methods.get(complete.method, semantics=complete.semantics, loss=complete.loss)
    torch.manual_seed(0)
    networks = [at.place(models.build(complete.model, 10)) for _ in range(3)]
    if is_on("sync_bn", complete.sync_bn) and world.size > 1:
        networks[0] = synchronise(networks[0], at.device)
    teachers = {"teacher": networks[1].eval(), "teacher_st": networks[2].eval()}
    learner = Learner(networks[0].train(), teachers, method, complete, at, world)
    sampling = Sampling(len(workload.images), complete.batch_size, last="drop", shard=world.shard)
    pipeline = TensorPipeline(workload.images, sampling, augment=True, flip=True, device=at.device, dtype=at.dtype)
    batches = (batch for epoch in range(10**9) for batch in pipeline.epoch(epoch))
    seconds = []
    for number in range(WARMUP + count):
        batch = next(batches)
        if number == WARMUP:
            world.barrier()
            before = loopback_bytes()
        _wait(at)
        begin = time.perf_counter()
        learner.learn(
            batch,
            method,
            0.1,
            epoch=0,
            global_batch_size=complete.batch_size,
            on_output=lambda output, labels: None,
        )
        _wait(at)
        seconds.append(time.perf_counter() - begin)
    world.barrier()
    sent = loopback_bytes() - before
    # The slowest process decides, and all others wait for it.
    slowest = world.gather(torch.tensor(seconds[WARMUP:], dtype=torch.float64)).amax(0).tolist()
    stall, writing = _saving(learner) if world.is_main else (0.0, 0.0)
    on_wire = None if at.device.type == "cuda" or world.size == 1 else sent / count
    return Taken(slowest, on_wire, stall, writing)


def _saving(learner: Learner) -> tuple[float, float]:
    """Seconds for which saving holds up the training, and until all is written."""
    with tempfile.TemporaryDirectory() as folder, checkpoints.Saver() as saver:
        content = learner.state_dict() | {"student": learner.student.state_dict()}
        begin = time.perf_counter()
        saver.save((Path(folder) / "last.pt", content))
        stall = time.perf_counter() - begin
        saver.wait()
        return stall, time.perf_counter() - begin


def _wait(at: Precision) -> None:
    if at.device.type == "cuda":
        torch.cuda.synchronize(at.device)


def loopback_bytes() -> int:
    """Bytes that this machine sent to itself since it was started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return 0


def gradient_bytes(model: str) -> int:
    """Of all gradients of a network, in float32."""
    with torch.device("meta"):
        return 4 * sum(value.numel() for value in models.build(model, 10).parameters())


def predictions(complete: config.RunConfig, gpu: str, facts: machine.Facts) -> list[PredictedScalingRow]:
    """One node and sixteen; with the paper's 128 images a step in all, and with as many on each GPU."""
    rows = []
    for per_gpu, gpus in ((128, 1), (128, 8), (128, 128), (16, 8)):
        for sync_bn in (False, True) if gpus > 1 else (False,):
            step_s, exposed_s = predicted_step(complete, gpu, per_gpu, gpus, sync_bn=sync_bn)
            alone_s = predicted_step(complete, gpu, 128, 1, sync_bn=False)[0]
            rows.append(
                PredictedScalingRow(
                    date=facts["date"],
                    commit=facts["commit"],
                    torch=facts["torch"],
                    gpu=GPUS[gpu].name,
                    method=complete.method,
                    model=complete.model,
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
    complete: config.RunConfig, gpu: str, per_gpu: int, gpus: int, *, sync_bn: bool
) -> tuple[float, float]:
    """Seconds of a step, and of those in which nothing but gradients and statistics travels."""
    at = Precision(torch.device("cpu"), torch.float32, torch.bfloat16)
    method = methods.get(complete.method, semantics=complete.semantics, loss=complete.loss)
    passes = roofline.passes(complete.model, per_gpu, at, bn=complete.attack.bn)
    count = plan.passes(method, complete.attack, complete.forwards)
    alone = step_alone(passes, count, GPUS[gpu])
    if gpus == 1:
        return alone, 0.0
    whole, last = travel(4.0 * passes.parameters, gpus), travel(min(4.0 * passes.parameters, LAST_BUCKET), gpus)
    backward = 2 / 3 * roofline.seconds(passes.trained, GPUS[gpu], launched=False)
    exposed = max(last, whole - backward)
    if sync_bn:
        with torch.device("meta"):
            layers = sum(
                isinstance(module, nn.BatchNorm2d) for module in models.build(complete.model, 10).modules()
            )
        attacked = count.attacked if bn_mode(complete.attack.bn).by_batch else 0
        latency = (NVLINK if gpus <= GPUS_PER_NODE else FABRIC).latency
        exposed += 2 * latency * layers * 2 * (attacked + count.trained)
    return alone + exposed, exposed


def step_alone(passes: roofline.Passes, count: plan.Passes, hardware: roofline.Hardware) -> float:
    """Seconds of a step of one GPU: the attack a graph, everything else launched by the host."""
    attack = passes.attacked * count.attacked
    rest = passes.trained * count.trained + passes.forward * count.forward + predict.optimizer(passes.parameters)
    return roofline.seconds_at_least(attack, hardware, KERNELS_PER_OP * hardware.node) + roofline.seconds_at_least(
        rest, hardware, KERNELS_PER_OP * hardware.launch
    )


def travel(size: float, gpus: int) -> float:
    """Seconds in which gradients of so many bytes are summed over all GPUs."""
    inside = min(gpus, GPUS_PER_NODE)
    nodes = gpus // inside
    seconds = 2 * (inside - 1) * (size / inside / NVLINK.bandwidth + NVLINK.latency)
    part = size / inside
    return seconds + 2 * (nodes - 1) * (part / nodes / FABRIC.bandwidth + FABRIC.latency)


def table(rows: Sequence[ScalingRow]) -> Table:
    """What was measured."""
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
    """What was not."""
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
