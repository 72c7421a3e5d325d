"""The command line. Imports torch only in the commands that compute, so that --help is instant."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import click
from rich import box
from rich.table import Table
from rich.text import Text

from engine import __version__
from engine.common import errors, standard_streams
from engine.common.stopping import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    Interrupted,
    RunFailed,
    heed_signals,
    ignore_signals,
)

if TYPE_CHECKING:
    from engine.common.console import ConsoleReporter
    from engine.config import RunConfig
    from engine.runs.trainer import RunResult


def main() -> NoReturn:
    """Run the command line: exit code 0, 1 (the run failed), 2 (user error) or 130 (interrupted)."""
    with standard_streams.kept(), errors.told_of_threads(_say):
        code = _run()
        ignore_signals()
    sys.exit(code)


def _run() -> int:
    try:
        heed_signals()
        if commands.main(standalone_mode=False) is not None:  # --help, --version
            standard_streams.check_shown()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else EXIT_FAILED
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else error.format_message())
        return EXIT_USER_ERROR
    except click.ClickException as error:
        _say(error.format_message())
        return EXIT_USER_ERROR
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:
        told = errors.told(error)
        _say(str(told))
        return next(code for kind, code in _CODES.items() if isinstance(told, kind))
    return 0


_CODES = {ValueError: EXIT_USER_ERROR, RunFailed: EXIT_FAILED, Interrupted: EXIT_INTERRUPTED}


def _say(message: str) -> None:
    if message:  # else another process of the run has said it
        click.echo(f"engine: {errors.printable(message)}", err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="engine %(version)s")
def commands() -> None:
    """Train image classifiers that withstand adversarial images, by adversarial distillation.

    A first run, on any machine: engine train --method at --dataset digits --model resnet8 --epochs 3
    """


# Flag -> key of the configuration, where the two differ.
_KEYS = {
    "teacher": "teacher.checkpoint",
    "teacher_st": "teacher_st.checkpoint",
    "attack_bn": "attack.bn",
    "optimizer": "optim.implementation",
}


_COUNT, _SEED = click.IntRange(1, 2**31 - 1), click.IntRange(0, 2**63 - 1)


def _config_flags(command: Callable[..., None]) -> Callable[..., None]:
    flags = [
        click.option("--method", help="st, at, trades, ard, akd2, iad1, iad2, ... [iad1]"),
        click.option("--model", help="Architecture of the student. [resnet18]"),
        click.option("--dataset", help="digits, cifar10, cifar100, svhn, tiny-imagenet or folder. [cifar10]"),
        click.option("--data", help="Where the data set lies. [$ENGINE_DATA, ./data, the user cache]"),
        click.option("--init", metavar="FILE", help="Checkpoint of the student's first weights. [drawn]"),
        click.option("--teacher", metavar="FILE", help="Robust teacher's checkpoint. [cached, else trained]"),
        click.option("--teacher-st", metavar="FILE", help="Standard teacher's checkpoint. [cached, else trained]"),
        click.option("--epochs", type=int, help="Length; warm-up and milestones scale with it. [200]"),
        click.option("--batch-size", type=int, help="Images per step, of all processes together. [128]"),
        click.option("--micro-batch", metavar="N", help="Images at a time in each process, or auto. [all]"),
        click.option("--lr", help="Initial learning rate. [0.1]"),
        click.option("--lr-scale", help="none, or linear: lr times batch size / 128. [none]"),
        click.option("--sync-bn", help="BatchNorm over all processes' images: on or off. [off]"),
        click.option("--amp/--no-amp", default=None, help="Mixed precision. [no]"),
        click.option("--compile", help="torch.compile for the network passes: auto, on or off. [auto]"),
        click.option("--lanes", help="Teachers and next batch on CUDA streams of their own: on or off. [on]"),
        click.option("--graphs", help="The attack as a CUDA graph: on or off. [on]"),
        click.option("--optimizer", help="torch, or apex for NVIDIA apex's FusedSGD. [torch]"),
        click.option("--checkpoint-activations", is_flag=True, default=None, help="Less memory, more time."),
        click.option("--masking-guard", help="If AMP hides gradients: warn, stop or off. [warn]"),
        click.option("--device", help="auto, cpu, cuda or cuda:N. [auto]"),
        click.option("--seed", type=int, help="Seed of weights, order, augmentation and attacks. [0]"),
        click.option("--out", metavar="DIR", help="Run directory. [runs/METHOD-DATASET-MODEL-TIME]"),
        click.option("--semantics", help="paper, or official: as the published code. [paper]"),
        click.option("--limit-train", type=int, help="Train on that many images, balanced over classes."),
        click.option("--limit-test", type=int, help="Test on that many images, balanced over classes."),
        click.option("--attack-bn", help="BatchNorm in the training attack: train, eval or batch."),
        click.option("--pipeline", help="auto, tensor, ffcv or dali. [auto]"),
        click.option("--image-size", type=int, help="Cut views of that size from images of any size (folder)."),
        click.option("--on-bad-image", help="fail, or skip images that cannot be read. [fail]"),
        click.option("--workers", type=int, help="Threads that load images. [all processors]"),
    ]
    for flag in reversed(flags):
        command = flag(command)
    return command


def _checked_timeout(context: click.Context, parameter: click.Parameter, seconds: float) -> float:
    from engine.system.distributed import check_timeout

    check_timeout(seconds)
    return seconds


def _process_flags(command: Callable[..., None]) -> Callable[..., None]:
    flags = [
        click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="Use N GPUs. [one if there is any]"),
        click.option("--procs", type=click.IntRange(min=1), metavar="N", help="Use N processes on the CPU."),
        click.option(
            "--timeout",
            type=float,
            callback=_checked_timeout,
            default=600,
            show_default=True,
            help="Seconds after which a process that does not answer the others is lost.",
        ),
    ]
    for flag in reversed(flags):
        command = flag(command)
    return command


@commands.command()
@_config_flags
@_process_flags
@click.option("--seeds", "seed_list", metavar="LIST", help="A run for each, e.g. 0..7 or 0,3,5: N at a time.")
@click.option("--config", "config_file", metavar="FILE", help="YAML file of keys, or recipe:NAME.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any key, e.g. attack.num_steps=7.")
@click.option("--resume", metavar="DIR", help="Continue that run; auto: the one of these settings, if it began.")
@click.option("--profile", type=click.IntRange(min=0), default=0, metavar="N", help="Trace N steps. [none]")
def train(
    seed_list: str | None,
    config_file: str | None,
    assignments: tuple[str, ...],
    resume: str | None,
    profile: int,
    gpus: int | None,
    procs: int | None,
    timeout: float,
    **flags: Any,
) -> None:
    """Train a student, and its teachers where none are given.

    \b
    engine train --method iad1 --amp                 CIFAR-10, ResNet-18, the paper's hyper-parameters
    engine train --config recipe:table2-cifar10-at-iad1
    engine train --resume runs/...                   after Ctrl-C, SIGTERM or a crash
    engine train --method iad1 --amp --gpus 8        on the GPUs of this machine
    engine train --method iad1 --amp --gpus 8 --seeds 0..7   a run on each GPU, side by side
    """  # noqa: D301  # click knows the backspace as a mark, and only as a character
    given = {key: value for key, value in flags.items() if value is not None}
    begins = resume in (None, "auto")
    for flag, value in (("--config", config_file), ("--out", given.get("out"))):
        if value is not None and not begins:
            raise ValueError(f"--resume DIR continues the run in DIR as it was configured; drop {flag}")
    if seed_list is not None:
        _check_seeds(given, assignments, begins=begins)

    from engine import config
    from engine.commands import seeds
    from engine.common import host_memory
    from engine.common.console import ConsoleReporter, Reporter
    from engine.runs import resuming, run_directory, trainer
    from engine.system import distributed, launcher

    launched = distributed.is_launched()
    wanted = None if seed_list is None else seeds.parse(seed_list)
    trees = [config.nested(_KEYS.get(key, key), value) for key, value in given.items()]
    trees += [config.parse_assignment(text) for text in assignments]
    changes = config.merge(*trees)
    if begins:
        complete = config.load(_read_config(config_file), changes)
        if config_file is None and complete.limit_train is None and not launched:
            _name_recipe(complete, ConsoleReporter())
    else:
        run, begun = run_directory.RunDir.existing(Path(str(resume)))
        complete = resuming.carried_on(begun, resuming.changed(begun, changes))
    again = resume == "auto" or distributed.is_restarted()
    if wanted is not None:
        if launched:
            raise ValueError("--seeds starts processes of its own, and none under torchrun; use --gpus or --procs")
        at_once = min(launcher.count(gpus, procs, complete.device) or 1, len(wanted))
        places = seeds.slots(at_once, gpus=gpus is not None)
        seeds.train(complete, wanted, places, ConsoleReporter(), again=again, profile=profile)
        return

    processes = 0 if launched else launcher.count(gpus, procs, complete.device)
    if processes:
        found = (
            run_directory.Begun(run, changes)
            if not begins
            else trainer.begin(complete, again=again, processes=processes, say=ConsoleReporter().message)
        )
        arguments = ["train", "--resume", str(found.run.path), *config.assignments(found.changes)]
        arguments += ["--timeout", str(timeout), "--profile", str(profile)]
        code = launcher.launch(processes, launcher.command(*arguments), found.run.path / "logs")
        if code != EXIT_INTERRUPTED:
            found.take_back()
        sys.exit(code)

    host_memory.keep_freed()
    with distributed.joined(complete, timeout) as world:
        reporter = ConsoleReporter(share_of_peak=profile > 0) if world.is_main else Reporter()
        if begins:
            result = trainer.train(complete, reporter, profile=profile, world=world, again=again)
        else:
            result = trainer.resume(Path(str(resume)), reporter, profile=profile, world=world, **changes)
    if isinstance(reporter, ConsoleReporter):
        _print_summary(reporter, result)


def _check_seeds(given: dict[str, Any], assignments: tuple[str, ...], *, begins: bool) -> None:
    """Refuse what contradicts --seeds."""
    if not begins:
        raise ValueError("--resume DIR and --seeds exclude each other: --resume auto continues all of them")
    if "seed" in given:
        raise ValueError("--seed and --seeds exclude each other")
    if any(text.partition("=")[0].strip() == "seed" for text in assignments):
        raise ValueError("--set seed and --seeds exclude each other")


def _name_recipe(complete: RunConfig, reporter: ConsoleReporter) -> None:
    """Tell of the row of the paper's Tables 2-4 that a run resembles: its settings may not be the defaults."""
    from engine import recipes
    from engine.config import load

    for recipe in recipes.all_recipes():
        if recipe.table in (2, 3, 4):
            row = load(recipe.config)
            if all(getattr(row, key) == getattr(complete, key) for key in ("method", "dataset", "model")) and (
                row.teacher.method == complete.teacher.method
            ):
                reporter.message(f"The paper's own settings of this row: --config recipe:{recipe.name}")
                return


