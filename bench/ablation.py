"""Time training steps with each part of the engine turned off alone: `python -m bench.ablation`; see README.md."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from rich import box
from rich.table import Table

from bench import gate
from bench.lib import command, machine
from bench.lib.memory import Meter
from bench.lib.output import csv_rows
from bench.lib.output.csv_rows import AblationRow
from bench.lib.steps.variants import Variant, Workload, images_of
from bench.lib.timing import Call, SynchronisedClock, no_garbage_collection, rotated
from bench.step import STEP_TESTS, STEPS_PER_ROUND, WARM_UP
from engine.attacks import twin
from engine.config import RunConfig
from engine.kernels import dispatch
from engine.models.layers import StemNetwork
from engine.training.weights import half_weights

ALL_ON = "nothing"
PREFERENCE = "ENGINE_KERNELS"


@dataclass(frozen=True)
class Feature:
    """One part of the engine, and what turns it off.

    keys: of the configuration. kernels: the value of ENGINE_KERNELS. without: context in which the part is absent.
    absent: the reason why a run on a device has no such part, "" where it has one.
    """

    description: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    kernels: str | None = None
    keeps_memory: bool = True
    without: Callable[[], AbstractContextManager[object]] = nullcontext
    absent: Callable[[Workload, RunConfig], str] = lambda workload, on: ""

    @property
    def variant(self) -> Variant:
        """The step without the part."""
        return Variant(self.description, {"amp": True, **self.keys}, keeps_memory=self.keeps_memory)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Conditions under which the step without the part is made and run."""
        environment = {} if self.kernels is None else {PREFERENCE: self.kernels}
        with mock.patch.dict(os.environ, environment), self.without(), self.variant.conditions():
            yield


def _on_a_gpu_alone(workload: Workload, on: RunConfig) -> str:
    return "" if workload.device.type == "cuda" else "it exists on a GPU alone"


def _on_a_cpu_alone(workload: Workload, on: RunConfig) -> str:
    return "" if workload.device.type == "cpu" else "it exists on a CPU alone"


def _amp_is_float32(workload: Workload, on: RunConfig) -> str:
    return "--amp is float32 here" if on.amp_dtype == "float32" else ""


def _is_off(key: str) -> Callable[[Workload, RunConfig], str]:
    def absent(workload: Workload, on: RunConfig) -> str:
        return "the step does not use it" if getattr(on, key, None) == "off" else ""

    return absent


def _op(name: str) -> Feature:
    def absent(workload: Workload, on: RunConfig) -> str:
        usual = dispatch.choose(name, workload.device)
        return "the reference serves it anyway" if usual == "reference" else ""

    return Feature(f"{name} by plain torch", kernels=f"auto,{name}=reference", absent=absent)


def _unfolded() -> AbstractContextManager[object]:
    return mock.patch.object(twin, "conv_bn_pairs", return_value=[])


def _converted() -> AbstractContextManager[object]:
    return mock.patch.object(half_weights, "build", return_value=None)


def _undivided() -> AbstractContextManager[object]:
    return mock.patch.object(StemNetwork, "is_divisible", False)


def features() -> dict[str, Feature]:
    """Every part by the name of its row; the first row is the step with all of them."""
    return {
        ALL_ON: Feature("everything on, as `engine train --amp` runs it"),
        "amp": Feature("passes in float32", {"amp": False}, absent=_amp_is_float32),
        "folding": Feature("teachers keep their BatchNorm", without=_unfolded),
        "half weights": Feature("autocast converts the weights", without=_converted, absent=_amp_is_float32),
        "division": Feature("the attack differentiates the first convolution, too", without=_undivided),
        **{f"op {name}": _op(name) for name in dispatch.SERVED_BY},
        "ops": Feature("all ops by plain torch", kernels="reference"),
        "kept memory": Feature(
            "freed memory given back as glibc does", keeps_memory=False, absent=_on_a_cpu_alone
        ),
        "winograd": Feature(
            "no convolution by Winograd's algorithm", {"winograd": "off"}, absent=_is_off("winograd")
        ),
        "compile": Feature("passes op by op", {"compile": "off"}, absent=_on_a_gpu_alone),
        "lanes": Feature("one CUDA stream", {"lanes": "off"}, absent=_on_a_gpu_alone),
        "graph of the step": Feature("the attack alone is captured", {"graphs": "attack"}, absent=_on_a_gpu_alone),
        "graphs": Feature("nothing is captured", {"graphs": "off"}, absent=_on_a_gpu_alone),
    }


