"""Table of the data sets, and the search for each in its places."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Generic, TypeVar, cast

from engine.common import host_memory
from engine.common.files import cache_dir, expand_user
from engine.common.lookup import check_registered
from engine.pipelines.reading import beton, published
from engine.pipelines.reading.beton import is_beton
from engine.pipelines.reading.encoded import (
    EncodedImages,
    FoundSplits,
    Listing,
    encoded_splits,
    listing,
    read_splits,
)
from engine.pipelines.reading.folder import Wanted, image_folder
from engine.pipelines.reading.held_out import HeldOut
from engine.pipelines.reading.published import Absent
from engine.pipelines.splits import SPLIT_NAMES, Progress, Request, Split, balanced, split_validation

__all__ = [
    "DATASETS",
    "AnyDataset",
    "AnySplit",
    "Dataset",
    "Entry",
    "FoundSplits",
    "Progress",
    "Split",
    "balanced",
    "cache_dir",
    "check",
    "find",
    "load",
    "split_validation",
]


AnySplit = Split | EncodedImages
Kind = TypeVar("Kind", bound=AnySplit, covariant=True)


@dataclass(frozen=True, eq=False)
class Dataset(Generic[Kind]):
    """A data set. flip: a mirrored image is still of its class. source: its place in words.

    notes: sentences on how it was read, for the user. held_out: the test images, where a rule chose them.
    extra: images that are trained on beside `train`.
    """

    name: str
    train: Kind
    test: Kind
    class_names: tuple[str, ...]
    flip: bool
    source: str
    notes: tuple[str, ...] = ()
    held_out: HeldOut | None = None
    extra: Kind | None = None

    @cached_property
    def sha256(self) -> str:
        """SHA-256, in hex, of class names, splits and extra images: in memory, of image shapes, images and labels.

        In files, of labels, names, and the content of up to 16,384 evenly chosen ones. Of the test
        split alone, where only that was asked for.
        """
        return self._hash(self.train, self.test)

    @cached_property
    def train_sha256(self) -> str:
        """`sha256` without the test split."""
        return self._hash(self.train)

    def _hash(self, *splits: AnySplit) -> str:
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        for split in splits:
            split.update(digest)
        if self.extra is not None:
            self.extra.update(digest)
        return digest.hexdigest()


AnyDataset = Dataset[AnySplit]


@dataclass(frozen=True)
class Entry:
    """Facts of a data set that are known before it is read; None: it depends on the user's folder.

    find: gives train, test and source, from the path given by the user, if any.
    """

    summary: str
    origin: str
    num_classes: int | None
    image_size: int | None
    flip: bool
    find: Callable[[str | None, Request], FoundSplits]


def check(name: str) -> None:
    """Raise ValueError where there is no data set of that name."""
    check_registered("dataset", name, DATASETS)


def load(
    name: str,
    data: str | None = None,
    *,
    limit_train: int | None = None,
    limit_test: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Dataset[Split]:
    """Read a data set into memory, or so many of its images, balanced over its classes and chosen by the seed.

    data: the only place to look; None: $ENGINE_DATA, ./data and the cache, then a download into the cache.
    Raises ValueError, one line, where the name is unknown or the data set is missing, damaged or too small.
    """
    found = find(name, data, Request(limit_train, limit_test, seed, progress))
    assert isinstance(found.train, Split), found.train
    return cast(Dataset[Split], found)


def find(name: str, data: str | None, request: Request) -> AnyDataset:
    """Read or list a data set as requested: images of folders and .beton files may stay there.

    data: as in `load`, or a .beton file. Raises ValueError as `load` does.
    """
    check(name)
    try:
        found = _found(name, data, request)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise ValueError(f"data: cannot read the data set {name}: {where}{error.strerror or error}") from None
    flip, class_names = DATASETS[name].flip, found.train.class_names
    return Dataset(name, found.train, found.test, class_names, flip, found.source, found.notes, found.held_out)


def _found(name: str, data: str | None, request: Request) -> FoundSplits:
    place = expand_user("data", data) if data is not None else None
    if place is not None and is_beton(place):
        return _beton(name, place, request)
    if request.image_size is not None and name != "folder":
        raise ValueError(f"image_size: all images of {name} are of one size; the dataset folder takes any size")
    return DATASETS[name].find(data, request)


def _embedded(data: str | None, request: Request) -> FoundSplits:
    if data is not None:
        raise ValueError(f"data: the dataset digits is embedded and is not read from a path, got {data!r}")
    return published.digits(request)


def _folder(data: str | None, request: Request) -> FoundSplits:
    given = data or os.environ.get("ENGINE_DATA")
    if not given:
        raise ValueError("data: the dataset folder needs the path of an image folder (or $ENGINE_DATA), got none")
    path = expand_user("data", given)
    if is_beton(path):
        return _beton("folder", path, request)
    found = image_folder(path, Wanted(request.only_test, request.whole_if_flat))
    splits = zip(SPLIT_NAMES, (found.train, found.test), strict=True)
    train, test = (listing(files, part, request) for part, files in splits)
    return FoundSplits(
        *_in_memory_or_not(train, test, request), f"image folder {path}", found.notes, found.held_out
    )


def _beton(name: str, path: Path, request: Request) -> FoundSplits:
    train, test = beton.splits(path, request)
    published.check_classes(name, train.class_names, str(path))
    if name == "digits":
        raise ValueError(f"data: the dataset digits is embedded and is not read from a path, got {str(path)!r}")
    return FoundSplits(*_in_memory_or_not(train, test, request), str(path))


def _in_memory_or_not(train: Listing, test: Listing, request: Request) -> tuple[AnySplit, AnySplit]:
    if request.image_size is None and request.resident_share:
        height, width = _first_size(train if len(train) else test, request)
        needed = (len(train) + len(test)) * height * width * 3
        if needed <= request.resident_share * max(host_memory.available(), 1):
            return read_splits(train, test, request)
    return encoded_splits(train, test, request)


def _first_size(images: Listing, request: Request) -> tuple[int, int]:
    """Height and width of the first image that counts."""
    for sample in range(len(images)):
        try:
            return images.read(sample)[1:]
        except ValueError:
            if not request.skips_bad_images:
                raise
    return 0, 0  # where none can be read, reading them says so


def _search(
    name: str,
    read: Callable[[Path, Request], FoundSplits],
    download: Callable[[Path], None],
    data: str | None,
    request: Request,
) -> FoundSplits:
    """Read from the first place that holds the data set; a place that holds it damaged ends the search."""
    if data is not None:
        place = expand_user("data", data)
        if not place.exists():
            raise ValueError(f"data: {place} does not exist")
        try:
            return read(place, request)
        except Absent as error:
            raise ValueError(f"data: {name} is not in {place}: it has {error}") from None
    cache = cache_dir() / "data"
    given = os.environ.get("ENGINE_DATA")
    places = [*([expand_user("ENGINE_DATA", given)] if given else []), Path("data").absolute(), cache]
    for place in places:
        try:
            return read(place, request)
        except Absent:
            continue
    try:
        _download_into(cache, download)
    except (OSError, RuntimeError, HTTPException) as error:
        raise ValueError(
            f"dataset: {name} not found in {', '.join(map(str, places))} and the download failed "
            f"({' '.join(str(error).split())}); `--dataset digits` needs no download"
        ) from None
    return read(cache, request)


def _download_into(cache: Path, download: Callable[[Path], None]) -> None:
    """Move the data into the cache only when complete, so that an interrupted download leaves nothing behind."""
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        download(Path(folder))
        for path in Path(folder).iterdir():
            if not (cache / path.name).exists():  # another process may have been faster
                path.rename(cache / path.name)


def _searched(
    name: str, read: Callable[[Path, Request], FoundSplits], download: Callable[[Path], None]
) -> Callable[[str | None, Request], FoundSplits]:
    return partial(_search, name, read, download)


DATASETS: dict[str, Entry] = {
    "digits": Entry(
        summary="1,797 handwritten digits, 8x8 enlarged to 32x32; a fixed fifth is the test split",
        origin="embedded (scikit-learn)",
        num_classes=10,
        image_size=32,
        flip=False,
        find=_embedded,
    ),
    "cifar10": Entry(
        summary="60,000 photographs of animals and vehicles",
        origin="torchvision, or an image folder of its classes",
        num_classes=10,
        image_size=32,
        flip=True,
        find=_searched(
            "cifar10", partial(published.cifar, "cifar10"), partial(published.download_cifar, "cifar10")
        ),
    ),
    "cifar100": Entry(
        summary="60,000 photographs of 100 kinds of things",
        origin="torchvision, or an image folder of its classes",
        num_classes=100,
        image_size=32,
        flip=True,
        find=_searched(
            "cifar100", partial(published.cifar, "cifar100"), partial(published.download_cifar, "cifar100")
        ),
    ),
    "svhn": Entry(
        summary="99,289 photographed house-number digits (without the extra split)",
        origin="torchvision",
        num_classes=10,
        image_size=32,
        flip=False,
        find=_searched("svhn", published.svhn, published.download_svhn),
    ),
    "tiny-imagenet": Entry(
        summary="110,000 photographs of ImageNet's classes; its val images are the test split",
        origin="cs231n.stanford.edu, zip or unpacked",
        num_classes=200,
        image_size=64,
        flip=True,
        find=_searched("tiny-imagenet", published.tiny_imagenet, published.download_tiny_imagenet),
    ),
    "folder": Entry(
        summary="your images: train/<class>/* and test/<class>/* (or val/), or <class>/*: a folder, zip or beton",
        origin="the path in `data` or $ENGINE_DATA",
        num_classes=None,
        image_size=None,
        flip=True,
        find=_folder,
    ),
}