def _read_config(name: str | None) -> dict[str, Any]:
    from engine.config import merge, read_file

    if name is None:
        return {}
    if name.startswith("recipe:"):
        from engine import recipes

        recipe = recipes.get(name.removeprefix("recipe:"))
        # Measure what the row prints; AutoAttack takes hours and is left to `engine eval`.
        return merge({"eval": {"final": [attack for attack in recipe.paper if attack != "aa"]}}, recipe.config)
    return read_file(Path(name))


@commands.command("eval")
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...")
@click.option("--attacks", default="natural,fgsm,pgd20,cw", show_default=True, help="Of natural, fgsm, ..., aa.")
@click.option("--limit", type=_COUNT, help="Evaluate on that many test images, balanced over classes.")
@click.option("--limit-aa", type=_COUNT, help="The same for AutoAttack, which is slow. [all]")
@click.option("--dataset", help="Data set. [the one it was trained on]")
@click.option("--data", help="Where the data set lies. [where it was in training]")
@click.option("--model", help="Architecture, where the checkpoint does not tell.")
@click.option("--weights", help="Which of a file's state dicts, e.g. state_dict_ema. [the usual one]")
@click.option("--normalize", help="What its loader normalised by: cifar10, imagenet, ... [as the file tells]")
@click.option("--normalize-mean", metavar="R,G,B", help="The mean itself, of images in [0, 1].")
@click.option("--normalize-std", metavar="R,G,B", help="The standard deviation itself.")
@click.option("--epsilon", help="Radius of the attacks, e.g. 8/255. [as in training, else 8/255]")
@click.option("--threat-model", help="Linf or L2. [as in training, else Linf]")
@click.option("--batch-size", type=_COUNT, default=250, show_default=True, help="Images per forward.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Seed of the attacks.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--image-size", type=_COUNT, help="Cut views of that size from images of any size. [as in training]")
@click.option("--on-bad-image", help="fail, or skip images that cannot be read. [as in training]")
@click.option("--out", metavar="DIR", help="Where the JSON of the results goes. [beside each checkpoint]")
@_process_flags
def evaluate_command(
    checkpoints: tuple[str, ...],
    attacks: str,
    out: str | None,
    gpus: int | None,
    procs: int | None,
    timeout: float,
    **flags: Any,
) -> None:
    """Attack checkpoints (files, or run directories for their best) on the test images.

    Any teacher or student counts, of this project or from elsewhere. Stopped and called again in the same way, it
    goes on where it was.
    """
    from engine import config
    from engine.common.console import ConsoleReporter, Reporter
    from engine.evaluation import checkpoint
    from engine.evaluation import reports as results
    from engine.models import normalize
    from engine.system import distributed, launcher

    names = [name.strip() for name in attacks.split(",") if name.strip()]
    if not names:
        raise ValueError("--attacks: name at least one attack, e.g. natural,fgsm,pgd20")
    told = (flags.pop(f"normalize{part}") for part in ("", "_mean", "_std"))
    flags["normalize"] = normalize.from_text(*told)
    complete = config.load({"device": flags["device"]})
    if not distributed.is_launched() and (processes := launcher.count(gpus, procs, flags["device"])):
        sys.exit(launcher.launch(processes, launcher.command(*sys.argv[1:]), None))

    folder = None if out is None else Path(out)
    paths = {path: results.path_of(path, folder) for path in map(_checkpoint, checkpoints)}
    found = {}
    with distributed.joined(complete, timeout) as world:
        reporter = ConsoleReporter() if world.is_main else Reporter()
        for path, report_path in paths.items():
            report = checkpoint.run(path, names, reporter, out=report_path, world=world, **flags)
            found[f"{report.title}  {path}"] = report.results
    if isinstance(reporter, ConsoleReporter):
        _print_accuracies(reporter, found)
        for report_path in paths.values():
            reporter.message(f"Written: {report_path}")


