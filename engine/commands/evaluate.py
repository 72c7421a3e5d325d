"""`engine eval`: attacks on the networks of checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.commands.completion import DIR, FILE, list_of, named, one_of
from engine.commands.options import (
    COUNT,
    SEED,
    Processes,
    batch_size_option,
    continued_by_itself,
    device_option,
    import_option,
    normalisation_of,
    normalisation_options,
    process_options,
    threat_model_option,
    weights_option,
)
from engine.common.files import checkpoints_of, seeds_in

if TYPE_CHECKING:
    from engine.common.console import ConsoleReporter
    from engine.evaluation.evaluate_checkpoint import Report


@click.command("eval")
@click.argument("checkpoints", nargs=-1, required=True, type=FILE, metavar="CHECKPOINT...")
@click.option(
    "--attacks",
    type=list_of("attack"),
    help="Of those that `engine attacks` lists, e.g. pgd50, aa, transfer:CKPT. [natural,fgsm,pgd20,cw; of an "
    "exported file natural,square, and pgd20 transferred from its original]",
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
@weights_option
@normalisation_options
@click.option(
    "--epsilon",
    help="Radius of the attacks, e.g. 8/255, or several: 2/255,4/255,8/255. [as in training, else 8/255]",
)
@threat_model_option
@batch_size_option
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the attacks.")
@device_option
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
@click.option(
    "--save-adversarial",
    type=FILE,
    metavar="FILE",
    help="Write the images that aa or one of its parts has broken, as safetensors; see `engine verify`.",
)
@click.option(
    "--pictures",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Draw N attacked images of each attack, and the classes; beside the report. [none]",
)
@click.option(
    "--robustbench-json",
    type=FILE,
    metavar="FILE",
    help="Write the entry of RobustBench's leaderboard, of natural and aa on all test images.",
)
@click.option(
    "--robustbench-info",
    multiple=True,
    metavar="KEY=VALUE",
    help="What is not measured: link, name, authors, venue, reported, ...; repeatable.",
)
@import_option
@process_options
def evaluate(
    checkpoints: tuple[str, ...],
    attacks: str | None,
    out: str | None,
    robustbench_json: str | None,
    robustbench_info: tuple[str, ...],
    processes: Processes,
    **options: Any,
) -> None:
    """Attack checkpoints (files, run directories for their best, groups of seeds) or exported files.

    Any teacher or student counts, of this project or from elsewhere. Stopped and called again in the same way, it
    goes on where it was.
    """
    from engine.commands.tables import print_by_radius
    from engine.common.console import ConsoleReporter, Reporter
    from engine.config import load
    from engine.evaluation import evaluate_checkpoint, reports, robustbench
    from engine.evaluation.files import epsilons
    from engine.system import distributed, launcher

    names = [name.strip() for name in (attacks or "").split(",") if name.strip()]
    if not names and attacks is not None:
        raise ValueError("--attacks: name at least one attack, e.g. natural,fgsm,pgd20")
    files = {name: checkpoints_of(name) for name in checkpoints}
    groups = {name: of_seeds for name, of_seeds in files.items() if seeds_in(Path(name))}
    every = [path for name in checkpoints for path in files[name]]
    paths = {path: reports.path_of(path, None if out is None else Path(out)) for path in every}
    options["normalize"] = normalisation_of(options)
    entry = robustbench.asked(robustbench_json, robustbench_info, [*map(str, every)], options["limit_aa"])
    radii = epsilons.asked(options["epsilon"])
    _check_together(every, radii, options["save_adversarial"], robustbench_json)
    wanted = evaluate_checkpoint.EvaluationConfig(names, **options, for_robustbench=entry is not None)
    config = load({"device": options["device"]})
    if not distributed.is_launched() and (count := processes.count(config.device)):
        sys.exit(launcher.launch(count, launcher.command(*sys.argv[1:]), None))

    found, curves = {}, {}
    with distributed.joined(config, processes.timeout) as world, continued_by_itself("what was measured is kept"):
        reporter = ConsoleReporter() if world.is_main else Reporter()
        for path, report_path in paths.items():
            if attacks is None:
                wanted = replace(wanted, attacks=evaluate_checkpoint.usual_attacks(path))
            if radii:
                curves[path] = epsilons.evaluated(path, wanted, radii, reporter, out=report_path, world=world)
                continue
            found[path] = report = evaluate_checkpoint.run(path, wanted, reporter, out=report_path, world=world)
    if isinstance(reporter, ConsoleReporter):
        for path, each in curves.items():
            print_by_radius(reporter, f"{each.title}  {path}", each.results())
        _print(reporter, found, groups)
        for report_path in paths.values():
            reporter.message(f"Written: {report_path}")
            if radii:
                reporter.message(f"Written: {epsilons.picture_of(report_path)}")
        if entry is not None and report.benchmark is not None:
            for line in entry.write(reports.read(report_path), report.sha256, report.benchmark):
                reporter.message(line)


def _print(reporter: ConsoleReporter, found: Mapping[Path, Report], groups: Mapping[str, Sequence[Path]]) -> None:
    """Print the accuracies of all networks, and of each group of seeds the means."""
    from engine.commands.tables import print_accuracies

    if not found:
        return
    print_accuracies(reporter, {f"{each.title}  {path}": each.results for path, each in found.items()})
    for name, of_seeds in groups.items():
        reporter.message(_means(name, [found[path].results for path in of_seeds]))


def _means(group: str, results: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """Mean accuracies of a group, in a line; an attack that not all networks needed has none."""
    from engine.attacks.table import title
    from engine.runs.seeds import mean_and_deviation

    means = (
        f"{title(attack, first)} {mean_and_deviation([each[attack]['accuracy'] for each in results])}"
        for attack, first in results[0].items()
        if all(attack in each for each in results)
    )
    return f"{group}: mean +- standard deviation of {len(results)} seeds: {', '.join(means)}"


def _check_together(
    checkpoints: Sequence[Path],
    radii: Sequence[object],
    save_adversarial: str | None,
    robustbench_json: str | None,
) -> None:
    """Raise ValueError where options do not fit together."""
    if save_adversarial is not None and len(checkpoints) > 1:
        raise ValueError(f"--save-adversarial: one checkpoint is expected, got {len(checkpoints)}")
    if radii and (save_adversarial is not None or robustbench_json is not None):
        raise ValueError("--epsilon: one radius is expected with --save-adversarial and with --robustbench-json")
