"""Predict training steps on GPUs that are not here: `python -m bench.predict --gpu h100`. README.md says how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click
import torch
from rich import box
from rich.table import Table

from bench.epoch import TABLE_14
from bench.lib import command, machine, pass_ops, roofline
from bench.lib.output import csv_rows
from bench.lib.output.csv_rows import PredictedRow
from bench.lib.pass_ops import Execution, PassOps
from bench.lib.roofline import GPUS, Hardware, Op
from bench.lib.timing import EPOCH_IMAGES, repeated
from engine import config, models
from engine.attacks.twin import Twin
from engine.config import RunConfig
from engine.methods import Method
from engine.runs import assemble
from engine.system.precision import Precision
from engine.training import plan

CPU = torch.device("cpu")
BESIDE_GRAPH = 6  # launches and copies of a step that is one graph: tests/training/test_captured_step.py
ASSUMPTIONS = (
    "convolutions are matrix products in tiles of 256x128, 128x128 or 256x64, whichever is best, and take whole",
    "waves of tiles over all multiprocessors; gradients of weights fill theirs, since their sums can be divided",
    "a full wave reaches 60 % of the data sheet's dense peak, others 85 % of its bandwidth (both estimates)",
    "a kernel moves its inputs and outputs once, and nothing stays in a cache; BatchNorm, addition and ReLU are",
    "two kernels forward and two backward, or with ENGINE_KERNELS=auto,batch_norm=reference an op of torch each",
    "eager: the host launches each kernel, in at least 5 us (an estimate)",
    "captured: the step is one CUDA graph, whose nodes take at least 1.6 us (an estimate), and six launches",
    "compiled, the default: captured, and pointwise ops in a row are one kernel; nothing else of torch.compile",
    "and lanes: compiled, and the teachers hide entirely behind the longer lane, the best that is possible",
    "the loss counts as a cross-entropy of each trained pass, and the telemetry as one kernel",
    "memory: activations, weights, gradients, momentum, twins; no workspace, no fragmentation, no context",
)


class GpuPasses(NamedTuple):
    """The passes of a configuration, op by op and compiled."""

    op_by_op: PassOps
    compiled: PassOps


class Prediction(NamedTuple):
    """Seconds of a step by an eager host, as a graph, compiled, by lanes; MiB; kernels of the compiled step."""

    eager_s: float
    device_s: float
    compiled_s: float
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
        passes = gpu_passes(run, run.batch_size, precision)
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
                compiled_epoch_s=steps * step.compiled_s,
                lanes_epoch_s=steps * step.lanes_s,
                peak_mib=step.peak_mib,
                launches=step.launches,
                share_of_convolutions=step.share_of_convolutions,
            )
        )
    return rows


def gpu_passes(run: RunConfig, batch_size: int, precision: Precision) -> GpuPasses:
    """The passes of a run on a GPU, with so many images."""

    def of(*, compiled: bool) -> PassOps:
        execution = Execution.gpu(compiled=compiled)
        return pass_ops.passes(run.model, batch_size, precision, execution, bn=run.attack.bn)

    return GpuPasses(of(compiled=False), of(compiled=True))


def predict(
    run: RunConfig, method: Method, passes: GpuPasses, hardware: Hardware, precision: Precision
) -> Prediction:
    """Predict a step of the method after its warm-up."""
    count = plan.passes(method, run.attack, run.forwards)
    forwards = plan.forwards(method, run.attack, run.forwards)
    beside_attack, beside_student = len(forwards.before_attack), len(forwards.after_attack)
    every = step_ops(count, passes.compiled, precision)
    by_op = step_ops(count, passes.op_by_op, precision)
    beside_graph = BESIDE_GRAPH * hardware.launch
    compiled = roofline.seconds(every, hardware, launched=False) + beside_graph
    teacher, attack = (
        roofline.seconds(ops, hardware, launched=False)
        for ops in (passes.compiled.forward, [*passes.compiled.attacked, *update_of_images(passes.compiled)])
    )
    student = count.trained * roofline.seconds(passes.compiled.trained, hardware, launched=False)
    student += (count.forward - beside_attack - beside_student) * teacher
    hidden = min(beside_attack * teacher, count.attacked * attack) + min(beside_student * teacher, student)
    return Prediction(
        eager_s=roofline.seconds(by_op, hardware, launched=True),
        device_s=roofline.seconds(by_op, hardware, launched=False) + beside_graph,
        compiled_s=compiled,
        lanes_s=compiled - hidden,
        peak_mib=peak_bytes(run, method, count, passes.compiled, precision) / 2**20,
        launches=len(every),
        share_of_convolutions=roofline.share_of_convolutions(every, hardware),
    )


def step_ops(count: plan.Passes, passes: PassOps, precision: Precision) -> list[Op]:
    """Kernels of a whole step: its passes, the attack's updates, and what is done once."""
    return [
        *(passes.attacked + update_of_images(passes)) * count.attacked,
        *passes.trained * count.trained,
        *passes.forward * count.forward,
        *once(passes, precision),
    ]