def _checkpoint(name: str) -> Path:
    """A file, or the best checkpoint of a run directory. Raises ValueError where that cannot be looked up."""
    try:
        return Path(name) / "best.pt" if Path(name).is_dir() else Path(name)
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None


@commands.group()
def data() -> None:
    """Write data sets as .beton files, which FFCV loads, and look into them."""


@data.command("write")
@click.option("--dataset", required=True, help="digits, cifar10, cifar100, svhn, tiny-imagenet or folder.")
@click.option("--data", "place", help="Where the data set lies. [$ENGINE_DATA, ./data, the user cache]")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The file, X.beton.")
@click.option("--format", "mode", default="raw", show_default=True, help="raw pixels (fast, large), or jpeg.")
@click.option(
    "--quality", type=click.IntRange(1, 100), help="Of JPEG, 1 to 100. [JPEG files as they are, others 90]"
)
@click.option("--max-resolution", type=_COUNT, help="Shrink images whose longer side exceeds it.")
@click.option("--limit-train", type=_COUNT, help="Write that many training images, balanced over classes.")
@click.option("--limit-test", type=_COUNT, help="Write that many test images, balanced over classes.")
@click.option("--on-bad-image", default="fail", show_default=True, help="fail, or skip what cannot be read.")
@click.option("--force", is_flag=True, help="Replace a file that exists.")
def write_data(
    dataset: str,
    place: str | None,
    out: Path,
    mode: str,
    quality: int | None,
    max_resolution: int | None,
    **options: Any,
) -> None:
    """Write both splits of a data set into one .beton file, for `engine train --data FILE`."""
    from engine.commands import data
    from engine.common.console import ConsoleReporter
    from engine.pipelines.beton_writer import Format

    data.write(dataset, place, out, Format(mode, quality, max_resolution), ConsoleReporter(), **options)


