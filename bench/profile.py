"""Ops and kernels that a training step runs outside the networks: `python -m bench.profile`. See README.md.

The step is the trainer's, and its ranges are those of `engine.training.performance.profiling`. What the backward
runs belongs to the range whose forward made its node of the graph.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich import box
from rich.table import Table
from torch.profiler import ProfilerActivity, record_function

from bench.lib.command import (
    batch_size_option,
    command,
    device_option,
    model_option,
    out_option,
    refused,
    results,
)
from bench.lib.steps.engine_step import EngineStep
from bench.lib.steps.variants import RANDOM, images_of
from engine import config
from engine.kernels import dispatch
from engine.training.performance.profiling import DETAILS, PHASES

NETWORK, STEP = "network", "rest of the step"
REGIONS = {
    "crop_flip": "crop_flip",
    "attack": "rest of the attack",
    "random_start": "random_start",
    "attack: update": "pgd_update",
    "loss": "distill_loss",
    "network": NETWORK,
    STEP: STEP,
}
"""Regions of a step by the name of their range, of which the innermost counts."""
RANGES = frozenset((*PHASES, *DETAILS, STEP))
NODE = "autograd::engine::evaluate_function: "
STEPS = 3


class Group(NamedTuple):
    """Events that are counted together.

    direction: forward or backward. kind: "op", called from Python or by a node of the graph; "kernel", on the
    device; "host", the time between ops: Python's, autograd's, and that of native code that is no op of torch's.
    """

    region: str
    direction: str
    kind: str
    name: str


class Cost(NamedTuple):
    """Calls and microseconds of a group."""

    calls: int
    microseconds: float


Profile = dict[Group, Cost]


@command
@click.option("--method", default="iad2", show_default=True, help="The row of weights.")
@model_option()
@batch_size_option(32)
@click.option("--amp", is_flag=True, help="Network passes in half precision.")
@device_option()
@out_option()
def main(method: str, model: str, batch_size: int, amp: bool, device: torch.device, out: Path | None) -> None:
    """Profile one training step: which ops and kernels run outside the networks, how often and how long."""
    with refused():
        keys = {"method": method, "model": model, "batch_size": batch_size, "amp": amp, "device": str(device)}
        step = EngineStep(config.load(keys), images_of(RANDOM, batch_size))
    chosen = step.precision
    served = ", ".join(
        f"{op} {dispatch.choose(op, chosen.device, fused=chosen.fused)}" for op in dispatch.SERVED_BY
    )
    with results(chosen.device, out) as found:
        profile = summed(record(step, chosen.device))
        facts = {**found.facts, "method": method, "model": model, "batch_size": batch_size, "served": served}
        write(found.path(f"profile-{method}-{model}{'-amp' * amp}.csv"), facts, profile)
        found.console.print(
            f"{method} {model}, batch of {batch_size}, {chosen.describe()}, {facts['device']}; {served}"
        )
        found.console.print(overview(profile))
        for region in REGIONS.values():
            if region != NETWORK:
                found.console.print(details(region, profile))


def record(training_step: Callable[[], None], device: torch.device) -> list[Any]:
    """The profiler's events of the last step; those before pay for compilation and the order of the epoch."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for _ in range(STEPS - 1):
        training_step()
    with torch.profiler.profile(activities=activities) as profiler, record_function(STEP):
        training_step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return list(profiler.events())


def summed(events: Iterable[Any]) -> Profile:
    """Calls and times of the events by group."""
    in_order = sorted(
        (event for event in events if event.device_type.name == "CPU"),
        key=lambda event: event.time_range.start,
    )
    # The number of a node is that of the op that made it: the last one that began with this number.
    makers = {event.sequence_nr: event for event in in_order if event.sequence_nr >= 0 and not _in_backward(event)}
    origin = {number: _region(maker, {})[0] for number, maker in makers.items()}
    calls: Counter[Group] = Counter()
    microseconds: Counter[Group] = Counter()

    def add(group: Group, duration: float) -> None:
        calls[group] += 1
        microseconds[group] += duration  # type: ignore[assignment]

    for event in in_order:
        region, direction = _region(event, origin)
        for kernel in event.kernels:
            if kernel.name not in RANGES:  # a range shows on the device too
                add(Group(region, direction, "kernel", kernel.name), kernel.duration)
        if any(_is_op(above) for above in _above(event)):
            continue
        if _is_op(event):
            add(Group(region, direction, "op", event.name), event.cpu_time_total)
        else:
            add(Group(region, direction, "host", "between the ops"), event.self_cpu_time_total)
    return {group: Cost(calls[group], microseconds[group]) for group in calls}


def _region(event: Any, origin: Mapping[int, str]) -> tuple[str, str]:
    """Region and direction of an event."""
    for one in (event, *_above(event)):
        if one.name in REGIONS:
            return REGIONS[one.name], "forward"
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
    """Write the groups as CSV, the longest first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*facts, *Group._fields, *Cost._fields])
        for group, cost in by_time(profile):
            writer.writerow([*facts.values(), *group, cost.calls, f"{cost.microseconds:.1f}"])


def by_time(profile: Profile) -> list[tuple[Group, Cost]]:
    """The groups, the longest first."""
    return sorted(profile.items(), key=lambda item: -item[1].microseconds)


def overview(profile: Profile) -> Table:
    """Ops and kernels of each region, and milliseconds of the host and the device."""
    table = Table(title="One training step", title_justify="left", box=box.SIMPLE)
    table.add_column("region")
    table.add_column("")
    for heading in ("ops", "host ms", "kernels", "device ms"):
        table.add_column(heading, justify="right")
    for region in REGIONS.values():
        for direction in ("forward", "backward"):
            part = {group: cost for group, cost in profile.items() if group[:2] == (region, direction)}
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


def _total(profile: Profile, *kinds: str) -> Cost:
    chosen = [cost for group, cost in profile.items() if group.kind in kinds]
    return Cost(sum(cost.calls for cost in chosen), sum(cost.microseconds for cost in chosen))


def details(region: str, profile: Profile) -> Table:
    """Every op and kernel of a region."""
    table = Table(title=region, title_justify="left", box=box.SIMPLE)
    for heading in ("", "kind", "name"):
        table.add_column(heading)
    for heading in ("calls", "us"):
        table.add_column(heading, justify="right")
    for group, cost in by_time(profile):
        if group.region == region:
            calls = "" if group.kind == "host" else str(cost.calls)
            table.add_row(group.direction, group.kind, group.name[:80], calls, f"{cost.microseconds:.1f}")
    return table


if __name__ == "__main__":
    main()
