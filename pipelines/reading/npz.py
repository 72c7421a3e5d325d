"""Images and labels in .npz files of NumPy, as generated data are published. N images, C channels, H, W."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.common import host_memory
from engine.common.files import regular_file
from engine.pipelines.reading.decoding import Pixels

IMAGE_NAMES = ("image", "images", "x", "data", "arr_0")
LABEL_NAMES = ("label", "labels", "y", "target", "targets", "arr_1")
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_LOCAL_HEADER, _LENGTHS = 30, 26  # of a member of a zip archive: its size, and where its name's length stands
_IMAGES_PER_PART = 4096

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images in an array, uint8 or float in [0, 1], NHWC of three channels; labels: int64 N, or None."""

    array: Array
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.array)

    @property
    def shape(self) -> tuple[int, int]:
        """H and W."""
        return self.array.shape[1], self.array.shape[2]

    def __getitem__(self, part: slice) -> Pixels:
        """Images as uint8; of floats the nearest grey levels."""
        given = self.array[part]
        return given if given.dtype == np.uint8 else np.rint(given * 255.0).astype(np.uint8)

    def tensor(self) -> Tensor:
        """All images, uint8; mapped from the file where it holds them so. Raises ValueError for too many."""
        if self.array.dtype == np.uint8 and self.array.flags.c_contiguous:
            return torch.from_numpy(self.array)
        check_memory(math.prod(self.array.shape), len(self))
        images_N = np.empty(self.array.shape, np.uint8)
        for start in range(0, len(self), _IMAGES_PER_PART):
            part = slice(start, start + _IMAGES_PER_PART)
            images_N[part] = self[part]
        return torch.from_numpy(images_N)


def check_memory(needed: int, count: int) -> None:
    """Raise ValueError where images would take more than half of the memory that is free."""
    if needed > host_memory.available() // 2:
        raise ValueError(
            f"{count:,} images of {needed / 1e9:.1f} GB are more than half of the memory that is free"
        )


def read(path: Path, *, with_labels: bool = True) -> ArrayImages:
    """The images of a file, and their labels if it has them, by the usual names in `IMAGE_NAMES`, `LABEL_NAMES`.

    Without `with_labels` labels are not looked at. Arrays that are not compressed are mapped into memory, others
    read whole. No pickled object is read.
    Raises ValueError, one line with the path, for what is no such file, damaged, ambiguous or of other values, and
    OSError where it cannot be read.
    """
    with _named(path), zipfile.ZipFile(regular_file(path)) as file:
        members = {
            name: _member(file, info)
            for info in file.infolist()
            if (name := info.filename.removesuffix(".npy")).lower() in (*IMAGE_NAMES, *LABEL_NAMES)
        }
        images = [name for name, member in members.items() if len(member.shape) >= 3]
        if len(images) != 1:
            found = ", ".join(f"{name} {member.shape}" for name, member in members.items()) or "none of them"
            raise ValueError(f"one array of images is expected, named {', '.join(IMAGE_NAMES)}; it has {found}")
        (image_name,) = images
        array = _channels_last(_array(path, file, members.pop(image_name)))
        _check_values(array)
        if not with_labels:
            members.clear()
        if len(members) > 1:
            raise ValueError(f"which are the labels, {' or '.join(members)}?")
        labels = [_labels(_array(path, file, member), len(array)) for member in members.values()]
        return ArrayImages(array, labels[0] if labels else None)


class _Member(NamedTuple):
    """An array in a file; header: bytes before its values."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[Any]
    header: int


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors with the path, of which damaged files make zipfile and NumPy raise nearly any."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        text = str(error) if isinstance(error, ValueError) else f"it is no readable .npz file ({error})"
        raise ValueError(f"{path}: {' '.join(text.split())}") from None


def _member(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    with file.open(info) as content:
        version = np.lib.format.read_magic(content)
        if version not in _HEADERS:
            raise ValueError(f"{info.filename} is of the version {version} of NumPy's format")
        shape, is_fortran, dtype = _HEADERS[version](content)
        return _Member(info, shape, is_fortran, dtype, content.tell())


def _array(path: Path, file: zipfile.ZipFile, member: _Member) -> Array:
    info = member.info
    if member.dtype.hasobject:
        raise ValueError(f"{info.filename} holds pickled Python objects, which are not read")
    whole: npt.NDArray[np.uint8]
    if info.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as raw:
            raw.seek(info.header_offset)
            name_length, extra_length = struct.unpack_from("<HH", raw.read(_LOCAL_HEADER), _LENGTHS)
        start = info.header_offset + _LOCAL_HEADER + name_length + extra_length
        whole = np.memmap(path, np.uint8, "c", start, (info.file_size,))  # private: torch wants it writable
        if zlib.crc32(whole) != info.CRC:
            raise ValueError(f"{info.filename} is damaged: its content does not fit its checksum")
    else:
        check_memory(info.file_size, member.shape[0] if member.shape else 1)
        whole = np.frombuffer(bytearray(file.read(info)), np.uint8)
    if member.header + math.prod(member.shape) * member.dtype.itemsize > info.file_size:
        raise ValueError(f"{info.filename} is cut off")
    return np.ndarray(member.shape, member.dtype, whole, member.header, order="F" if member.is_fortran else "C")


def _channels_last(array: Array) -> Array:
    """NHWC of three channels, without a copy: a grey image in all three."""
    shape = array.shape
    if len(shape) == 3 and shape[-1] not in (1, 3):  # else of a single image, as likely
        array = array[..., None]
    first, last = (array.ndim == 4 and array.shape[axis] in (1, 3) for axis in (1, 3))
    if first == last:
        raise ValueError(f"images have one or three channels, first or last, got {shape}")
    array = array.transpose(0, 2, 3, 1) if first else array
    return array if array.shape[3] == 3 else np.broadcast_to(array, (*array.shape[:3], 3))


def _check_values(array: Array) -> None:
    if not array.size:
        raise ValueError("it holds no image")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"images are uint8, or floats in [0, 1], got {array.dtype}")
    parts = [array[start : start + _IMAGES_PER_PART] for start in range(0, len(array), _IMAGES_PER_PART)]
    if array.dtype == np.uint8:
        if all(part.max() <= 1 for part in parts):  # of usual images the first part tells
            raise ValueError(
                "uint8 images are of 0 to 255, got no pixel above 1: floats that were cut to integers?"
            )
        return
    lowest, highest = min(float(part.min()) for part in parts), max(float(part.max()) for part in parts)
    if not (lowest >= 0 and highest <= 1) or any(np.isnan(part).any() for part in parts):
        raise ValueError(f"float images must be in [0, 1], got {lowest:.9g} to {highest:.9g}")


def _labels(array: Array, count: int) -> Tensor:
    if array.shape not in ((count,), (count, 1)) or array.dtype.kind not in "iu":
        raise ValueError(f"{count} whole numbers are expected as labels, got {array.dtype} {array.shape}")
    return torch.from_numpy(array.reshape(count).astype(np.int64))