@data.command("info")
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE")
def describe_data(path: Path) -> None:
    """Tell fields, counts, sizes and classes of a .beton file."""
    from engine.commands import data
    from engine.common.console import ConsoleReporter

    found = data.info(path)
    reporter = ConsoleReporter()
    for line in found.lines:
        reporter.message(line)
    table = Table("class", "label", *found.parts, box=box.SIMPLE)
    for name, label, counts in found.classes:
        table.add_row(name, str(label), *(f"{count:,}" for count in counts))
    reporter.table(table)
    standard_streams.check_shown()


@commands.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN_OR_BENCH...")
@click.option("--out", default="report.html", show_default=True, type=click.Path(path_type=Path), metavar="FILE")
def report(paths: tuple[Path, ...], out: Path) -> None:
    """Put run directories and folders of benchmark results into one HTML file, with tables and pictures."""
    from engine.common.console import ConsoleReporter
    from engine.runs import report

    report.write(paths, out)
    ConsoleReporter().message(f"Written: {out}")


@commands.command()
def doctor() -> None:
    """Tell what this machine offers, what is missing, and how to get it."""
    from engine.commands import doctor
    from engine.common.console import ConsoleReporter

    reporter = ConsoleReporter()
    for one in doctor.examine():
        reporter.message(f"{'yes' if one.is_there else 'no':4} {one.name:20} {one.detail}")
        if one.how:
            reporter.message(f"{'':25} to get it: {one.how}")
    standard_streams.check_shown()


