"""Time the published scripts beside ours in one run: `python -m bench.peers --iad PATH`. README.md says how."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from rich import box
from rich.table import Table

from bench import gate
from bench.lib import command, machine
from bench.lib.output import chart, csv_rows
from bench.lib.output.csv_rows import PeerRow, cell
from bench.lib.steps import published
from bench.lib.steps.peer_process import PUBLISHED, Peer
from bench.lib.steps.turns import PeerProcess, PeerRound
from bench.lib.steps.variants import RANDOM, VARIANTS, images_of
from bench.lib.timing import rotated
from bench.step import STEP_TESTS, STEPS_PER_ROUND, WARM_UP
from engine import config, models
from engine.runs import assemble
from engine.training import plan

CANDIDATES = (PUBLISHED, *VARIANTS)
WITHOUT_CUDA = ("plain", "textbook", "expert-fp32", "expert", "engine", "engine-amp")
WITH_CUDA = ("plain", "textbook", "expert-fp32", "expert", "expert-graph", "engine", "engine-amp")
IMAGES = ("cifar10", RANDOM)
QUICK_BATCH, QUICK_ROUNDS = 4, 2
NOT_COMPILED = ("plain", "textbook", "engine", "engine-amp")
"""The candidates of --quick."""


# many parameters: one for each option
@command.command
@click.option("--iad", type=click.Path(path_type=Path), help="Checkout of the published scripts.")
@command.methods_option(("at", "ard", "iad1", "akd2", "iad2"))
@click.option("--candidate", "names_of", type=click.Choice(CANDIDATES), multiple=True, help="Repeatable.")
@command.model_option()
@command.batch_size_option()
@click.option("--dataset", default="cifar10", show_default=True, type=click.Choice(IMAGES), help="Of the images.")
@command.device_option()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=2), help="Of each that count.")
@click.option("--quick", is_flag=True, help="Tiny, to see that everything works; its figures mean nothing.")
@command.out_option()
def main(
    iad: Path | None,
    names: Sequence[str],
    names_of: Sequence[str],
    model: str,
    batch_size: int,
    dataset: str,
    device: torch.device,
    rounds: int,
    quick: bool,
    out: Path | None,
) -> None:
    """Time a step of each method as published, as most write it, as an expert does, and as the engine does."""
    if quick:
        batch_size, rounds, dataset = QUICK_BATCH, QUICK_ROUNDS, RANDOM
    with command.refused():
        images_of(dataset, batch_size)  # found, or refused
        candidates = chosen(names_of, iad, device, quick=quick)
        origin = None if iad is None else PublishedSource.of(iad.resolve(), names, model)
    if not gate.tests_pass([STEP_TESTS], ["textbook"], "cpu"):
        raise click.ClickException("the engine's step is not the textbook's, so nothing is timed")
    failures: list[str] = []
    with command.results(device, out) as results:
        results.console.print(f"published: commit or digest {origin.source}" if origin else NO_CHECKOUT)
        rows: list[PeerRow] = []
        for name in names:
            peer = Peer("", name, model, batch_size, dataset, str(device))
            peers = [one for wanted in candidates if (one := _peer(peer, wanted, origin))]
            if origin and PUBLISHED in candidates and name not in published.SCRIPTS:
                results.console.print(f"left out: {name} as published: {NO_SCRIPT}")
            if not peers:
                continue
            results.console.print(f"timing {name}: {', '.join(one.candidate for one in peers)}; {rounds} rounds")
            found = measure(peers, rounds, results.facts, origin.source if origin else "", failures)
            if not found:
                continue
            rows += found
            results.write("peers.csv", rows)
            results.console.print(table(found))
            for line in other_passes(found):
                results.console.print(line)
        if rows:
            chart.draw_peers(results.path("peers.png"), rows)
    if failures:
        raise click.ClickException("; ".join(failures))


NO_CHECKOUT = "left out: published: no --iad PATH names a checkout of the scripts"
NO_SCRIPT = "no script of it runs as it was published"


@dataclass(frozen=True)
class PublishedSource:
    """A checkout of the published scripts. network: the model's name there. source: commit or digest."""

    folder: Path
    network: str
    source: str

    @classmethod
    def of(cls, folder: Path, methods: Sequence[str], model: str) -> PublishedSource:
        """Raises ValueError for what is not the published code, or has no such network."""
        published.check(folder, [name for name in methods if name in published.SCRIPTS])
        if model not in published.NETWORKS:
            raise ValueError(f"--model {model}: the published code has {', '.join(published.NETWORKS)}")
        return cls(folder, published.NETWORKS[model], published.identity(folder))


def chosen(wanted: Sequence[str], iad: Path | None, device: torch.device, *, quick: bool) -> tuple[str, ...]:
    """The candidates, that as published first. Raises ValueError where it is wanted and there is no checkout."""
    if PUBLISHED in wanted and iad is None:
        raise ValueError(f"--candidate {PUBLISHED} needs --iad PATH, a checkout of the published scripts")
    usual = NOT_COMPILED if quick else WITH_CUDA if device.type == "cuda" else WITHOUT_CUDA
    given = wanted or ((PUBLISHED, *usual) if iad else usual)
    return tuple(name for name in CANDIDATES if name in given)


