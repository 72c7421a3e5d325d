"""Writer of .beton files of any data set, by FFCV."""

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
from engine.pipelines.ffcv import check_installed
from engine.pipelines.prefetching import prefetched
from engine.pipelines.reading import beton
from engine.pipelines.reading.decoding import Pixels
from engine.pipelines.reading.encoded import Listing
from engine.pipelines.splits import SPLIT_NAMES, Progress, Split

_QUALITY = 90
_JPEG = b"\xff\xd8"  # its first bytes
_MOST_BYTES = (8 << 20) - 4096  # of an image: a page holds the name of its class too
_PREFETCHED = 64  # images


@dataclass(frozen=True)
class BetonFormat:
    """Format of the images in a file: "raw" pixels, or "jpeg".

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


class JPEGBytes(NamedTuple):
    """The bytes of a JPEG file, and its size."""

    content: bytes
    height: int
    width: int


def _raw(image_HWC: Pixels, form: BetonFormat) -> Pixels | JPEGBytes:
    return image_HWC


def _jpeg(image_HWC: Pixels, form: BetonFormat) -> Pixels | JPEGBytes:
    from engine.pipelines.ffcv.repairs import encode_jpeg

    return JPEGBytes(encode_jpeg(image_HWC, form.quality or _QUALITY).tobytes(), *image_HWC.shape[:2])


MODES = {"raw": _raw, "jpeg": _jpeg}
RAW_FORMAT = BetonFormat()


def write(
    path: Path, parts: Sequence[Split | Listing], form: BetonFormat = RAW_FORMAT, progress: Progress | None = None
) -> None:
    """Write training images, and test images where there are two parts, into one file in their order.

    A sample has the fields image, label, class_name (the name of its class), and where there are two parts split
    (0 or 1). A file that stands there is replaced when the new one is whole. Raises ValueError where FFCV is not
    installed, an image cannot be read, or has more bytes than a page of 8 MiB; OSError where the disk is full.
    """
    check_installed()
    from engine.pipelines.ffcv import repairs

    image = repairs.RGBImageField("raw")
    image.encode = partial(_encode, image.encode)
    fields = {beton.IMAGE: image, beton.LABEL: repairs.IntField(), beton.CLASS_NAME: repairs.BytesField()}
    if len(parts) > 1:
        fields[beton.SPLIT] = repairs.IntField()

    def samples() -> Iterator[tuple[Any, ...]]:
        for number, (part, images) in enumerate(zip(SPLIT_NAMES, parts, strict=False)):
            names = [np.frombuffer(name.encode(), np.uint8) for name in images.class_names]
            labels = images.labels.tolist()
            for done, (view, label) in enumerate(zip(_ready(images, form), labels, strict=True), start=1):
                yield view, label, names[label], number
                if progress is not None:
                    progress(part, done, len(labels))

    with replacing(path) as temporary:
        repairs.write(temporary, fields, sum(map(len, parts)), (sample[: len(fields)] for sample in samples()))


def _encode(
    encode: Callable[..., None], row: Any, given: Pixels | JPEGBytes, allocate: Callable[[int], tuple[int, Pixels]]
) -> None:
    """Encode as FFCV's image field does, and copy JPEG files, which that would decode and encode again."""
    if not isinstance(given, JPEGBytes):
        encode(row, given, allocate)
        return
    row["mode"], row["height"], row["width"] = beton.JPEG, given.height, given.width
    row["data_ptr"], room = allocate(len(given.content))
    room[:] = np.frombuffer(given.content, np.uint8)


def _ready(images: Split | Listing, form: BetonFormat) -> Iterator[Pixels | JPEGBytes]:
    """The images as they are to be written, prefetched by threads."""
    with ThreadPoolExecutor() as pool:
        try:
            yield from prefetched(pool, partial(_made_ready, images, form), range(len(images)), _PREFETCHED)
        finally:
            pool.shutdown(cancel_futures=True)


def _made_ready(images: Split | Listing, form: BetonFormat, sample: int) -> Pixels | JPEGBytes:
    ready = _converted(images, form, sample)
    size = len(ready.content) if isinstance(ready, JPEGBytes) else ready.nbytes
    if size > _MOST_BYTES:
        raise ValueError(
            f"data: {images.where(sample)} has {size:,} bytes and a page holds 8 MiB; "
            "give format jpeg or max_resolution"
        )
    return ready


def _converted(images: Split | Listing, form: BetonFormat, sample: int) -> Pixels | JPEGBytes:
    from engine.pipelines.ffcv.repairs import resizer

    if isinstance(images, Split):
        image_HWC: Pixels = images.images[sample].numpy()
    else:
        if form.mode == "jpeg" and form.quality is None:
            content, height, width = images.read(sample)
            if content.startswith(_JPEG) and max(height, width) <= (form.max_resolution or np.inf):
                return JPEGBytes(content, height, width)
        image_HWC = images.decode(sample)
    return look_up("format", form.mode, MODES)(resizer(image_HWC, form.max_resolution), form)