@commands.command("methods")
def list_methods() -> None:
    """List the methods."""
    from engine import methods

    _print_list(("method", "what it is"), [(name, row.summary) for name, row in methods.TABLE.items()])


@commands.command("models")
def list_models() -> None:
    """List the architectures."""
    from engine import models

    rows = [
        (name, entry.summary, ", ".join(f"{size}x{size}" for size in entry.input_sizes))
        for name, entry in models.TABLE.items()
    ]
    _print_list(("model", "what it is", "images"), rows)


@commands.command("datasets")
def list_datasets() -> None:
    """List the data sets."""
    from engine.pipelines.datasets import DATASETS

    rows = [
        (name, entry.summary, str(entry.num_classes or "yours"), str(entry.image_size or "yours"), entry.origin)
        for name, entry in DATASETS.items()
    ]
    _print_list(("dataset", "what it is", "classes", "pixels", "from"), rows)


@commands.command("recipes")
def list_recipes() -> None:
    """List the rows of the paper's tables that `engine train --config recipe:NAME` runs.

    The numbers are the paper's, in percent.
    """
    from engine import recipes

    rows = [
        (recipe.name, recipe.row, *(_percent(dict(recipe.paper), name) for name in get_args(recipes.Measure)))
        for recipe in recipes.all_recipes()
    ]
    _print_list(("recipe", "row", "natural", "FGSM", "PGD-20", "CW-inf", "AA"), rows)


def _percent(numbers: dict[Any, float], name: str) -> str:
    return f"{numbers[name]:.2f}" if name in numbers else ""


def _print_list(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from engine.common.console import ConsoleReporter

    table = Table(*columns, box=box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    ConsoleReporter().table(table)
    standard_streams.check_shown()


def _print_accuracies(reporter: ConsoleReporter, results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """A table of named results by attack, with the number of images, and each attack with all its numbers."""
    from engine.evaluation.measure import COLUMNS

    # Not every network needs the attacks that were added where gradients were masked.
    any_of = {name: result for found in results.values() for name, result in found.items()}
    table = Table("", *(f"{COLUMNS[name]}\nn = {any_of[name]['n']:,}" for name in any_of), box=box.SIMPLE)
    for title, found in results.items():
        cells = (_accuracy(found[name]) if name in found else "" for name in any_of)
        table.add_row(Text(title), *cells)  # a path is no markup
    reporter.table(table)
    for name, result in any_of.items():
        reporter.message(f"{COLUMNS[name]}: {result['description']}")
    if any(result.get("warnings") for found in results.values() for result in found.values()):
        reporter.message("* may be too high: see the warnings")


def _accuracy(result: dict[str, Any]) -> str:
    return f"{result['accuracy']:.2%}{'*' * bool(result.get('warnings'))}"


def _print_summary(reporter: ConsoleReporter, result: RunResult) -> None:
    summary = result.summary
    if "test_of_best" in summary:
        best = f"best (epoch {summary['best']['epoch']}, selected on {summary['selected_on']})"
        last = f"last (epoch {summary['last']['epoch']})"
        reporter.message("Accuracy on test images:")
        _print_accuracies(reporter, {best: summary["test_of_best"], last: summary["test_of_last"]})
    reporter.message("Written:")
    for path in sorted(result.path.iterdir()):
        reporter.message(f"  {path}")


if __name__ == "__main__":
    main()
