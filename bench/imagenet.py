"""Train on photographs as ImageNet's, by several processes, killed and resumed: `python -m bench.imagenet`.

See README.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.table import Table

from bench.lib import command, machine, photographs
from bench.lib.output.csv_rows import ImagenetRow, ResumedRow
from bench.lib.steps import killed_run, stages
from bench.lib.steps.killed_run import KilledRun
from bench.lib.steps.stages import TimedStage
from engine import config, models

MODELS = ("resnet50", "timm:vit_tiny_patch16_224", "timm:convnext_atto")
QUICK = {"images": 24, "batch_size": 8, "image_size": 64, "steps": 2}
_TRAIN_PER_TEST = 16
_LR = 0.01  # of networks that begin at random: nothing is to be learnt here, and nothing to overflow


# many parameters: one for each option
@command.command
@click.option("--model", "names", multiple=True, help=f"Repeatable. [{', '.join(MODELS)}]")
@click.option("--images", default=2000, show_default=True, type=click.IntRange(min=4), help="Training images.")
@click.option("--image-size", default=photographs.SIZE, show_default=True, type=click.IntRange(min=1))
@command.batch_size_option(32, "Of all processes.")
@click.option("--procs", "processes", default=2, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--steps", default=8, show_default=True, type=click.IntRange(min=1), help="Timed of attack and step."
)
@click.option("--quick", is_flag=True, help=f"{', '.join(f'{key} {value}' for key, value in QUICK.items())}.")
@command.device_option("cpu, or cuda: a GPU a process.")
@command.out_option()
def main(
    names: Sequence[str],
    images: int,
    image_size: int,
    batch_size: int,
    processes: int,
    steps: int,
    quick: bool,
    device: torch.device,
    out: Path | None,
) -> None:
    """Train AT with two steps of the attack on made JPEG files of 224 pixels, one epoch of each network.

    First each stage is timed alone; then a run of as many processes is killed within its epoch and resumed, and
    compared with one that is not.
    """
    if quick:
        images, batch_size, image_size, steps = QUICK.values()
    chosen = names or MODELS
    with command.refused():
        for name in chosen:
            models.check(name)
        if batch_size % processes:
            raise ValueError(f"batch_size {batch_size} must be a multiple of the {processes} processes")
    with command.results(device, out) as results, tempfile.TemporaryDirectory() as scratch:
        test_images = max(images // _TRAIN_PER_TEST, 2 * len(photographs.CLASSES))
        data = photographs.make(Path(scratch) / "photographs", images, test_images=test_images)
        every = [keys_of(name, data, image_size, batch_size, device) for name in chosen]
        rows: list[ImagenetRow] = []
        for keys in every:
            rows += stage_rows(results.facts, keys, processes, stages.timed(processes, keys, steps))
            results.write("imagenet.csv", rows)
        resumed: list[ResumedRow] = []
        for number, keys in enumerate(every):
            place = Path(scratch) / str(number)
            place.mkdir()
            resumed.append(resumed_row(results.facts, keys, processes, killed_run.outcome(keys, processes, place)))
            results.write("imagenet-resumed.csv", resumed)
        results.console.print(table(rows))
        for row in resumed:
            results.console.print(sentence(row))
    if different := [row.model for row in resumed if not row.same_bits]:
        raise click.ClickException(f"resumed runs differ from undisturbed ones: {', '.join(different)}")


def keys_of(name: str, data: Path, image_size: int, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Configuration of one epoch of adversarial training, which is measured on the test images."""
    return {
        "method": "at", "model": name, "dataset": "folder", "data": str(data), "image_size": image_size,
        "batch_size": batch_size, "epochs": 1, "validation": 0, "lr": _LR, "device": device.type,
        "attack": {"num_steps": 2}, "eval": {"attack": "fgsm", "final": [], "probe_size": 2},
    }  # fmt: skip


def stage_rows(
    facts: machine.Facts, keys: dict[str, Any], processes: int, found: Sequence[TimedStage]
) -> list[ImagenetRow]:
    """A row of each stage."""
    run = config.load(keys)
    return [
        ImagenetRow(
            **facts,
            model=run.model,
            image_size=run.image_size or 0,
            batch_size=run.batch_size,
            processes=processes,
            attack_steps=run.attack.num_steps,
            stage=stage.name,
            images=stage.images,
            seconds=stage.seconds,
            images_per_s=stage.images / stage.seconds,
            peak_mib=stage.peak,
        )
        for stage in found
    ]


def resumed_row(facts: machine.Facts, keys: dict[str, Any], processes: int, found: KilledRun) -> ResumedRow:
    """The row of a run that was killed."""
    return ResumedRow(
        **facts,
        model=keys["model"],
        processes=processes,
        steps=found.steps,
        killed_after=found.killed_after,
        same_bits=found.is_same,
        run_s=found.seconds,
    )


def table(rows: Sequence[ImagenetRow]) -> Table:
    """Table of the stages."""
    first = rows[0]
    title = (
        f"AT-{first.attack_steps}, {first.image_size} pixels, global batch of {first.batch_size}, "
        f"{first.processes} processes, {first.processor}"
    )
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading in ("model", "stage"):
        result.add_column(heading)
    for heading in ("images", "seconds", "images/s", "peak MiB"):
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(
            row.model, row.stage, f"{row.images:,}", f"{row.seconds:.2f}", f"{row.images_per_s:,.1f}",
            f"{row.peak_mib:,.0f}",
        )  # fmt: skip
    return result


def sentence(row: ResumedRow) -> str:
    """The end of the run that was killed, in words."""
    if not row.killed_after:
        return f"{row.model}: NOT SHOWN: the run of {row.steps} steps ended before it could be killed"
    found = "equal to the bit to" if row.same_bits else "DIFFERENT from"
    return f"{row.model}: killed after step {row.killed_after} of {row.steps}, resumed, {found} the other run"


if __name__ == "__main__":
    main()
