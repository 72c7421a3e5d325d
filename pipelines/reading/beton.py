"""FFCV's file format, .beton: the content of a file, checked before anything is made of it. Needs no FFCV.

A file is a header, a description of each field, one row of metadata for each sample, pages of data that the rows
point into, and a table of what was allocated in them. Written by FFCV 1.0.2, and by `beton_writer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.common.files import regular_file
from engine.pipelines.reading.encoded import Listing
from engine.pipelines.reading.tree import Tree
from engine.pipelines.splits import SPLIT_NAMES, Request

BETON_VERSION = 2
JPEG, RAW = 0, 1  # modes of an image
_SUFFIXES = (".beton", ".ffcv")
_PARTS = ("train", "test", "val")
_MOST_FIELDS, _SMALLEST_PAGE = 256, 1 << 12  # of a file that is taken for one whatever its name
IMAGE, LABEL, SPLIT, CLASS_NAME = "image", "label", "split", "class_name"

_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("table_at", "<u8"),
    ]
)
_FIELD = np.dtype([("type", "<u1"), ("name", "S16"), ("arguments", "V1024")])
_ALLOCATION = np.dtype([("sample", "<u8"), ("at", "<u8"), ("size", "<u8")])
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("at", "<u8")])
_BYTES = np.dtype([("at", "<u8"), ("size", "<u8")])
# Type of a field -> its name, and its part of a row of metadata.
_TYPES: dict[int, tuple[str, npt.DTypeLike]] = {
    0: ("float", "<f8"),
    1: ("int", "<i8"),
    2: ("rgb image", _IMAGE),
    3: ("bytes", _BYTES),
    4: ("array", "<u8"),
    5: ("json", _BYTES),
    6: ("tensor", "<u8"),
}


@dataclass(frozen=True, eq=False)
class Beton:
    """The head of a file. fields: name -> type. rows: metadata, by field. sizes: bytes of each image."""

    path: Path
    page_size: int
    fields: dict[str, str]
    rows: npt.NDArray[Any]
    sizes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images(self) -> npt.NDArray[Any]:
        """Mode, width and height of each sample's image, and the place of its bytes: `at`."""
        return self.rows[IMAGE]

    @property
    def labels(self) -> Tensor:
        """int64 N."""
        return torch.from_numpy(self.rows[LABEL].astype(np.int64))

    @cached_property
    def data(self) -> npt.NDArray[np.uint8]:
        """The whole file, mapped into memory."""
        return np.memmap(self.path, np.uint8, mode="r")

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label, else its number. Raises ValueError for labels with gaps or below 0."""
        labels, first = np.unique(self.rows[LABEL], return_index=True)
        for number, label in enumerate(labels.tolist()):
            if label != number:
                raise ValueError(
                    f"data: {self.path} has a label out of range: {label}, where labels must be 0 to "
                    f"{len(labels) - 1} for {len(labels)} classes"
                )
        if self.fields.get(CLASS_NAME) != "bytes":
            return tuple(map(str, labels.tolist()))
        rows = self.rows[CLASS_NAME][first]
        return tuple(self._bytes(row["at"], row["size"]).decode(errors="replace") for row in rows)

    def encoded(self, sample: int) -> bytes:
        """The image of a sample as a JPEG or a PPM file."""
        row = self.images[sample]
        content = self._bytes(row["at"], self.sizes[sample])
        return content if row["mode"] == JPEG else b"P6 %d %d 255\n" % (row["width"], row["height"]) + content

    def listings(self) -> dict[str, Listing]:
        """The samples by split; all of them under "" where the file has no splits."""
        names = [f"image {sample}" for sample in range(len(self))]
        tree = Tree(names, f"{self.path}: ", lambda name: self.encoded(position(name)))
        whole = Listing(tree, tuple(names), self.labels, self.class_names, beton=self.path)
        if self.fields.get(SPLIT) != "int":
            return {"": whole}
        found = {}
        for number, split in enumerate(SPLIT_NAMES):
            index = torch.from_numpy(np.flatnonzero(self.rows[SPLIT] == number))
            found[split] = whole.take(index)
        return found

    def _bytes(self, at: int, size: int) -> bytes:
        return self.data[int(at) : int(at) + int(size)].tobytes()


def position(name: str) -> int:
    """Number in its file of the sample that a `Listing` calls so."""
    return int(name.removeprefix("image "))


def is_beton(path: Path) -> bool:
    """True if the path is that of a .beton file, by its name or its content, or of a folder with such files."""
    if path.is_dir():
        return any(_in_folder(path, part) for part in _PARTS)
    return path.suffix in _SUFFIXES or (path.is_file() and _begins_like_one(path))


def _begins_like_one(path: Path) -> bool:
    """True if a file begins with the head of a .beton file."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.itemsize)
    except OSError:  # which reading it says
        return False
    if len(head) < _HEADER.itemsize:
        return False
    version, num_fields, page_size, count, table_at = np.frombuffer(head, _HEADER)[0].tolist()
    counts = 0 < num_fields <= _MOST_FIELDS and count > 0 and table_at > 0
    return bool(version == BETON_VERSION and page_size.bit_count() == 1 and page_size >= _SMALLEST_PAGE and counts)


