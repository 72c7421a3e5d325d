"""What a training step runs outside the networks: `python -m bench.profile`. README.md says how to read it.

Nothing in engine/ knows of it: while it profiles, the networks and the functions of a step are wrapped in labelled
ranges. What the backward runs belongs to the range whose forward made its node of the graph.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, record_function

from bench.lib import machine
from engine import config, methods, models
from engine.attacks import adversary, pgd
from engine.config import RunConfig
from engine.kernels import dispatch
from engine.pipelines import tensor
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Split
from engine.system import precision
from engine.system.precision import Precision
from engine.system.streams import Lanes
from engine.training import networks, step

NETWORK, STEP = "network", "rest of the step"
# Functions that are wrapped where they are called from; within the attack, the innermost range counts.
FUNCTIONS = (
    (tensor, "crop_flip", "crop_flip"),
    (adversary.Adversary, "__call__", "rest of the attack"),
    (pgd, "random_start", "random_start"),
    (pgd, "pgd_update", "pgd_update"),
    (step, "distill_loss", "distill_loss"),
)
REGIONS = (*(region for *_, region in FUNCTIONS), NETWORK, STEP)
NODE = "autograd::engine::evaluate_function: "
CLASSES, PIXELS, STEPS = 10, 32, 3


class Line(NamedTuple):
    """What is counted together.

    direction: forward or backward. kind: "op", called from Python or by a node of the graph; "kernel", on the
    device; "host", the time between ops: Python's, autograd's, and that of native code that is no op of torch's.
    """

    region: str
    direction: str
    kind: str
    name: str


class Sums(NamedTuple):
    """Calls and microseconds of a line."""

    calls: int
    microseconds: float


Profile = dict[Line, Sums]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--method", default="iad2", show_default=True, help="The row of weights.")
@click.option("--model", default="resnet18", show_default=True, help="Student and teachers.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1))
@click.option("--amp", is_flag=True, help="Network passes in half precision.")
@click.option("--device", "device_name", default="auto", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the results. [bench/results/NAME-DATE]")
def main(method: str, model: str, batch_size: int, amp: bool, device_name: str, out: Path | None) -> None:
    """Profile one training step: which ops and kernels run outside the networks, how often and how long."""
    try:
        given = {"method": method, "model": model, "batch_size": batch_size, "amp": amp, "device": device_name}
        run = config.load(given)
        chosen = precision.choose(run)
        models.check(model)
        served = ", ".join(
            f"{op} {dispatch.choose(op, chosen.device, fused=chosen.fused)}" for op in dispatch.TABLE
        )
        training_step = prepare(run, chosen)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    profile = summed(record(training_step, chosen.device))
    facts = machine.facts(chosen.device)
    folder = out or machine.results_folder(facts)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"profile-{method}-{model}{'-amp' * amp}.csv"
    write(path, {**facts, "method": method, "model": model, "batch_size": batch_size, "served": served}, profile)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(f"{method} {model}, batch of {batch_size}, {chosen.describe()}, {facts['device']}; {served}")
    console.print(overview(profile))
    for region in REGIONS:
        if region != NETWORK:
            console.print(details(region, profile))
    console.print(f"written: {path}")


def prepare(run: RunConfig, chosen: Precision) -> Callable[[], None]:
    """The training step of a configuration on random images; it can be called STEPS times."""
    method = methods.get(run.method, semantics=run.semantics, loss=run.loss)
    generator = torch.Generator().manual_seed(0)
    count = STEPS * run.batch_size
    images = Split(
        torch.randint(256, (count, PIXELS, PIXELS, 3), dtype=torch.uint8, generator=generator),
        torch.randint(CLASSES, (count,), generator=generator),
        tuple(map(str, range(CLASSES))),
    )
    sampling = Sampling(count, run.batch_size)
    batches = tensor.TensorPipeline(images, sampling, augment=True, flip=True, device=chosen.device).epoch(0)

    def network() -> nn.Module:
        return Labelled(chosen.place(models.build(run.model, CLASSES)))

    student = network()
    needed = {"teacher": method.needs_teacher, "teacher_st": method.needs_teacher_st}
    teachers = {section: network().eval().requires_grad_(False) for section, wanted in needed.items() if wanted}
    counts = torch.zeros(2, dtype=torch.int64, device=chosen.device)
    built = networks.build(student, teachers, method, run, chosen, counts)
    lanes = Lanes(chosen.device)

    def training_step() -> None:
        student.zero_grad()
        output = step.training_loss(built, next(batches), method, run.forwards, chosen, lanes, epoch=0)
        output.loss.loss.backward()

    return training_step


class Labelled(nn.Module):
    """A network whose forward is a range of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        with record_function(NETWORK):
            logits: Tensor = self.network(images)
        return logits


