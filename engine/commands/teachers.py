"""`engine teachers`: candidate teachers, ranked before hours of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.commands.completion import DIR, FILE, named, one_of
from engine.commands.options import (
    COUNT,
    SEED,
    batch_size_option,
    continued_by_itself,
    device_option,
    import_option,
    weights_option,
)
from engine.common.files import checkpoint_of
from engine.common.numbers import percent

if TYPE_CHECKING:
    from engine.common.console import ConsoleReporter

TABLES = (
    ("Accuracies", ("reliability", "natural", "transfer", "robust", "effective", "parameters")),
    ("The four cases on x and x~", ("both_right", "only_natural_right", "both_wrong", "only_adversarial_right")),
    ("Trust: alpha on x~", ("alpha", "alpha_q25", "alpha_median", "alpha_q75", "alpha_low")),
    ("Calibration", ("ece_natural", "ece_transfer", "nll_natural", "nll_transfer")),
)
"""Titles of the tables, and their columns."""


@click.command("teachers")
@click.argument("candidates", nargs=-1, required=True, type=FILE, metavar="CANDIDATE...")
@click.option("--dataset", type=named("dataset"), help="Data set. [the one they were trained on]")
@click.option("--data", type=FILE, help="Where the data set lies. [as for a training]")
@click.option(
    "--split",
    type=one_of("test", "train"),
    default="test",
    show_default=True,
    help="test: images that no candidate was trained on; train: those that a student would ask about.",
)
@click.option(
    "--limit", type=COUNT, default=1000, show_default=True, help="So many images, balanced over classes."
)
@click.option("--student", type=FILE, help="Checkpoint of the student that is attacked. [one is trained]")
@click.option(
    "--model",
    type=named("model"),
    default="resnet8",
    show_default=True,
    help="Architecture of the student that is trained.",
)
@click.option("--student-epochs", type=COUNT, default=10, show_default=True, help="Length of its training, by AT.")
@click.option("--student-images", type=COUNT, default=2000, show_default=True, help="Training images for it.")
@weights_option
@click.option(
    "--normalize",
    type=named("normalisation"),
    help="What the loader of candidates from elsewhere normalised by: cifar10, imagenet, ...",
)
@click.option("--epsilon", help="Radius of the attacks, e.g. 8/255. [as in their training, else 8/255]")
@click.option("--threat-model", type=one_of("Linf", "L2"), help="Linf or L2. [as in their training, else Linf]")
@click.option("--beta", type=float, default=0.1, show_default=True, help="Exponent of alpha (Eq. 4).")
@click.option(
    "--sort-by",
    default="reliability",
    show_default=True,
    metavar="COLUMN",
    help=f"Order of the candidates: {', '.join(name for _, names in TABLES for name in names)}.",
)
@batch_size_option
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the student and of the attacks.")
@click.option("--image-size", type=COUNT, help="Cut views of that size from images of any size.")
@device_option
@click.option("--out", type=DIR, metavar="DIR", help="New folder for teachers.json and teachers.png. [none]")
@import_option
def rank_teachers(candidates: tuple[str, ...], student: str | None, out: str | None, **options: Any) -> None:
    """Rank checkpoints (files, or run directories for their best) as teachers, in minutes on a CPU.

    All are measured on the same images, and on these attacked on a small student: how often each is right, how
    sure it is, and how far it would be trusted.
    """
    from engine.common.console import ConsoleReporter
    from engine.runs import compare_teachers

    at = None if student is None else checkpoint_of(student)
    config = compare_teachers.TeachersConfig(student=at, **options)
    folder, reporter = None if out is None else Path(out), ConsoleReporter()
    with continued_by_itself("nothing was written", "to begin again"):
        report = compare_teachers.run([checkpoint_of(name) for name in candidates], config, reporter, folder)
    print_comparison(reporter, report)
    for name in compare_teachers.REPORT_FILES if folder is not None else ():
        reporter.message(f"Written: {folder}/{name}")


def print_comparison(reporter: ConsoleReporter, report: Mapping[str, Any]) -> None:
    """Print the images, the tables with the definition of each column, and what cannot be told apart."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from engine.evaluation.candidates import MEASURES

    for line in _about_images(report):
        reporter.message(line)
    for title, names in TABLES:
        heads = (MEASURES[name].title + " *" * (name == report["sort_by"]) for name in names)
        table = Table("", title, *heads, box=box.SIMPLE)
        for entry in report["candidates"]:
            cells = (_cell(MEASURES[name].style, entry["measures"][name]) for name in names)
            table.add_row(str(entry["rank"]), Text(f"{entry['label']}\n{entry['model']}"), *cells)
        reporter.table(table)
        for line in _definitions(report, names):
            reporter.message(line)
    reporter.message("")
    for entry in report["candidates"]:
        reporter.message(f"{entry['rank']}: {entry['path']}")
    for line in _ties(report):
        reporter.message(line)


def _cell(style: str, estimate: Mapping[str, Any]) -> str:
    """The value, and below it its interval or what chance alone would give."""
    value, low, high, chance = (estimate[key] for key in ("value", "low", "high", "by_chance"))
    if value is None:
        return "none"
    below = "" if low is None else f"\n{style.format(low)} to {style.format(high)}"
    return style.format(value) + below + ("" if chance is None else f"\nchance {style.format(chance)}")


def _about_images(report: Mapping[str, Any]) -> Sequence[str]:
    data, student = report["data"], report["student"]
    return [
        f"x: {data['n']:,} {data['split']} images of {data['name']}, from {data['source']}",
        f"x~: x attacked on the student, x^: on the candidate itself: {report['attack']['description']}",
        f"Student S: {student['origin']}; S(x) right {percent(student['natural'])}, S(x~) right "
        f"{percent(student['adversarial'])}",
        f"Below a value: its 95 % interval; seed {report['seed']}; *: the order",
    ]


def _definitions(report: Mapping[str, Any], names: Sequence[str]) -> Sequence[str]:
    """A line for each definition of these columns, with those that share it."""
    lines: dict[str, list[str]] = {}
    for name in names:
        measure, n = report["measures"][name], report["candidates"][0]["measures"][name]["n"]
        better = "higher" if measure["higher_is_better"] else "lower"
        images = f", n = {n:,}" if n != report["data"]["n"] and name != "parameters" else ""
        line = f"{measure['definition']} ({better} is better{images})"
        lines.setdefault(line, []).append(measure["title"])
    return [f"  {', '.join(titles)}: {line}" for line, titles in lines.items()]


def _ties(report: Mapping[str, Any]) -> Sequence[str]:
    """A line for each candidate that cannot be told apart from one further down."""
    n, lines = report["data"]["n"], []
    for entry in report["candidates"]:
        pairs = [pair for pair in report["comparisons"] if pair["ranks"][0] == entry["rank"]]
        others = [f"{pair['ranks'][1]} (p = {pair['p_value']:.2g})" for pair in pairs if not pair["told_apart"]]
        if others:
            lines.append(
                f"Note: by {report['sort_by']}, {entry['rank']} cannot be told apart from {', '.join(others)} on "
                f"{n:,} images"
            )
    return lines