def _in_folder(path: Path, part: str) -> Path | None:
    """The file train.beton of a folder, or one like train_500_0.5_90.ffcv, as ImageNet's are often called.

    Raises ValueError where there are several.
    """
    found = sorted(file for file in path.glob(f"{part}*") if file.suffix in _SUFFIXES and file.is_file())
    exact = [file for file in found if file.stem == part]
    if len(exact or found) > 1:
        raise ValueError(f"data: {path} holds several files of {part}: {', '.join(file.name for file in found)}")
    return next(iter(exact or found), None)


def splits(path: Path, request: Request) -> tuple[Listing, Listing]:
    """Training and test images of a file with the field `split`, or of a folder with train.beton and test.beton.

    In a folder val.beton serves where there is no test.beton. Where the request is for test images only, they need
    no others beside them, and a file without splits is one of test images. Raises ValueError in one line for a
    file that is not there or not whole, and for classes that differ between the two.
    """
    if path.is_dir():
        first, second = _in_folder(path, "train"), _in_folder(path, "test") or _in_folder(path, "val")
        if second is None:
            raise ValueError(f"data: {path} holds no test.beton and no val.beton")
        if first is None and not request.only_test:
            raise ValueError(f"data: {path} holds no train.beton")
        parts = [_only(file) for file in (second if request.only_test else first, second) if file]
    else:
        found = read(path).listings()
        if "" in found and request.only_test:
            found = dict.fromkeys(SPLIT_NAMES, found[""])
        if "" in found:
            raise ValueError(
                f"data: {path} does not say which images are for testing (it has no field `split`); "
                f"put it into a folder as train.beton, beside test.beton, and give the folder"
            )
        parts = [found[name] for name in SPLIT_NAMES]
    class_names = parts[0].class_names
    for images in parts:
        if len(images.labels.unique()) != len(class_names) or images.class_names != class_names:
            raise ValueError(f"data: {path} must have the same classes for training and for testing")
    train, test = map(request.of, SPLIT_NAMES, parts)
    return train, test


def _only(path: Path) -> Listing:
    found = read(path).listings()
    if "" not in found:
        raise ValueError(f"data: {path} holds images of both splits: give the file itself, not its folder")
    return found[""]


def read(path: Path) -> Beton:
    """The head of a file. Raises ValueError, one line, where it is no whole .beton file with images and labels."""
    try:
        size = regular_file(path).stat().st_size
        with path.open("rb") as file:
            return _read(_Content(path, file, size))
    except OSError as error:
        raise ValueError(f"data: cannot read {path}: {error.strerror}") from None


