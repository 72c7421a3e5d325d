"""Time evaluations beside the published AutoAttack: `python -m bench.evaluation`; see README.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import torch
from rich import box
from rich.table import Table

from bench.lib import command, machine
from bench.lib.output import chart
from bench.lib.output.csv_rows import EvaluationPredictedRow, EvaluationRow
from bench.lib.roofline import GPUS
from bench.lib.steps import attacks_timed
from bench.lib.steps.attacks_predicted import ATTACK_ASSUMPTIONS, CountedOps, counted_ops, predicted
from bench.lib.steps.attacks_timed import TEXTBOOK, Subject, TimedAttack
from engine.attacks.autoattack import WHOLE
from engine.common.files import checkpoint_of
from engine.evaluation.evaluate_checkpoint import EvaluationConfig
from engine.evaluation.measure import batch_of
from engine.models.weights import load_model
from engine.pipelines import datasets
from engine.pipelines.splits import Request, limited

USUAL_ATTACKS = ("pgd20", "cw", "aa")


# many parameters: the options of the command
@command.command
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--attack", "attacks", multiple=True, help=f"Repeatable. [{', '.join(USUAL_ATTACKS)}]")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    type=click.Choice(attacks_timed.AA_VARIANTS),
    help="Repeatable, besides the published one. [all]",
)
@click.option("--images", default=100, show_default=True, type=click.IntRange(min=1), help="Test images.")
@click.option(
    "--shorter", default=1, show_default=True, type=click.IntRange(1, 20), help="Divides AutoAttack's steps."
)
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    type=click.Choice(list(GPUS)),
    help="Repeatable; predicts AutoAttack's seconds on such a GPU, of the calls that were counted.",
)
@click.option("--data", type=click.Path(), help="Where the data set lies.")
@command.device_option()
@command.out_option()
def main(
    checkpoints: Sequence[Path],
    attacks: Sequence[str],
    variants: Sequence[str],
    images: int,
    shorter: int,
    gpus: Sequence[str],
    data: str | None,
    device: torch.device,
    out: Path | None,
) -> None:
    """Attack the networks of checkpoints, each attack by all variants in turn, on the same images."""
    with command.refused():
        subjects = [subject_of(path, images, shorter, data, device) for path in checkpoints]
    with command.results(device, out) as results:
        rows: list[EvaluationRow] = []
        predictions: list[EvaluationPredictedRow] = []
        for name, subject in subjects:
            for attack in attacks or USUAL_ATTACKS:
                found: dict[str, TimedAttack] = {}
                for variant in attacks_timed.variants_of(attack):
                    if variants and variant not in (TEXTBOOK, *variants):
                        continue
                    with command.refused():
                        found[variant] = attacks_timed.timed(variant, attack, subject)
                    rows.append(row_of(results.facts, name, attack, subject, variant, found))
                    results.write("evaluation.csv", rows)
                if attack == WHOLE and gpus:
                    ops = counted_ops(subject, found[TEXTBOOK])
                    predictions += [predicted_row(results.facts, name, gpu, subject, ops) for gpu in gpus]
        results.console.print(table(rows))
        if predictions:
            results.write("evaluation-predicted.csv", predictions)
            results.console.print(table_of_predictions(predictions))
            for assumption in ATTACK_ASSUMPTIONS:
                results.console.print(f"assumed: {assumption}")
        chart.draw_evaluations(results.path("evaluation.png"), rows)


def subject_of(
    path: Path, images: int, shorter: int, data: str | None, device: torch.device
) -> tuple[str, Subject]:
    """Name and network of a checkpoint, and so many test images of the data set that it was trained on."""
    loaded = load_model(checkpoint_of(str(path)))
    wanted = EvaluationConfig([], data=data).completed(loaded)
    found = datasets.find(wanted.dataset, wanted.data, Request(limit_test=images, only_test=True))
    loaded = loaded.for_classes(found.class_names)
    network = loaded.module.to(device).eval().requires_grad_(False)
    sample_N = limited(found.test.labels, images, 0, "--images")
    x_nat, labels_N = batch_of(found.test.images, found.test.labels, sample_N, device, torch.float32)
    return f"{loaded.name}, {wanted.dataset}", Subject(network, x_nat, labels_N, wanted.attack.epsilon, shorter)


def row_of(
    facts: machine.Facts, name: str, attack: str, subject: Subject, variant: str, found: dict[str, TimedAttack]
) -> EvaluationRow:
    """The row of one variant. found: of the variants so far, the published one first."""
    timed, published = found[variant], found[TEXTBOOK]
    return EvaluationRow(
        **facts,
        network=name,
        attack=attack,
        shorter=subject.shorter,
        variant=variant,
        images=len(subject.x_nat),
        stood=int(timed.stood_N.sum()),
        other_verdicts=int((timed.stood_N != published.stood_N).sum()),
        forward=timed.forward,
        backward=timed.backward,
        seconds=timed.seconds,
        speedup=published.seconds / timed.seconds,
    )


def predicted_row(
    facts: machine.Facts, name: str, gpu: str, subject: Subject, ops: CountedOps
) -> EvaluationPredictedRow:
    """The row of a GPU."""
    hardware = GPUS[gpu]
    return EvaluationPredictedRow(
        date=facts["date"],
        commit=facts["commit"],
        torch=facts["torch"],
        gpu=hardware.name,
        network=name,
        shorter=subject.shorter,
        images=len(subject.x_nat),
        **predicted(ops, hardware)._asdict(),
    )


def table_of_predictions(rows: Sequence[EvaluationPredictedRow]) -> Table:
    """Seconds of AutoAttack, and how many times faster the engine is than the package in the same format."""
    result = Table(title="PREDICTED seconds of AutoAttack, not measured", title_justify="left", box=box.SIMPLE)
    for heading in ("GPU", "network"):
        result.add_column(heading)
    for heading in ("published", "engine", "x", "published, TF32", "engine, TF32", "x"):
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(
            row.gpu, row.network, f"{row.published_s:.2f}", f"{row.engine_s:.2f}",
            f"{row.published_s / row.engine_s:.2f}", f"{row.published_tf32_s:.2f}", f"{row.engine_tf32_s:.2f}",
            f"{row.published_tf32_s / row.engine_tf32_s:.2f}",
        )  # fmt: skip
    return result


def table(rows: Sequence[EvaluationRow]) -> Table:
    """Table of all rows."""
    first = rows[0]
    steps = "" if first.shorter == 1 else f", AutoAttack with 1/{first.shorter} of its steps"
    title = f"Evaluation of {first.images} images{steps}, {first.processor}"
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading in ("network", "attack", "variant"):
        result.add_column(heading)
    for heading in ("stood", "other verdicts", "forward", "backward", "seconds", "x"):
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(
            row.network, row.attack, row.variant, f"{row.stood:,}", f"{row.other_verdicts:,}", f"{row.forward:,}",
            f"{row.backward:,}", f"{row.seconds:.1f}", f"{row.speedup:.2f}",
        )  # fmt: skip
    return result


if __name__ == "__main__":
    main()
