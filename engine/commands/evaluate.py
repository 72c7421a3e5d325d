"""`engine eval`: attacks on the networks of checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from engine.commands.completion import DIR, FILE, list_of, named, one_of
from engine.commands.options import COUNT, SEED, Processes, import_option, process_options
from engine.common.files import checkpoint_of


@click.command("eval")
@click.argument("checkpoints", nargs=-1, required=True, type=FILE, metavar="CHECKPOINT...")
@click.option(
    "--attacks",
    type=list_of("attack"),
    default="natural,fgsm,pgd20,cw",
    show_default=True,
    help="Of those that `engine attacks` lists, e.g. pgd50, aa, transfer:CKPT.",
)
@click.option(
    "--limit",
    type=COUNT,
    help="Evaluate on that many test images, balanced over classes.",
)
@click.option("--limit-aa", type=COUNT, help="The same for AutoAttack, which is slow. [all]")
@click.option("--dataset", type=named("dataset"), help="Data set. [the one it was trained on]")
@click.option("--data", type=FILE, help="Where the data set lies. [where it was in training]")
@click.option(
    "--model",
    type=named("model"),
    help="Architecture, where the checkpoint does not tell.",
)
@click.option(
    "--weights",
    help="Which of a file's state dicts, e.g. state_dict_ema. [the usual one]",
)
@click.option(
    "--normalize",
    type=named("normalisation"),
    help="What its loader normalised by: cifar10, imagenet, ... [as the file tells]",
)
@click.option("--normalize-mean", metavar="R,G,B", help="The mean itself, of images in [0, 1].")
@click.option("--normalize-std", metavar="R,G,B", help="The standard deviation itself.")
@click.option("--epsilon", help="Radius of the attacks, e.g. 8/255. [as in training, else 8/255]")
@click.option(
    "--threat-model",
    type=one_of("Linf", "L2"),
    help="Linf or L2. [as in training, else Linf]",
)
@click.option(
    "--batch-size",
    type=COUNT,
    default=250,
    show_default=True,
    help="Images per forward.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the attacks.")
@click.option(
    "--device",
    type=named("device"),
    default="auto",
    show_default=True,
    help="auto, cpu, cuda or cuda:N.",
)
@click.option(
    "--image-size",
    type=COUNT,
    help="Cut views of that size from images of any size. [as in training]",
)
@click.option(
    "--on-bad-image",
    type=one_of("fail", "skip"),
    help="fail, or skip images that cannot be read. [as in training]",
)
@click.option(
    "--out",
    type=DIR,
    metavar="DIR",
    help="Where the JSON of the results goes. [beside each checkpoint]",
)
@import_option
@process_options
def evaluate(
    checkpoints: tuple[str, ...],
    attacks: str,
    out: str | None,
    processes: Processes,
    **options: Any,
) -> None:
    """Attack checkpoints (files, or run directories for their best) on the test images.

    Any teacher or student counts, of this project or from elsewhere. Stopped and called again in the same way, it
    goes on where it was.
    """
    from engine.commands.tables import print_accuracies
    from engine.common.console import ConsoleReporter, Reporter
    from engine.config import load
    from engine.evaluation import evaluate_checkpoint, reports
    from engine.models import normalize
    from engine.system import distributed, launcher

    names = [name.strip() for name in attacks.split(",") if name.strip()]
    if not names:
        raise ValueError("--attacks: name at least one attack, e.g. natural,fgsm,pgd20")
    given = (options.pop(f"normalize{part}") for part in ("", "_mean", "_std"))
    options["normalize"] = normalize.from_text(*given)
    wanted = evaluate_checkpoint.EvaluationConfig(names, **options)
    config = load({"device": options["device"]})
    if not distributed.is_launched() and (count := processes.count(config.device)):
        sys.exit(launcher.launch(count, launcher.command(*sys.argv[1:]), None))

    folder = None if out is None else Path(out)
    paths = {path: reports.path_of(path, folder) for path in map(checkpoint_of, checkpoints)}
    found = {}
    with distributed.joined(config, processes.timeout) as world:
        reporter = ConsoleReporter() if world.is_main else Reporter()
        for path, report_path in paths.items():
            report = evaluate_checkpoint.run(path, wanted, reporter, out=report_path, world=world)
            found[f"{report.title}  {path}"] = report.results
    if isinstance(reporter, ConsoleReporter):
        print_accuracies(reporter, found)
        for report_path in paths.values():
            reporter.message(f"Written: {report_path}")
