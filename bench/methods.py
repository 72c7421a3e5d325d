"""Train every method on a small part of CIFAR-10 by one protocol: `python -m bench.methods`.

Network, images, epochs, batch size, learning rate and seed are common to all, and so are the teachers, one by AT
and one by ST, which are trained first. Attack, loss and forwards are the method's own.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.table import Table

from bench import gate
from bench.lib import command
from bench.lib.output import csv_rows
from bench.lib.output.csv_rows import MethodRow
from bench.lib.steps.engine_step import EngineStep
from bench.lib.timing import SynchronisedClock, no_garbage_collection, rotated
from bench.step import WARM_UP
from engine import config, methods
from engine.common.console import Reporter
from engine.common.files import code_hash
from engine.common.stopping import Interrupted, RunFailed
from engine.config import RunConfig
from engine.config.semantics import NAMES
from engine.evaluation.measure import evaluate
from engine.models.weights import load_model
from engine.pipelines import datasets
from engine.pipelines.datasets import Dataset
from engine.pipelines.splits import Split
from engine.runs.lifecycle import train
from engine.runs.run_directory import RunDir
from engine.system import precision

EVERY = (*methods.METHODS, *(f"ard+{addition}" for addition in methods.ADDITIONS))
LEVEL = 0.001
"""An accuracy is above chance where guessing is as good with a smaller probability than this."""
TAUGHT_BY = {"teacher": "at", "teacher_st": "st"}
ATTACKED = 500  # test images
ROUNDS = 5
RUNS = gate.CHECKOUT / "build" / "methods"
# What is the method's own elsewhere, and here the same for all.
COMMON: dict[str, Any] = {
    "dataset": "cifar10",
    "normalize": False,
    "optim": {"schedule": "one-cycle", "weight_decay": 5e-4},
    "averaging": {"kind": "none", "start": None},
    "eval": {"attack": "fgsm", "final": [], "probe_size": 10},
}


@dataclass(frozen=True)
class Protocol:
    """Keys that all runs have in common. code: digest of the sources."""

    keys: dict[str, Any]
    code: str

    def of(self, method: str, semantics: str = NAMES[0]) -> RunConfig:
        """The configuration of a method, without teachers and place."""
        return config.load({"method": method, "semantics": semantics}, COMMON, self.keys)

    def name(self, run: RunConfig) -> str:
        """Digest of a run's settings, those of its teachers, and the sources."""
        trees = [run.tree(), *(self.of(method).tree() for method in TAUGHT_BY.values())]
        return hashlib.sha256(json.dumps([self.code, *trees], sort_keys=True).encode()).hexdigest()[:12]


