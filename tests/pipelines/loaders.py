"""Every pipeline over every kind of images that it takes, to be tested alike."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.pipelines import extra, ffcv
from engine.pipelines.base import Batch, Pipeline
from engine.pipelines.dali import DALIPipeline
from engine.pipelines.dali import check_installed as check_dali
from engine.pipelines.datasets import Dataset
from engine.pipelines.ffcv import beton_writer
from engine.pipelines.ffcv.beton_writer import BetonFormat
from engine.pipelines.images import ImagePipeline
from engine.pipelines.reading import beton
from engine.pipelines.reading.encoded import EncodedImages, Listing, encoded_splits
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Request, Split
from engine.pipelines.tensor import TensorPipeline
from tests.pipelines.photographs import CLASSES, encode, in_memory, smooth

COUNT = 43
LABELS = torch.arange(COUNT) % 5
SIZES = [(20 + 7 * number % 31, 20 + 11 * number % 37) for number in range(COUNT)]
FILES = [encode(smooth(number, *size)) for number, size in enumerate(SIZES)]
SMALL = [smooth(number, 8, 8) for number in range(COUNT)]
ARRAYS = Split(torch.from_numpy(np.stack(SMALL)), LABELS, CLASSES)
Data = Split | EncodedImages


def in_beton(
    path: Path, images: Split | Listing, form: BetonFormat = beton_writer.RAW_FORMAT, size: int | None = None
) -> Data:
    """The images in a .beton file: whole, or crops of them resized to that size."""
    beton_writer.write(path, [images], form)
    listing = beton.read(path).listings()[""]
    return encoded_splits(listing, listing, Request(image_size=size))[0]


@dataclass(frozen=True)
class Loader:
    """A pipeline over images. make_data: these, once, in a folder."""

    name: str
    kind: Callable[..., Pipeline]
    make_data: Callable[[Path], Data]
    order: str = "random"

    def __call__(self, data: Data, batch_size: int = 8, **options: Any) -> Pipeline:
        """Make the pipeline with seed 3, cropping and flipping on a CPU with one worker, unless told otherwise."""
        keys = {key: options.pop(key) for key in ("seed", "order", "last", "shard") if key in options}
        sampling = Sampling(len(data), batch_size, **{"seed": 3, "order": self.order, **keys})
        given = {"augment": True, "flip": True, "device": "cpu", **options}
        if self.kind is not TensorPipeline:
            given.setdefault("workers", 1)
        return self.kind(data, sampling, **given)

    @property
    def whole(self) -> bool:
        """True if views are of whole images of 8 x 8 pixels, without loss: those of `ARRAYS`."""
        return not ("crops" in self.name or "jpeg" in self.name)


def small_files(kind: str) -> EncodedImages:
    return in_memory(*(encode(picture, kind) for picture in SMALL), size=8, any_size=False)


def joined(folder: Path) -> Data:
    """The same images: the first 20 in PNG files, and beside them the others as extra ones in an .npz file."""
    first, others = torch.arange(COUNT).split([20, COUNT - 20])
    originals: Any = small_files("PNG").take(first)
    np.savez(folder / "extra.npz", image=ARRAYS.images[others].numpy(), label=LABELS[others].numpy())
    dataset = Dataset("own", originals, originals, CLASSES, True, "memory")
    return extra.join(originals, extra.find(str(folder / "extra.npz"), dataset, Request()).images)


LOADERS = (
    Loader("tensor", TensorPipeline, lambda folder: ARRAYS),
    Loader("image-arrays", ImagePipeline, lambda folder: ARRAYS),
    Loader("image-png", ImagePipeline, lambda folder: small_files("PNG")),
    Loader("image-crops", ImagePipeline, lambda folder: in_memory(*FILES)),
    Loader("image-beton", ImagePipeline, lambda folder: in_beton(folder / "i.beton", ARRAYS)),
    Loader("image-joined", ImagePipeline, joined),
    Loader("dali-arrays", DALIPipeline, lambda folder: ARRAYS),
    Loader("dali-png", DALIPipeline, lambda folder: small_files("PNG")),
    Loader("dali-crops", DALIPipeline, lambda folder: in_memory(*FILES)),
    Loader("dali-joined", DALIPipeline, joined),
    Loader("dali-beton", DALIPipeline, lambda folder: in_beton(folder / "d.beton", ARRAYS)),
    Loader("ffcv-raw", ffcv.FFCVPipeline, lambda folder: in_beton(folder / "r.beton", ARRAYS)),
    Loader(
        "ffcv-raw-pages", ffcv.FFCVPipeline, lambda folder: in_beton(folder / "p.beton", ARRAYS), "quasi-random"
    ),
    Loader(
        "ffcv-jpeg", ffcv.FFCVPipeline, lambda folder: in_beton(folder / "j.beton", ARRAYS, BetonFormat("jpeg"))
    ),
    Loader(
        "ffcv-crops",
        ffcv.FFCVPipeline,
        lambda folder: in_beton(folder / "w.beton", in_memory(*FILES), BetonFormat("jpeg"), 16),
    ),
    Loader(
        "ffcv-raw-crops",
        ffcv.FFCVPipeline,
        lambda folder: in_beton(folder / "v.beton", in_memory(*FILES), BetonFormat("raw"), 16),
    ),
)


def require(loader: Loader) -> None:
    """Skip, visibly, where the library of a pipeline is not installed."""
    for kind, check in (("ffcv", ffcv.check_installed), ("dali", check_dali)):
        if loader.name.startswith(kind):
            try:
                check()
            except ValueError as error:
                pytest.skip(str(error))


def equal(got: Batch, expected: Batch) -> bool:
    pairs = ((got.x_nat, expected.x_nat), (got.labels, expected.labels), (got.sample, expected.sample))
    return all(torch.equal(*pair) for pair in pairs)


def order(batches: list[Batch]) -> Tensor:
    return torch.cat([batch.sample for batch in batches])


def threads() -> list[str]:
    """The names of this process's threads, those of C++ included, without those of pools that live for ever."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:  # it has just ended
            continue
    return names


def threads_end(before: int) -> bool:
    """True if no more threads are left than there were, after a while."""
    patience = time.monotonic() + 5
    while (left := len(threads())) > before and time.monotonic() < patience:
        time.sleep(0.01)  # a joined thread vanishes from /proc a little later
    return left <= before


def python_threads(others: Collection[threading.Thread]) -> list[str]:
    """The names of those that were not there before."""
    return [thread.name for thread in threading.enumerate() if thread not in others]