@contextmanager
def labelled() -> Iterator[None]:
    """The functions of a step are ranges of their own inside."""

    def wrapped(function: Callable[..., Any], region: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(region):
                return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for module, name, region in FUNCTIONS:
            stack.enter_context(mock.patch.object(module, name, wrapped(getattr(module, name), region)))
        yield


def record(training_step: Callable[[], None], device: torch.device) -> list[Any]:
    """The profiler's events of the last step; those before pay for compilation and the order of the epoch."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with labelled():
        for _ in range(STEPS - 1):
            training_step()
        with torch.profiler.profile(activities=activities) as profiler, record_function(STEP):
            training_step()
            if device.type == "cuda":
                torch.cuda.synchronize()
    return list(profiler.events())


def summed(events: Iterable[Any]) -> Profile:
    """Calls and times by line."""
    in_order = sorted(
        (event for event in events if event.device_type.name == "CPU"),
        key=lambda event: event.time_range.start,
    )
    # The number of a node is that of the op that made it: the last one that began with this number.
    makers = {event.sequence_nr: event for event in in_order if event.sequence_nr >= 0 and not _in_backward(event)}
    origin = {number: _region(maker, {})[0] for number, maker in makers.items()}
    calls: Counter[Line] = Counter()
    microseconds: Counter[Line] = Counter()

    def add(line: Line, duration: float) -> None:
        calls[line] += 1
        microseconds[line] += duration  # type: ignore[assignment]

    for event in in_order:
        region, direction = _region(event, origin)
        for kernel in event.kernels:
            if kernel.name not in REGIONS:  # a range shows on the device too
                add(Line(region, direction, "kernel", kernel.name), kernel.duration)
        if any(_is_op(above) for above in _above(event)):
            continue
        if _is_op(event):
            add(Line(region, direction, "op", event.name), event.cpu_time_total)
        else:
            add(Line(region, direction, "host", "between the ops"), event.self_cpu_time_total)
    return {line: Sums(calls[line], microseconds[line]) for line in calls}


def _region(event: Any, origin: Mapping[int, str]) -> tuple[str, str]:
    """Region and direction of an event."""
    for one in (event, *_above(event)):
        if one.name in REGIONS:
            return one.name, "forward"
        if one.name.startswith(NODE):  # that of a parameter's gradient has no number
            return origin.get(one.sequence_nr, NETWORK), "backward"
    return STEP, "forward"


def _in_backward(event: Any) -> bool:
    return any(one.name.startswith(NODE) for one in (event, *_above(event)))


def _above(event: Any) -> Iterator[Any]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


def _is_op(event: Any) -> bool:
    return "::" in event.name and "autograd::" not in event.name


def write(path: Path, facts: Mapping[str, object], profile: Profile) -> None:
    """Write the lines as CSV, the longest first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*facts, *Line._fields, *Sums._fields])
        for line, sums in by_time(profile):
            writer.writerow([*facts.values(), *line, sums.calls, f"{sums.microseconds:.1f}"])


def by_time(profile: Profile) -> list[tuple[Line, Sums]]:
    """The lines, the longest first."""
    return sorted(profile.items(), key=lambda item: -item[1].microseconds)


def overview(profile: Profile) -> Table:
    """How many ops and kernels each region runs, and how long the host and the device take."""
    table = Table(title="One training step", title_justify="left", box=box.SIMPLE)
    table.add_column("region")
    table.add_column("")
    for heading in ("ops", "host ms", "kernels", "device ms"):
        table.add_column(heading, justify="right")
    for region in REGIONS:
        for direction in ("forward", "backward"):
            part = {line: sums for line, sums in profile.items() if line[:2] == (region, direction)}
            if part:
                host = _total(part, "op", "host")
                ops, device = _total(part, "op"), _total(part, "kernel")
                cells = (
                    ops.calls,
                    f"{host.microseconds / 1e3:.2f}",
                    device.calls,
                    f"{device.microseconds / 1e3:.2f}",
                )
                table.add_row(region, direction, *map(str, cells))
    return table


def _total(profile: Profile, *kinds: str) -> Sums:
    chosen = [sums for line, sums in profile.items() if line.kind in kinds]
    return Sums(sum(sums.calls for sums in chosen), sum(sums.microseconds for sums in chosen))


def details(region: str, profile: Profile) -> Table:
    """Every op and kernel of a region."""
    table = Table(title=region, title_justify="left", box=box.SIMPLE)
    for heading in ("", "kind", "name"):
        table.add_column(heading)
    for heading in ("calls", "us"):
        table.add_column(heading, justify="right")
    for line, sums in by_time(profile):
        if line.region == region:
            calls = "" if line.kind == "host" else str(sums.calls)
            table.add_row(line.direction, line.kind, line.name[:80], calls, f"{sums.microseconds:.1f}")
    return table


if __name__ == "__main__":
    main()