@command.command
@command.methods_option(EVERY)
@click.option("--semantics", type=click.Choice(NAMES), default=NAMES[0], show_default=True, help="Reading of all.")
@command.model_option()
@command.batch_size_option(64)
@click.option("--epochs", default=10, show_default=True, type=click.IntRange(min=1))
@click.option("--lr", default=0.1, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--limit-train", default=1000, show_default=True, type=click.IntRange(min=1), help="Images.")
@click.option("--limit-test", default=2000, show_default=True, type=click.IntRange(min=1), help="Images.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Teachers: + 1 and + 2.")
@command.device_option()
@command.out_option()
def main(
    names: Sequence[str],
    semantics: str,
    device: torch.device,
    out: Path | None,
    **keys: Any,
) -> None:
    """Train and evaluate every method on real images, with the same budget; goes on where it was stopped."""
    with command.refused():
        protocol = Protocol(keys | {"device": str(device)}, code_hash())
        wanted = {name: protocol.of(name, semantics) for name in names}
        data = datasets.load(COMMON["dataset"], limit_train=keys["limit_train"], limit_test=keys["limit_test"])
    failed: list[str] = []
    places = {name: place for place, name in enumerate(EVERY)}
    with command.results(device, out) as results:
        path = results.path("methods.csv")
        rows = csv_rows.read(path, MethodRow) if path.exists() else []
        for number, (name, run) in enumerate(wanted.items(), 1):
            say = _line(results, f"{number}/{len(wanted)} {name}: ")
            settings = protocol.name(run)
            if any(row.settings == settings for row in rows):
                say("measured before")
                continue
            try:
                row = measured(results.facts, protocol, run, data, say)
            except (ValueError, RunFailed) as error:
                failed.append(f"{name}: {error}")
                say(failed[-1])
                continue
            except Interrupted:
                raise click.ClickException("stopped; the same command goes on") from None
            rows = [other for other in rows if (other.method, other.semantics) != (name, semantics)] + [row]
            rows.sort(key=lambda row: (row.semantics, places.get(row.method, len(places))))
            results.write("methods.csv", rows)
        settled = {protocol.name(run) for run in wanted.values()}
        if shown := [row for row in rows if row.settings in settled]:
            results.console.print(table(shown))
    if failed:
        raise click.ClickException("; ".join(failed))


def _line(results: command.Results, begin: str) -> Callable[[str], None]:
    return lambda text: results.console.print(f"{begin}{text}")


def measured(
    facts: Any, protocol: Protocol, run: RunConfig, data: Dataset[Split], say: Callable[[str], None]
) -> MethodRow:
    """Train a method and its teachers, evaluate the last epoch's student, and time its step beside one of AT."""
    settings = protocol.name(run)
    place = RUNS / settings
    teachers = {}
    for number, (section, method) in enumerate(TAUGHT_BY.items(), 1):
        teacher = protocol.of(method)
        shared = RUNS / "teachers" / protocol.name(teacher)
        path = _trained(config.load(teacher.tree(), {"seed": run.seed + number, "out": str(shared)}), say)
        teachers[section] = {"checkpoint": str(path.last)}
    finished = _trained(config.load(run.tree(), teachers, {"out": str(place)}), say)
    student = load_model(finished.last, class_names=data.test.class_names).module
    (natural,) = evaluate(student, data.test, ["natural"]).values()
    (robust,) = evaluate(
        student, data.test, ["pgd20"], epsilon=run.attack.epsilon, limit=ATTACKED, seed=run.seed
    ).values()
    classes = len(data.test.class_names)
    p_value = chance_of(natural.correct, natural.n, classes)
    row = MethodRow(
        **facts,
        settings=settings,
        method=run.method,
        semantics=run.semantics,
        model=run.model,
        images=len(data.train),
        epochs=run.epochs,
        batch_size=run.batch_size,
        seed=run.seed,
        epoch_s=statistics.median(row["seconds"] for row in finished.rows() if row["event"] == "epoch"),
        relative_to_at=relative_to(protocol.of("at"), run, data),
        test_images=natural.n,
        attacked_images=robust.n,
        natural=natural.accuracy,
        pgd20=robust.accuracy,
        chance=1 / classes,
        p_value=p_value,
        above_chance=p_value < LEVEL,
    )
    say(f"{row.epoch_s:.1f} s/epoch, natural {row.natural:.1%}, PGD-20 {row.pgd20:.1%}")
    return row


def _trained(run: RunConfig, say: Callable[[str], None]) -> RunDir:
    """The run directory of a training that was finished before, or now."""

    class Told(Reporter):
        def epoch(self, row: Any, epochs: int, measured: str) -> None:
            say(f"{run.method}, epoch {row['epoch']}/{epochs}, loss {row['loss']:.3f}")

    return RunDir(train(run, Told(), again=True).path)


def relative_to(baseline: RunConfig, run: RunConfig, data: Dataset[Split]) -> float:
    """Seconds of a step by those of the baseline's: median of the ratios of rounds in which both take turns."""
    plain = {"loss": {"warmup": 0}, "compile": "off"}
    steps = [EngineStep(config.load(one.tree(), plain), data.train) for one in (run, baseline)]
    device = precision.device(run.device)
    clock = SynchronisedClock(device)
    seconds: list[list[float]] = [[], []]
    for step in steps:
        for _ in range(WARM_UP[device.type]):
            step()
    with no_garbage_collection(), precision.deterministic(amp=run.amp):
        for turn in range(ROUNDS):
            for which in rotated([0, 1], turn):
                seconds[which].append(clock.seconds(steps[which], 1))
    ratio = csv_rows.speedup(seconds[0], seconds[1])
    assert ratio is not None
    return ratio


def chance_of(correct: int, n: int, classes: int) -> float:
    """P(X >= correct) of X ~ Binomial(n, 1 / classes): that of guessing as well."""
    ways = sum(math.comb(n, k) * (classes - 1) ** (n - k) for k in range(correct, n + 1))
    return float(ways / classes**n)


def table(rows: Sequence[MethodRow]) -> Table:
    """Table of the rows, of one machine and one protocol."""
    first = rows[0]
    where = first.processor if first.device == "cpu" else first.device
    title = (
        f"{first.model}, {first.images:,} images of CIFAR-10, {first.epochs} epochs, "
        f"batches of {first.batch_size}, seed {first.seed}, {where}, "
        f"{first.threads} thread{'s' * (first.threads != 1)}"
    )
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading in ("method", "semantics"):
        result.add_column(heading, no_wrap=True)
    for heading in (
        "s/epoch",
        "x AT",
        f"natural, n = {first.test_images:,}",
        f"PGD-20, n = {first.attacked_images:,}",
        "above chance",
    ):
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(
            row.method, row.semantics, f"{row.epoch_s:.1f}", f"{row.relative_to_at:.2f}", f"{row.natural:.1%}",
            f"{row.pgd20:.1%}", f"{'yes' if row.above_chance else 'no'}, p = {row.p_value:.1g}",
        )  # fmt: skip
    return result


if __name__ == "__main__":
    main()