def _peer(peer: Peer, candidate: str, origin: PublishedSource | None) -> Peer | None:
    """The step of a candidate, None where there is none."""
    if candidate != PUBLISHED:
        return replace(peer, candidate=candidate)
    if origin is None or peer.method not in published.SCRIPTS:
        return None
    return replace(peer, candidate=candidate, iad=str(origin.folder), network=origin.network)


def measure(
    peers: Sequence[Peer], rounds: int, facts: machine.Facts, source: str, failures: list[str]
) -> list[PeerRow]:
    """Rows of one method: a process for each candidate, which take turns. failures: takes those that fail."""
    device = torch.device(peers[0].device)
    count = STEPS_PER_ROUND[device.type]
    taken: dict[str, list[PeerRound]] = {}
    passes: dict[str, tuple[float, float] | None] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        steppers: dict[str, PeerProcess] = {}
        for peer in peers:
            try:
                stepper = running.enter_context(peer.start(Path(folder)))
                passes[peer.candidate] = passes_of(peer, stepper, stepper.steps(WARM_UP[device.type]))
            except (ChildProcessError, ValueError) as error:
                failures.append(f"{peer.method}, {peer.candidate}: {error}")
                continue
            steppers[peer.candidate], taken[peer.candidate] = stepper, []
        for turn in range(rounds):
            for name, stepper in rotated(list(steppers.items()), turn) if steppers else ():
                try:
                    taken[name].append(stepper.steps(count))
                except ChildProcessError as error:
                    failures.append(f"{peers[0].method}, {name}: {error}")
                    del steppers[name], taken[name]
    samples = {name: [one.seconds for one in found] for name, found in taken.items()}
    peaks = {name: found[-1].peak_mib for name, found in taken.items()}
    return [
        csv_rows.peer_row(
            facts,
            peer,
            source if peer.candidate == PUBLISHED else "",
            samples,
            count,
            passes[peer.candidate],
            peaks,
        )
        for peer in peers
        if peer.candidate in taken
    ]


def passes_of(peer: Peer, stepper: PeerProcess, first: PeerRound) -> tuple[float, float] | None:
    """Forward passes of networks in a step, and those with a backward pass; None where nothing tells them.

    As published they are counted, in the engine the plan tells them.
    Raises ValueError where the published network is not ours: other parameters, or other operations.
    """
    if peer.candidate != PUBLISHED:
        return planned(peer.method) if peer.candidate.startswith("engine") else None
    ours = published.size_of(models.build(peer.model, 10))
    if ours != stepper.first:
        theirs = _size_in_words(stepper.first)
        raise ValueError(f"the published {peer.network} has {theirs}; {peer.model} has {_size_in_words(ours)}")
    counted = first.told["counted"]
    return counted["forwards"], counted["backwards"]


def _size_in_words(size: Mapping[str, float]) -> str:
    return f"{size['parameters']:,.0f} parameters and {size['flops']:,.0f} operations a forward pass"


def planned(method: str, semantics: str = "paper") -> tuple[float, float]:
    """The passes of a step that the engine plans, after the warm-up."""
    run = config.load({"method": method, "semantics": semantics, "loss": {"warmup": 0}})
    passes = plan.passes(assemble.method_of(run), run.attack, run.forwards)
    return sum(passes), passes.attacked + passes.trained


def other_passes(rows: Sequence[PeerRow]) -> list[str]:
    """A line for each published step that runs other passes than the engine plans for `--semantics official`."""
    lines = []
    for row in rows:
        told = (row.forwards, row.backwards)
        if row.candidate == PUBLISHED and told != (expected := planned(row.method, "official")):
            lines.append(
                f"{row.method} as published runs {row.forwards:g} passes, {row.backwards:g} with a backward pass; "
                f"--semantics official plans {expected[0]:g} and {expected[1]:g}"
            )
    return lines


def table(rows: Sequence[PeerRow]) -> Table:
    """Table of a method's rows."""
    first = rows[0]
    title = f"{first.method}, {first.model}, batch of {first.batch_size}"
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    result.add_column("candidate", no_wrap=True)
    for heading in (
        "s/step",
        "10 %",
        "90 %",
        "s/epoch",
        "x published",
        "x plain",
        "passes",
        "backward",
        "MiB",
        "of published",
    ):
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(
            row.candidate, f"{row.median_s:.4f}", f"{row.q10_s:.4f}", f"{row.q90_s:.4f}", f"{row.epoch_s:,.1f}",
            *(cell(form, value) for form, value in (
                ("{:.2f}", row.speedup_over_published), ("{:.2f}", row.speedup_over_plain), ("{:g}", row.forwards),
                ("{:g}", row.backwards), ("{:,.0f}", row.peak_mib), ("{:.2f}", row.relative_memory),
            )),
        )  # fmt: skip
    return result


if __name__ == "__main__":
    main()