@dataclass(frozen=True, eq=False)
class _Content:
    """An open file of so many bytes. Its checks raise ValueError where it is no whole .beton file."""

    path: Path
    file: BinaryIO
    size: int

    def check(self, holds: bool, reason: str) -> None:
        if not holds:
            raise ValueError(f"data: {self.path} is no whole .beton file ({reason})")

    def check_images(self, fault: str, *wrong: npt.NDArray[np.bool_]) -> None:
        """Refuse the first image for which any of the conditions holds."""
        found = np.flatnonzero(np.logical_or.reduce(wrong))
        if len(found):
            self.check(False, f"image {found[0]} {fault}")

    def array(self, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        """The next so many records."""
        length = count * dtype.itemsize
        content = self.file.read(length) if length <= self.size else b""
        self.check(len(content) == length, f"it ends at byte {self.size:,}, within its head")
        return np.frombuffer(content, dtype)


def _read(content: _Content) -> Beton:
    check = content.check
    version, num_fields, page_size, count, table_at = content.array(_HEADER, 1)[0].tolist()
    check(version == BETON_VERSION, f"it begins with format version {version}, and {BETON_VERSION} is known")
    check(table_at > 0, "its writing was never finished")
    allocations, rest = divmod(content.size - table_at, _ALLOCATION.itemsize)
    check(allocations >= 0 and rest == 0, f"it is cut off at byte {content.size:,}")
    check(page_size.bit_count() == 1, f"its pages are of {page_size:,} bytes")
    check(count > 0, "it holds no samples")

    fields, row = _read_fields(content, num_fields)
    pointing = sum(kind not in ("float", "int") for kind in fields.values())  # to what is allocated for them
    check(allocations == count * pointing, f"it holds {count:,} samples and {allocations:,} allocations")
    rows = content.array(row, count)
    data_from = content.file.tell()
    sizes = _read_sizes(content, rows[IMAGE], range(data_from, table_at), allocations, page_size)
    if fields.get(SPLIT) == "int":
        content.check_images("is in no known split", (rows[SPLIT] < 0) | (rows[SPLIT] >= len(SPLIT_NAMES)))
    if fields.get(CLASS_NAME) == "bytes":
        at, long = (rows[CLASS_NAME][key].astype(np.int64) for key in ("at", "size"))
        content.check_images("has a class name outside the file", at < data_from, long < 0, long > table_at - at)
    return Beton(content.path, page_size, fields, rows, sizes)


def _read_fields(content: _Content, count: int) -> tuple[dict[str, str], np.dtype[Any]]:
    """The fields, name -> type, and the record of a sample's metadata."""
    check = content.check
    fields: dict[str, str] = {}
    kinds: list[tuple[str, npt.DTypeLike]] = []
    for field in content.array(_FIELD, count):
        padded = field["name"].decode("ascii", "replace")
        name = padded.partition("\0")[0]
        check(padded.isascii() and name.isprintable(), f"its field {padded!r} is not of ASCII letters")
        check(int(field["type"]) in _TYPES, f"its field {name!r} is of the custom type {field['type']}")
        fields[name], kind = _TYPES[int(field["type"])]
        kinds.append((name, kind))
    check(len(fields) == len(kinds), "two fields have one name")
    if (fields.get(IMAGE), fields.get(LABEL)) != ("rgb image", "int"):
        listed = ", ".join(f"{name} ({kind})" for name, kind in fields.items())
        raise ValueError(
            f"data: {content.path} needs the fields image (rgb image) and label (int), and it has {listed}"
        )
    return fields, np.dtype(kinds, align=True)


def _read_sizes(
    content: _Content, images: npt.NDArray[Any], data: range, allocations: int, page_size: int
) -> npt.NDArray[np.int64]:
    """Bytes of each image, by the table of allocations behind the data."""
    content.file.seek(data.stop)
    table = content.array(_ALLOCATION, allocations)
    table = table[np.lexsort((table["size"], table["at"]))]  # an allocation of no bytes may be where an image is
    starts, lengths = table["at"].astype(np.int64), table["size"].astype(np.int64)
    outside = (starts < data.start) | (lengths < 0) | (lengths > data.stop - starts)
    content.check(not outside.any(), "it has an allocation outside of it")
    place = np.searchsorted(table["at"], images["at"], "right") - 1
    at, sizes = starts[place], lengths[place]
    pixels = images["height"].astype(np.int64) * images["width"] * 3
    refuse = content.check_images
    refuse("is nowhere in the file", table["at"][place] != images["at"])
    refuse("has the place of another sample", table["sample"][place] != np.arange(len(images)))
    refuse("is neither JPEG nor raw", (images["mode"] != JPEG) & (images["mode"] != RAW))
    refuse("has another size than its pixels", (images["mode"] == RAW) & (sizes != pixels))
    refuse("has no pixels", pixels == 0, sizes == 0)
    refuse("is in two pages", at // page_size != (at + sizes - 1) // page_size)
    return sizes
