"""Writing .beton files of any data set, by FFCV."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.common.files import replacing
from engine.common.lookup import check_known, look_up
from engine.pipelines import beton
from engine.pipelines.ahead import make_ahead
from engine.pipelines.encoded import Listing
from engine.pipelines.ffcv import check_installed
from engine.pipelines.folder import Pixels
from engine.pipelines.splits import Progress, Split

_QUALITY = 90
_JPEG = b"\xff\xd8"  # its first bytes
_MOST_BYTES = (8 << 20) - 4096  # of an image: a page holds the name of its class too
_AHEAD = 64  # images that are made ready in advance


@dataclass(frozen=True)
class Format:
    """How images are kept: "raw" pixels, or "jpeg".

    quality: of JPEG, 1 to 100; None: JPEG files are taken as they are, others have 90. max_resolution: images
    whose longer side exceeds it are shrunk. Raises ValueError for what is not known or does not fit together.
    """

    mode: str = "raw"
    quality: int | None = None
    max_resolution: int | None = None

    def __post_init__(self) -> None:
        check_known("format", self.mode, MODES)
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be 1 to 100, got {self.quality}")
        if self.quality is not None and self.mode == "raw":
            raise ValueError(f"quality: raw pixels have none, got {self.quality}; give the format jpeg")
        if self.max_resolution is not None and self.max_resolution < 1:
            raise ValueError(f"max_resolution must be 1 or more, got {self.max_resolution}")


class Encoded(NamedTuple):
    """The bytes of a JPEG file, and its size."""

    content: bytes
    height: int
    width: int


def _raw(image_HWC: Pixels, form: Format) -> Pixels | Encoded:
    return image_HWC


def _jpeg(image_HWC: Pixels, form: Format) -> Pixels | Encoded:
    from engine.pipelines.ffcv_repairs import encode_jpeg

    return Encoded(encode_jpeg(image_HWC, form.quality or _QUALITY).tobytes(), *image_HWC.shape[:2])


MODES = {"raw": _raw, "jpeg": _jpeg}


RAW = Format()


def write(
    path: Path, parts: Sequence[Split | Listing], form: Format = RAW, progress: Progress | None = None
) -> None:
    """Write training images, and testing images where there are two parts, into one file in their order.

    A sample has the fields image, label, class_name (the name of its class), and where there are two parts split
    (0 or 1). A file that stands there is replaced when the new one is whole. Raises ValueError where FFCV is not
    installed, an image cannot be read, or has more bytes than a page of 8 MiB; OSError where the disk is full.
    """
    check_installed()
    from engine.pipelines import ffcv_repairs as ffcv

    image = ffcv.RGBImageField("raw")
    image.encode = partial(_encode, image.encode)
    fields = {beton.IMAGE: image, beton.LABEL: ffcv.IntField(), beton.CLASS_NAME: ffcv.BytesField()}
    if len(parts) > 1:
        fields[beton.SPLIT] = ffcv.IntField()

    def samples() -> Iterator[tuple[Any, ...]]:
        for number, (part, images) in enumerate(zip(beton.PARTS, parts, strict=False)):
            names = [np.frombuffer(name.encode(), np.uint8) for name in images.class_names]
            labels = images.labels.tolist()
            for done, (view, label) in enumerate(zip(_ready(images, form), labels, strict=True), start=1):
                yield view, label, names[label], number
                if progress is not None:
                    progress(part, done, len(labels))

    with replacing(path) as beside:
        ffcv.write(beside, fields, sum(map(len, parts)), (sample[: len(fields)] for sample in samples()))


def _encode(
    encode: Callable[..., None], row: Any, given: Pixels | Encoded, allocate: Callable[[int], tuple[int, Pixels]]
) -> None:
    """What FFCV's image field does, and for files that are JPEG already: it would decode and encode them again."""
    if not isinstance(given, Encoded):
        encode(row, given, allocate)
        return
    row["mode"], row["height"], row["width"] = beton.JPEG, given.height, given.width
    row["data_ptr"], room = allocate(len(given.content))
    room[:] = np.frombuffer(given.content, np.uint8)


def _ready(images: Split | Listing, form: Format) -> Iterator[Pixels | Encoded]:
    """The images as they are to be written, made ready by threads."""
    with ThreadPoolExecutor() as pool:
        try:
            yield from make_ahead(pool, partial(_made_ready, images, form), range(len(images)), _AHEAD)
        finally:
            pool.shutdown(cancel_futures=True)


def _made_ready(images: Split | Listing, form: Format, sample: int) -> Pixels | Encoded:
    ready = _converted(images, form, sample)
    size = len(ready.content) if isinstance(ready, Encoded) else ready.nbytes
    if size > _MOST_BYTES:
        where = f"image {sample}" if isinstance(images, Split) else images.where(sample)
        raise ValueError(
            f"data: {where} has {size:,} bytes and a page holds 8 MiB; give format jpeg or max_resolution"
        )
    return ready


def _converted(images: Split | Listing, form: Format, sample: int) -> Pixels | Encoded:
    from engine.pipelines.ffcv_repairs import resizer

    if isinstance(images, Split):
        image_HWC: Pixels = images.images[sample].numpy()
    else:
        if form.mode == "jpeg" and form.quality is None:
            content, height, width = images.read(sample)
            if content.startswith(_JPEG) and max(height, width) <= (form.max_resolution or np.inf):
                return Encoded(content, height, width)
        image_HWC = images.decode(sample)
    return look_up("format", form.mode, MODES)(resizer(image_HWC, form.max_resolution), form)