@dataclass(frozen=True)
class Ready:
    """A step that is compiled, captured and allocated. peak_mib: of its tensors, None on a CPU."""

    step: Call
    peak_mib: float | None


@command.command
@command.methods_option(("iad1",))
@click.option("--off", "wanted", type=click.Choice(list(features())[1:]), multiple=True, help="Repeatable. [all]")
@command.model_option()
@command.batch_size_option()
@click.option("--dataset", default="random", show_default=True, help="Of the images, or random.")
@command.device_option()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=2), help="Of each that count.")
@command.out_option()
def main(
    names: Sequence[str],
    wanted: Sequence[str],
    model: str,
    batch_size: int,
    dataset: str,
    device: torch.device,
    rounds: int,
    out: Path | None,
) -> None:
    """Time a training step with each part of the engine turned off alone, beside the step with everything on."""
    with command.refused():
        images = images_of(dataset, batch_size)
    if not gate.tests_pass([STEP_TESTS], ["textbook"], "cpu"):
        raise click.ClickException("the engine's step is not the textbook's, so nothing is timed")
    with command.results(device, out) as results:
        rows: list[AblationRow] = []
        for name in names:
            workload = Workload(name, model, batch_size, images, device)
            taken, left_out = there(workload, wanted)
            for line in left_out:
                results.console.print(line)
            results.console.print(f"timing {name} without: {', '.join(taken)}; {rounds} rounds")
            rows += measure(workload, taken, rounds, results.facts)
            results.write("ablation.csv", rows)
            results.console.print(table(name, rows))


def there(workload: Workload, wanted: Sequence[str] = ()) -> tuple[dict[str, Feature], list[str]]:
    """The parts that a run on the workload's device has, the step with all of them first; a line for each other.

    wanted: names, all where none is given.
    """
    known = features()
    on = workload.config(known[ALL_ON].variant)
    taken, left_out = {ALL_ON: known.pop(ALL_ON)}, []
    for name, feature in known.items():
        if wanted and name not in wanted:
            continue
        if reason := feature.absent(workload, on):
            left_out.append(f"left out: {name}: {reason}")
        else:
            taken[name] = feature
    return taken, left_out


def measure(
    workload: Workload, taken: Mapping[str, Feature], rounds: int, facts: machine.Facts
) -> list[AblationRow]:
    """Rows of one method: each step once in every round, the order turned from round to round."""
    ready = {name: warmed_up(workload, feature) for name, feature in taken.items()}
    count = STEPS_PER_ROUND[workload.device.type]
    clock = SynchronisedClock(workload.device)
    samples: dict[str, list[float]] = {name: [] for name in taken}
    with no_garbage_collection():
        for turn in range(rounds):
            for name, feature in rotated(list(taken.items()), turn):
                with feature.off():
                    samples[name].append(clock.seconds(ready[name].step, count))
    peaks = {name: one.peak_mib for name, one in ready.items()}
    return [csv_rows.ablation_row(facts, workload, name, ALL_ON, samples, count, peaks) for name in taken]


def warmed_up(workload: Workload, feature: Feature) -> Ready:
    """The step without a part after the steps that do not count."""
    is_gpu = workload.device.type == "cuda"
    held = torch.cuda.memory_allocated(workload.device) if is_gpu else 0
    with feature.off():
        meter = Meter(workload.device)
        step = workload.step(feature.variant)
        for _ in range(WARM_UP[workload.device.type]):
            step()
    return Ready(step, meter.peak() - held / 2**20 if is_gpu else None)


def table(method: str, rows: Sequence[AblationRow]) -> Table:
    """Table of a method's rows."""
    mine = [row for row in rows if row.method == method]
    result = Table(
        title=f"{method}, {mine[0].model}, batch of {mine[0].batch_size}", title_justify="left", box=box.SIMPLE
    )
    result.add_column("without", no_wrap=True)
    for heading in ("s/step", "of everything on", "10 %", "90 %", "MiB", "of everything on"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in mine:
        memory = ("", "") if row.peak_mib is None else (f"{row.peak_mib:,.0f}", f"{row.relative_memory:.2f}")
        result.add_row(
            row.off, f"{row.median_s:.4f}", f"{row.relative:.3f}", f"{row.q10_relative:.3f}",
            f"{row.q90_relative:.3f}", *memory,
        )  # fmt: skip
    return result


if __name__ == "__main__":
    main()
