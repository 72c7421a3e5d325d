"""Time training steps beside a textbook's: `python -m bench.step`. The protocol stands in README.md."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench import chart, convolutions, gate, machine, results, steps, targets
from bench.convolutions import Work
from bench.results import StepRow
from bench.steps import ON_CPU, ON_CUDA, TEXTBOOK, VARIANTS, Workload
from bench.timing import Call, HostClock, no_garbage_collection, rotated
from engine import config, hostmemory, methods, models, precision

TESTS = gate.ROOT / "tests" / "bench" / "test_reference.py"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--method", "names", multiple=True, help="Repeatable. [iad1, iad2]")
@click.option("--variant", "variants", type=click.Choice(list(VARIANTS)), multiple=True, help="Repeatable.")
@click.option("--model", default="resnet18", show_default=True, help="Student and teachers.")
@click.option("--batch-size", default=128, show_default=True, type=click.IntRange(min=1))
@click.option("--dataset", default="cifar10", show_default=True, help="Of the images, or random.")
@click.option("--device", "device_name", default="auto", show_default=True, help="cpu, cuda or cuda:N.")
@click.option(
    "--rounds", default=5, show_default=True, type=click.IntRange(min=2), help="Steps of each that count."
)
@click.option("--no-memory", is_flag=True, help="Do not measure peak memory, a process for each variant.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the results. [bench/results/NAME-DATE]")
def main(
    names: Sequence[str],
    variants: Sequence[str],
    model: str,
    batch_size: int,
    dataset: str,
    device_name: str,
    rounds: int,
    no_memory: bool,
    out: Path | None,
) -> None:
    """Time a training step of each method in each variant, once the engine's step equals the textbook's."""
    names = names or ("iad1", "iad2")
    try:
        device = machine.device(device_name)
        images = steps.images_of(dataset, batch_size)
        models.check(model)
        for name in names:
            methods.get(name)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if not gate.tests_pass([TESTS], ["textbook"], "cpu"):
        raise click.ClickException("the engine's step is not the textbook's, so nothing is timed")
    variants = (TEXTBOOK, *(name for name in variants or _usual(device) if name != TEXTBOOK))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    facts = machine.facts(device)
    folder = out or machine.results_folder(facts)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[StepRow] = []
    for name in names:
        workload = Workload(name, model, batch_size, images, device)
        console.print(f"timing {name}: {', '.join(variants)}; {rounds} rounds")
        rows += measure(workload, variants, rounds, facts, with_memory=not no_memory)
        results.write(folder / "step.csv", rows)  # each time: a run that is cut short leaves what it has
        console.print(table(name, rows))
    chart.draw_steps(folder / "step.png", rows)
    for line in targets.step_verdicts(rows):
        console.print(line)
    console.print(f"written: {folder / 'step.csv'} and step.png")


def _usual(device: torch.device) -> tuple[str, ...]:
    return ON_CUDA if device.type == "cuda" else ON_CPU


def measure(
    workload: Workload, variants: Sequence[str], rounds: int, facts: machine.Facts, *, with_memory: bool
) -> list[StepRow]:
    """Rows of one method."""
    device = workload.device
    peaks = {name: peak_of_a_process(workload, name) for name in variants} if with_memory else {}
    calls = {name: workload.step(VARIANTS[name]) for name in variants}
    flops: dict[str, int] = {}
    for name, step in calls.items():  # the first call of each, which pays for what is compiled and allocated
        VARIANTS[name].settle()
        if workload.config(VARIANTS[name]).compile == "on":
            step()
        else:
            flops[name] = executed(step)
    amp = precision.choose(config.load({"amp": True, "device": str(device)})).amp_dtype or torch.float32
    own = convolutions.layers(models.build(workload.model, 10), (workload.batch_size, *_size(workload)))
    alone = {dtype: convolutions.calls(own, dtype, device) for dtype in {amp, torch.float32}}
    clock = SynchronisedClock(device)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    singles: dict[torch.dtype, list[dict[Work, float]]] = {dtype: [] for dtype in alone}
    with no_garbage_collection():
        for turn in range(rounds):
            for name, step in rotated(list(calls.items()), turn):
                VARIANTS[name].settle()
                samples[name].append(clock.seconds(step, 1))
            hostmemory.keep_freed()
            for dtype, group in alone.items():
                singles[dtype].append({work: clock.seconds(call, 2) for work, call in group.items()})
    rows = []
    for name in variants:
        run = workload.config(VARIANTS[name])
        row_dtype = amp if run.amp else torch.float32
        method = methods.get(run.method, semantics=run.semantics, loss=run.loss)
        work = convolutions.of_step(own, method, run)
        by_round = [convolutions.seconds(work, one) for one in singles[row_dtype]]
        rows.append(
            results.step_row(
                facts, workload, name, samples, by_round, flops.get(name), peaks.get(name), peaks.get(TEXTBOOK)
            )
        )
    return rows


def _size(workload: Workload) -> tuple[int, ...]:
    height, width, channels = workload.images.images.shape[1:]
    return channels, height, width


def executed(call: Call) -> int:
    """Floating-point operations of convolutions and matrix products in one call."""
    with steps.Flops() as counted:
        call()
    total: int = counted.total
    return total


class SynchronisedClock(HostClock):
    """Waits for the device, if it is one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, call: Call, count: int) -> float:
        def waited() -> None:
            call()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

        return super().seconds(waited, count)


def peak_of_a_process(workload: Workload, variant: str) -> float:
    """MiB, measured by a new process."""
    what = (variant, workload.method, workload.model, str(workload.batch_size), str(workload.device))
    command = [sys.executable, "-m", "bench.steps", *what]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603  # no shell


def table(method: str, rows: Sequence[StepRow]) -> Table:
    """What a reader wants of a method's rows."""
    result = Table(
        title=f"{method}, {rows[-1].model}, batch of {rows[-1].batch_size}", title_justify="left", box=box.SIMPLE
    )
    result.add_column("variant", no_wrap=True)
    for heading in (
        "s/step",
        "10 %",
        "90 %",
        "images/s",
        "x textbook",
        "GFLOP",
        "GFLOP/s",
        "of convolutions",
        "MiB",
        "of textbook",
    ):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.method == method:
            result.add_row(
                row.variant, f"{row.median_s:.3f}", f"{row.q10_s:.3f}", f"{row.q90_s:.3f}",
                f"{row.images_per_s:,.1f}", f"{row.speedup:.2f}",
                *("" if value is None else form.format(value) for form, value in (
                    ("{:,.0f}", row.gflop), ("{:,.0f}", row.gflop_per_s), ("{:.0%}", row.share_of_convolutions),
                    ("{:,.0f}", row.peak_mib), ("{:.0%}", row.share_of_textbook_memory),
                )),
            )  # fmt: skip
    return result


if __name__ == "__main__":
    main()
