"""`engine data`: data sets as .beton files, and what such a file holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.commands.completion import FILE, named, one_of
from engine.commands.options import COUNT

if TYPE_CHECKING:
    from engine.common.console import Reporter
    from engine.pipelines.ffcv.beton_writer import BetonFormat


@click.group()
def data() -> None:
    """Write data sets as .beton files, which FFCV loads, and look into them."""


@data.command("write")
@click.option(
    "--dataset",
    required=True,
    type=named("dataset"),
    help="digits, cifar10, cifar100, svhn, tiny-imagenet or folder.",
)
@click.option("--data", "place", type=FILE, help="Where the data set lies. [$ENGINE_DATA, ./data, the user cache]")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The file, X.beton.")
@click.option(
    "--format",
    "mode",
    type=one_of("raw", "jpeg"),
    default="raw",
    show_default=True,
    help="raw pixels (fast, large), or jpeg.",
)
@click.option(
    "--quality", type=click.IntRange(1, 100), help="Of JPEG, 1 to 100. [JPEG files as they are, others 90]"
)
@click.option("--max-resolution", type=COUNT, help="Shrink images whose longer side exceeds it.")
@click.option("--limit-train", type=COUNT, help="Write that many training images, balanced over classes.")
@click.option("--limit-test", type=COUNT, help="Write that many test images, balanced over classes.")
@click.option(
    "--on-bad-image",
    type=one_of("fail", "skip"),
    default="fail",
    show_default=True,
    help="fail, or skip what cannot be read.",
)
@click.option("--force", is_flag=True, help="Replace a file that exists.")
def write_command(
    dataset: str,
    place: str | None,
    out: Path,
    mode: str,
    quality: int | None,
    max_resolution: int | None,
    **options: Any,
) -> None:
    """Write both splits of a data set into one .beton file, for `engine train --data FILE`."""
    from engine.common.console import ConsoleReporter
    from engine.pipelines.ffcv.beton_writer import BetonFormat

    write(dataset, place, out, BetonFormat(mode, quality, max_resolution), ConsoleReporter(), **options)


# many parameters: those that the command line gives
def write(
    dataset: str,
    data: str | None,
    out: Path,
    form: BetonFormat,
    reporter: Reporter,
    *,
    limit_train: int | None = None,
    limit_test: int | None = None,
    on_bad_image: str = "fail",
    force: bool = False,
) -> None:
    """Write both splits of a data set into one .beton file; images of a folder may be of any size.

    Raises ValueError where the file exists and `force` is not given, for what is no data set, and for an image
    that cannot be read and is not skipped; RunFailed for a full disk; Interrupted after a signal. Then no file is
    left.
    """
    from engine.common.stopping import Interrupted, RunFailed, graceful_stop
    from engine.pipelines import datasets, ffcv
    from engine.pipelines.ffcv.beton_writer import write as write_beton
    from engine.pipelines.reading.encoded import EncodedImages
    from engine.pipelines.splits import SPLIT_NAMES, Request

    if out.suffix != ".beton":
        raise ValueError(f"--out: the name of a .beton file ends in .beton, got {str(out)!r}")
    if out.exists() and not force:
        raise ValueError(f"--out: {out} exists; --force replaces it")
    ffcv.check_installed()
    with graceful_stop(reporter.message) as stop:
        show = reporter.part_progress("reading")

        def progress(part: str, done: int, total: int) -> None:
            stop.check()
            show(part, done, total)

        request = Request(limit_train, limit_test, progress=progress, on_bad_image=on_bad_image, resident="never")
        found = datasets.find(dataset, data, request)
        parts = [
            dataclasses.replace(part, any_size=True) if isinstance(part, EncodedImages) else part
            for part in (found.train, found.test)
        ]
        show = reporter.part_progress("writing")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_beton(out, parts, form, progress)
        except Interrupted:
            raise Interrupted(f"interrupted; {out} was not written") from None
        except OSError as error:
            raise RunFailed(f"{out} was not written: {error.strerror or error}") from None
        finally:
            reporter.end()
    reporter.notes(found.notes)
    for part, split in zip(SPLIT_NAMES, parts, strict=True):
        reporter.message(f"{part}: {len(split):,} images from {found.source}")
        reporter.skipped(part, split.skipped)
    reporter.message(f"Written: {out}, {out.stat().st_size / 1e6:,.1f} MB")


@data.command("info")
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE")
def info_command(path: Path) -> None:
    """Tell fields, counts, sizes and classes of a .beton file, whatever its name."""
    from engine.commands.tables import print_list
    from engine.common.console import ConsoleReporter

    found = info(path)
    reporter = ConsoleReporter()
    for line in found.lines:
        reporter.message(line)
    rows = [(name, str(label), *(f"{count:,}" for count in counts)) for name, label, counts in found.classes]
    print_list(("class", "label", *found.parts), rows)


@dataclass(frozen=True)
class Info:
    """Contents of a .beton file: lines, titles of its parts, and of each class name, label and images by part."""

    lines: tuple[str, ...]
    parts: tuple[str, ...]
    classes: tuple[tuple[str, int, tuple[int, ...]], ...]


def info(path: Path) -> Info:
    """Fields, counts, sizes and classes of a .beton file. Raises ValueError where it is none, or damaged."""
    import numpy as np

    from engine.pipelines.reading import beton

    file = beton.read(path)
    images, names = file.images, file.class_names
    jpeg = int((images["mode"] == beton.JPEG).sum())
    pixels = sorted({(int(width), int(height)) for width, height in images[["width", "height"]].tolist()})
    (least, median, most) = (int(each) for each in np.quantile(file.sizes, [0, 0.5, 1]))
    listed = ", ".join(f"{name} ({kind})" for name, kind in file.fields.items())
    sizes = f"{pixels[0][0]}x{pixels[0][1]}"
    if len(pixels) > 1:
        sizes = f"{len(pixels):,} sizes, from {sizes} to {pixels[-1][0]}x{pixels[-1][1]}"
    parts, megabytes = file.listings(), path.stat().st_size / 1e6
    counts = [part.labels.bincount(minlength=len(names)).tolist() for part in parts.values()]
    return Info(
        (
            f"{path}: {len(file):,} images, {megabytes:,.1f} MB in pages of {file.page_size >> 20} MiB",
            f"fields: {listed}",
            f"images: {jpeg:,} JPEG, {len(file) - jpeg:,} raw; {sizes} pixels",
            f"bytes of an image: {least:,} to {most:,}, median {median:,}",
        ),
        tuple(part or "images" for part in parts),
        tuple((name, label, tuple(count[label] for count in counts)) for label, name in enumerate(names)),
    )
