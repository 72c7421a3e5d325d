"""`engine data`: data sets as .beton files, and what such a file holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.common.console import Reporter
from engine.common.stopping import Interrupted, RunFailed, graceful_stop
from engine.pipelines import beton, datasets, ffcv
from engine.pipelines.beton_writer import Format
from engine.pipelines.beton_writer import write as write_beton
from engine.pipelines.encoded import EncodedImages
from engine.pipelines.splits import Request


def write(
    dataset: str,
    data: str | None,
    out: Path,
    form: Format,
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
    if out.suffix != ".beton":
        raise ValueError(f"--out: the name of a .beton file ends in .beton, got {str(out)!r}")
    if out.exists() and not force:
        raise ValueError(f"--out: {out} exists; --force replaces it")
    ffcv.check_installed()
    with graceful_stop(reporter.message) as stop:
        show = reporter.by_part("reading")

        def progress(part: str, done: int, total: int) -> None:
            stop.check()
            show(part, done, total)

        request = Request(limit_train, limit_test, progress=progress, on_bad_image=on_bad_image, resident="never")
        found = datasets.find(dataset, data, request)
        parts = [
            dataclasses.replace(part, windows=True) if isinstance(part, EncodedImages) else part
            for part in (found.train, found.test)
        ]
        show = reporter.by_part("writing")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_beton(out, parts, form, progress)
        except Interrupted:
            raise Interrupted(f"interrupted; {out} was not written") from None
        except OSError as error:
            raise RunFailed(f"{out} was not written: {error.strerror or error}") from None
        finally:
            reporter.end()
    for part, split in zip(beton.PARTS, parts, strict=True):
        reporter.message(f"{part}: {len(split):,} images from {found.source}")
        reporter.skipped(part, split.skipped)
    reporter.message(f"Written: {out}, {out.stat().st_size / 1e6:,.1f} MB")


@dataclass(frozen=True)
class Info:
    """A .beton file: lines about it, the titles of its parts, and of each class name, label and images by part."""

    lines: tuple[str, ...]
    parts: tuple[str, ...]
    classes: tuple[tuple[str, int, tuple[int, ...]], ...]


def info(path: Path) -> Info:
    """Fields, counts, sizes and classes of a .beton file. Raises ValueError where it is none, or damaged."""
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
