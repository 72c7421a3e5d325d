"""Predict training steps on GPUs that are not here: `python -m bench.predict --gpu h100`. README.md says how."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import torch
from rich import box
from rich.table import Table

from bench.epoch import EPOCH_IMAGES, TABLE_14
from bench.lib import command, machine, roofline
from bench.lib.output import csv_rows
from bench.lib.output.csv_rows import PredictedRow
from bench.lib.roofline import GPUS, Hardware, Op, PassOps
from bench.lib.timing import repeated
from engine import config, models
from engine.attacks.twin import Twin
from engine.config import RunConfig
from engine.methods import Method
from engine.runs import assemble
from engine.system.precision import Precision
from engine.training import plan

CPU = torch.device("cpu")
ASSUMPTIONS = (
    "convolutions reach 60 % of the data sheet's dense peak, and everything else 85 % of its bandwidth",
    "an op reads its inputs and writes its outputs once, BatchNorm reads twice; nothing stays in a cache",
    "eager: each op takes at least 5 us to launch; captured: at least 1.6 us, a small kernel of a graph",
    "lanes: the teachers hide entirely behind the longer of the two lanes, the best that is possible",
    "memory: activations, weights, gradients, momentum, twins; no workspace, no fragmentation, no context",
)


class Prediction(NamedTuple):
    """Seconds of a step by an eager host, by one lane that waits for no launch, and by lanes; MiB; launches."""

    eager_s: float
    device_s: float
    lanes_s: float
    peak_mib: float
    launches: int
    share_of_convolutions: float


@command.command
@click.option("--gpu", type=click.Choice(list(GPUS)), help="Which one.")
@command.methods_option(tuple(TABLE_14))
@command.model_option()
@command.batch_size_option()
@click.option("--amp/--no-amp", default=True, show_default=True, help="Passes in bfloat16, else in TF32.")
@click.option("--validate", is_flag=True, help="Predict this processor from its own peaks, and measure it.")
@command.out_option("Folder for predicted.csv. [none is written]")
def main(
    gpu: str | None, names: Sequence[str], model: str, batch_size: int, amp: bool, validate: bool, out: Path | None
) -> None:
    """Predict seconds and memory of a step by a roofline: nothing is run on a GPU."""
    if (gpu is None) != validate:
        raise click.UsageError(f"give either --gpu (known: {', '.join(GPUS)}) or --validate")
    console = command.new_console()
    precision = Precision(CPU, torch.float32, torch.bfloat16 if amp else None)
    if gpu is None:
        console.print(validation(model, batch_size, precision))
        return
    with command.refused():
        runs = [config.load({"method": name, "model": model, "batch_size": batch_size}) for name in names]
    rows = predicted_rows(runs, GPUS[gpu], precision)
    console.print(f"PREDICTED for one {GPUS[gpu].name}, not measured: {model}, batch of {batch_size}")
    console.print(table(rows))
    for assumption in ASSUMPTIONS:
        console.print(f"assumed: {assumption}")
    console.print("The paper does not name its GPU: compare the ratios between methods alone.")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        csv_rows.write(out / "predicted.csv", rows)
        console.print(f"written: {out / 'predicted.csv'}")


def predicted_rows(runs: Sequence[RunConfig], hardware: Hardware, precision: Precision) -> list[PredictedRow]:
    """Row of each configuration."""
    facts = machine.facts(CPU)
    rows = []
    for run in runs:
        method = assemble.method_of(run)
        passes = roofline.passes(run.model, run.batch_size, precision, bn=run.attack.bn)
        step = predict(run, method, passes, hardware, precision)
        steps = math.ceil(EPOCH_IMAGES / run.batch_size)
        rows.append(
            PredictedRow(
                date=facts["date"],
                commit=facts["commit"],
                torch=facts["torch"],
                gpu=hardware.name,
                method=run.method,
                model=run.model,
                batch_size=run.batch_size,
                amp=precision.amp_dtype is not None,
                eager_epoch_s=steps * step.eager_s,
                device_epoch_s=steps * step.device_s,
                lanes_epoch_s=steps * step.lanes_s,
                peak_mib=step.peak_mib,
                launches=step.launches,
                share_of_convolutions=step.share_of_convolutions,
            )
        )
    return rows


def predict(
    run: RunConfig, method: Method, passes: PassOps, hardware: Hardware, precision: Precision
) -> Prediction:
    """Predict a step of the method after its warm-up."""
    count = plan.passes(method, run.attack, run.forwards)
    forwards = plan.forwards(method, run.attack, run.forwards)
    beside_attack, beside_student = len(forwards.before_attack), len(forwards.after_attack)
    other = count.forward - beside_attack - beside_student  # of the student
    update = optimizer(passes.parameters)

    def of_passes(seconds: Callable[[Sequence[Op]], float], *, lanes: bool = False) -> float:
        attack = count.attacked * seconds(passes.attacked)
        student = count.trained * seconds(passes.trained) + other * seconds(passes.forward)
        first, second = beside_attack * seconds(passes.forward), beside_student * seconds(passes.forward)
        whole = max(attack, first) + max(student, second) if lanes else attack + first + student + second
        return whole + seconds(update)

    def eager(ops: Sequence[Op]) -> float:
        return roofline.seconds(ops, hardware, launched=True)

    def captured(ops: Sequence[Op]) -> float:
        return roofline.seconds(ops, hardware, launched=False)

    every = [
        *passes.attacked * count.attacked,
        *passes.trained * count.trained,
        *passes.forward * count.forward,
        *update,
    ]
    return Prediction(
        eager_s=of_passes(eager),
        device_s=of_passes(captured),
        lanes_s=of_passes(captured, lanes=True),
        peak_mib=peak_bytes(run, method, count, passes, precision) / 2**20,
        launches=len(every),
        share_of_convolutions=roofline.share_of_convolutions(every, hardware),
    )


def optimizer(parameters: int) -> list[Op]:
    """SGD with momentum reads weight, gradient and momentum, and writes weight and momentum."""
    return [Op("sgd", 0.0, 5 * 4.0 * parameters, torch.float32)]


def peak_bytes(run: RunConfig, method: Method, count: plan.Passes, passes: PassOps, precision: Precision) -> float:
    """The larger of the two peaks: before the backward, all trained passes are kept; in the attack one is.

    Weights and momentum in float32, the student's twin and the teachers in the format of the passes; gradients and
    autocast's copies where the student is trained.
    """
    parameters = passes.parameters
    itemsize = (precision.amp_dtype or precision.dtype).itemsize
    teachers = len(plan.teachers(method, run.attack))
    twin = itemsize if precision.amp_dtype is not None else 0  # else it shares the student's weights
    always = parameters * (2 * 4 + twin * method.needs_x_adv + itemsize * teachers)
    training = count.trained * passes.kept_trained + parameters * (4 + twin)
    return always + max(training, passes.kept_attacked if count.attacked else 0)


def table(rows: Sequence[PredictedRow]) -> Table:
    """Predictions, and the paper's Table 14 beside them."""
    result = Table(box=box.SIMPLE)
    result.add_column("method", no_wrap=True)
    for heading in (
        "eager s/epoch", "captured", "and lanes", "x first", "launches", "convolutions", "MiB",
        "Table 14: s/epoch", "x first", "MiB",
    ):  # fmt: skip
        result.add_column(heading, justify="right")
    paper_first = TABLE_14.get(rows[0].method)
    for row in rows:
        paper = TABLE_14.get(row.method)
        beside = ("", "", "")
        if paper is not None:
            ratio = f"{paper[0] / paper_first[0]:.3f}" if paper_first is not None else ""
            beside = (f"{paper[0]:.2f}", ratio, f"{paper[1]:,}")
        result.add_row(
            row.method, f"{row.eager_epoch_s:,.1f}", f"{row.device_epoch_s:,.1f}", f"{row.lanes_epoch_s:,.1f}",
            f"{row.device_epoch_s / rows[0].device_epoch_s:.3f}", f"{row.launches:,}",
            f"{row.share_of_convolutions:.0%}", f"{row.peak_mib:,.0f}", *beside,
        )  # fmt: skip
    return result


