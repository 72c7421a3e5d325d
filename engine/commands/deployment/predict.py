"""`engine predict`: the classes of image files, and which of these answers hold under an attack."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.commands.completion import DIR, FILE, named, one_of
from engine.commands.options import (
    COUNT,
    SEED,
    batch_size_option,
    device_option,
    import_option,
    normalisation_of,
    normalisation_options,
    threat_model_option,
    weights_option,
)

if TYPE_CHECKING:
    from engine.common.console import ConsoleReporter
    from engine.deployment.predicted_files import FileAnswer, PredictedFiles

_TABLE = "table"
_NO_CERTIFICATE = "An answer that holds is one that this attack did not change; it is no certificate."


@click.command()
@click.argument("checkpoint", type=FILE, metavar="CHECKPOINT")
@click.argument("images", nargs=-1, required=True, type=FILE, metavar="IMAGES...")
@click.option("--top", type=COUNT, default=1, show_default=True, help="Likeliest classes to tell of each image.")
@click.option(
    "--attack",
    type=named("attack"),
    help="Tell of each answer whether it holds under this attack, e.g. pgd20, aa-fast: see `engine attacks`.",
)
@click.option("--epsilon", help="Radius of the attack, e.g. 8/255. [as in training, else 8/255]")
@threat_model_option
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the attack.")
@click.option(
    "--save-adversarial",
    type=DIR,
    metavar="DIR",
    help="Write the attacked images whose answer changed, as PNG of 8 bits, into a new folder.",
)
@click.option(
    "--format",
    "form",
    type=one_of(_TABLE, "csv", "json"),
    help="table, csv or json. [as --out is named, else table]",
)
@click.option("--out", type=FILE, metavar="FILE", help="Write csv or json to a file.")
@click.option("--force", is_flag=True, help="Replace a file that exists.")
@click.option(
    "-0", "--null", is_flag=True, help="With IMAGES -: NUL characters stand between paths, not line ends."
)
@click.option(
    "--on-bad-image",
    type=one_of("fail", "skip"),
    default="fail",
    show_default=True,
    help="fail, or skip files that are no images and tell so.",
)
@click.option("--model", type=named("model"), help="Architecture, where the checkpoint does not tell.")
@weights_option
@normalisation_options
@click.option(
    "--dataset",
    type=named("dataset"),
    help="Data set that a checkpoint from elsewhere was trained on: its classes and its size of images.",
)
@click.option("--image-size", type=COUNT, help="Cut views of that size from images of any size. [as in training]")
@batch_size_option
@device_option
@import_option
def predict(
    checkpoint: str,
    images: tuple[str, ...],
    form: str | None,
    out: str | None,
    force: bool,
    null: bool,
    **options: Any,
) -> None:
    """Classify images with the network of a checkpoint (a file, or a run directory for its best).

    IMAGES are files, folders for all images below them, or - for a list of paths on standard input. Each image is
    cut and resized as evaluation does it. With --attack, the attack starts from the network's own answers.
    """
    from engine.common import standard_streams
    from engine.common.files import checkpoint_of
    from engine.deployment import predicted_files

    form = _form(form, out)
    if out is not None:
        _check(Path(out), force=force)
    saves = options.pop("save_adversarial")
    options["normalize"] = normalisation_of(options)
    config = predicted_files.PredictionConfig(**options, save_adversarial=None if saves is None else Path(saves))
    reporter = _reporter(aside=form != _TABLE and out is None)
    found = predicted_files.run(checkpoint_of(checkpoint), _places(images, null=null), config, reporter)
    if form == _TABLE:
        _show(reporter, found, config.top)
    for warning in found.warnings:
        reporter.message(f"Warning: {warning}")
    if saves is not None:
        _tell_saved(reporter, found.rows, saves)
    if form != _TABLE:
        text = _FORMS[form](found, config.top)
        if out is None:
            sys.stdout.write(text)
        else:
            _write(Path(out), text.encode("utf-8", "surrogateescape"), force=force)
            reporter.message(f"Written: {out}")
    standard_streams.check_stdout()


def _form(form: str | None, out: str | None) -> str:
    """Name of the format: as given, else as the file is named, else a table. Raises ValueError for others."""
    from engine.common.lookup import check_known

    if form is None:
        form = _TABLE if out is None else Path(out).suffix.lower().removeprefix(".")
        if form not in (_TABLE, *_FORMS) or (out is not None and form == _TABLE):
            raise ValueError(f"--out: {out} is named neither .csv nor .json; give --format csv or json")
    check_known("--format", form, (_TABLE, *_FORMS))
    if form == _TABLE and out is not None:
        raise ValueError("--format: a table is for the terminal; to --out goes csv or json")
    return form


def _check(out: Path, *, force: bool) -> None:
    """Raise ValueError, before anything is computed, where the file is there already or has no folder."""
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out: {out.absolute().parent} is no folder")
    if out.is_dir() or (not force and (out.exists() or out.is_symlink())):
        raise ValueError(f"--out: {out} exists; choose another name, or --force to replace it")


def _write(out: Path, content: bytes, *, force: bool) -> None:
    from engine.common.files import create, write_atomically
    from engine.common.stopping import RunFailed

    try:
        (write_atomically if force else create)(out, content)
    except FileExistsError:
        raise RunFailed(f"--out: {out} has come into being meanwhile, and nothing was written") from None


def _places(images: Sequence[str], *, null: bool) -> list[str]:
    """The paths that were given, with those on standard input in place of "-"."""
    from engine.deployment import image_files

    lists = images.count(image_files.STDIN)
    if lists > 1 or (null and not lists):
        raise ValueError(
            "IMAGES: one - is expected with --null, and more than one never; standard input is read once"
        )
    places: list[str] = []
    for image in images:
        if image == image_files.STDIN:
            if sys.stdin is None:
                raise ValueError("IMAGES: standard input is closed, and - is a list of paths there")
            places += image_files.paths_in(sys.stdin.buffer, null=null)
        else:
            places.append(image)
    return places


def _reporter(*, aside: bool) -> ConsoleReporter:
    """Reporter on standard output, or aside on standard error, where the answers go to standard output."""
    from engine.common.console import ConsoleReporter

    reporter = ConsoleReporter()
    reporter.console.stderr = aside
    return reporter


def _show(reporter: ConsoleReporter, found: PredictedFiles, top: int) -> None:
    """Print the answers as a table."""
    from rich import box
    from rich.table import Column, Table
    from rich.text import Text

    from engine.attacks.pgd import NORMS
    from engine.common.errors import printable

    attack = found.header.get("attack")
    heads = [
        "class",
        "probability",
        *(head for rank in range(2, _columns(found, top) + 1) for head in (f"{rank}.", "")),
    ]
    if attack:
        heads.append(f"{attack['title']}\nepsilon {NORMS[attack['threat_model']].length(attack['epsilon'])}")
    columns = [Column("file", overflow="fold"), *(Column(Text(head)) for head in heads)]
    table = Table(*columns, box=box.SIMPLE)
    for row in found.rows:
        cells = [printable(row.file)]
        if row.error is not None:
            cells.append("unreadable")
        for each in row.top:
            cells += [printable(each.name), f"{each.probability:.2%}"]
        if row.attacked is not None:
            doubt = "*" * bool(row.attacked.masked)
            cells.append(f"holds{doubt}" if row.attacked.holds else f"changed to {printable(row.attacked.name)}")
        table.add_row(*map(Text, cells))
    reporter.table(table)
    if attack:
        reporter.message(f"{attack['title']}: {attack['description']}. {_NO_CERTIFICATE}")
    if any(row.attacked is not None and row.attacked.masked for row in found.rows):
        reporter.message("* doubtful: most of the gradient was zero, so that the attack could not work")


def _columns(found: PredictedFiles, top: int) -> int:
    """Classes that are told of each image: there may be fewer than were asked for."""
    return max((len(row.top) for row in found.rows), default=top)


def _tell_saved(reporter: ConsoleReporter, rows: Sequence[FileAnswer], folder: str) -> None:
    saved = [row.attacked.saved for row in rows if row.attacked is not None and row.attacked.saved is not None]
    lost = sum(not each.still for each in saved)
    reporter.message(f"Written: {folder}: {len(saved):,} images that change the answer")
    if lost:
        reporter.message(f"Warning: {lost:,} of them no longer do when they are rounded to 8 bits")


def _as_json(found: PredictedFiles, top: int) -> str:
    return json.dumps(found.as_dict(), indent=2, allow_nan=False) + "\n"


def _as_csv(found: PredictedFiles, top: int) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    ranks = range(2, _columns(found, top) + 1)
    more = [name for rank in ranks for name in (f"class_{rank}", f"probability_{rank}")]
    attacked = ["attacked_class", "holds", "masked"] if found.header.get("attack") else []
    head = ["file", "class", "probability", *more, *attacked, "error"]
    writer.writerow(head)
    for row in found.rows:
        cells = dict(zip(head, _cells(row), strict=False))
        writer.writerow([{**cells, "error": row.error}.get(name) for name in head])
    return text.getvalue()


def _cells(row: FileAnswer) -> Iterator[object]:
    """Cells of a line of CSV; what is not known stays empty."""
    yield row.file
    for each in row.top:
        yield from (each.name, each.probability)
    if row.attacked is not None:
        masked = "" if row.attacked.masked is None else str(row.attacked.masked).lower()
        yield from (row.attacked.name, str(row.attacked.holds).lower(), masked)


_FORMS = {"csv": _as_csv, "json": _as_json}