def update_of_images(passes: PassOps) -> list[Op]:
    """`pgd_update` reads the adversarial image, the gradient and the image, and writes the first."""
    return [Op("pgd_update", 0.0, 4 * 4.0 * passes.images, torch.float32)]


def once(passes: PassOps, precision: Precision) -> list[Op]:
    """Augmentation, the attack's start, the telemetry, and the update of the weights."""
    images = 4.0 * passes.images
    return [
        Op("crop_flip", 0.0, images + passes.images, torch.float32),
        Op("random_start", 0.0, 2 * images, torch.float32),
        Op("batch_sums", 0.0, 0.0, torch.float32),  # logits of a batch: a kernel's least time
        *optimizer(passes.sizes, precision),
    ]


def optimizer(sizes: Sequence[int], precision: Precision) -> list[Op]:
    """SGD with momentum reads weight, gradient and momentum, and writes the first and the last.

    With AMP it is one kernel, which reads gradients and writes weights in the format of the passes.
    """
    if precision.amp_dtype is not None:
        return [Op("sgd", 0.0, (4 * 4.0 + 2 * precision.amp_dtype.itemsize) * sum(sizes), torch.float32)]
    launches = roofline.launches_of_lists(sizes, lists=3)
    return [Op("sgd", 0.0, 5 * 4.0 * sum(sizes) / launches, torch.float32)] * launches


def peak_bytes(run: RunConfig, method: Method, count: plan.Passes, passes: PassOps, precision: Precision) -> float:
    """The larger of the two peaks: before the backward, all trained passes are kept; in the attack one is.

    Weights and momentum in float32; copies of the weights, the teachers, and gradients, where the student is
    trained, in the format of the passes.
    """
    parameters = passes.parameters
    itemsize = (precision.amp_dtype or precision.dtype).itemsize
    teachers = len(plan.teachers(method, run.attack))
    copies = 0 if precision.amp_dtype is None else itemsize
    always = parameters * (2 * 4 + copies + itemsize * teachers)
    training = count.trained * passes.kept_trained + parameters * itemsize
    return always + max(training, passes.kept_attacked if count.attacked else 0)


def table(rows: Sequence[PredictedRow]) -> Table:
    """Predictions, and the paper's Table 14 beside them."""
    result = Table(box=box.SIMPLE)
    result.add_column("method", no_wrap=True)
    for heading in (
        "eager s/epoch", "captured", "compiled", "and lanes", "x first", "kernels", "convolutions", "MiB",
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
            row.method, f"{row.eager_epoch_s:,.1f}", f"{row.device_epoch_s:,.1f}",
            f"{row.compiled_epoch_s:,.1f}", f"{row.lanes_epoch_s:,.1f}",
            f"{row.compiled_epoch_s / rows[0].compiled_epoch_s:.3f}", f"{row.launches:,}",
            f"{row.share_of_convolutions:.0%}", f"{row.peak_mib:,.0f}", *beside,
        )  # fmt: skip
    return result


def validation(model: str, batch_size: int, precision: Precision) -> Table:
    """Table of each kind of pass on this processor: predicted from its measured peaks, and measured."""
    hardware = roofline.measured_cpu(precision)
    predicted = pass_ops.passes(model, batch_size, precision, Execution.cpu(), bn="train")
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
        taken = min(repeated(call))  # as the peaks are
        result.add_row(name, f"{expected * 1e3:.1f}", f"{taken * 1e3:.1f}", f"{taken / expected:.2f}")
    return result


if __name__ == "__main__":
    main()