def validation(model: str, batch_size: int, precision: Precision) -> Table:
    """Table of each kind of pass on this processor: predicted from its measured peaks, and measured."""
    hardware = roofline.measured_cpu(precision)
    predicted = roofline.passes(model, batch_size, precision, bn="train")
    student = precision.place(models.build(model, 10))
    attacked, teacher = Twin(student, "train", precision), Twin(student, "eval", precision)
    images = torch.rand(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)

    def attack() -> None:
        torch.autograd.grad(attacked(images.requires_grad_()).sum(), images)

    def train() -> None:
        with precision.autocast():
            logits = student(images.detach())
        logits.sum().backward()

    def forward() -> None:
        with torch.no_grad():
            teacher(images)

    result = Table(title=f"{model}, batch of {batch_size}, this processor", title_justify="left", box=box.SIMPLE)
    result.add_column("pass", no_wrap=True)
    for heading in ("predicted ms", "measured ms", "measured / predicted"):
        result.add_column(heading, justify="right")
    for name, ops, call in (
        ("attack", predicted.attacked, attack),
        ("training", predicted.trained, train),
        ("forward, folded", predicted.forward, forward),
    ):
        expected = roofline.seconds(ops, hardware, launched=True)
        taken = statistics.median(repeated(call))
        result.add_row(name, f"{expected * 1e3:.1f}", f"{taken * 1e3:.1f}", f"{taken / expected:.2f}")
    return result


if __name__ == "__main__":
    main()
