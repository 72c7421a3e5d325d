"""Epochs that `bench.pipelines` times: of each pipeline, and of torch's DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.lib import photographs
from engine.pipelines import datasets
from engine.pipelines.base import Batch, Pipeline
from engine.pipelines.dali import DALIPipeline
from engine.pipelines.ffcv import FFCVPipeline, beton_writer
from engine.pipelines.ffcv.beton_writer import BetonFormat
from engine.pipelines.images import ImagePipeline
from engine.pipelines.reading import beton
from engine.pipelines.reading.encoded import EncodedImages, Listing, encoded_splits, listing
from engine.pipelines.reading.folder import image_folder
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import SPLIT_NAMES, Request, Split
from engine.pipelines.tensor import TensorPipeline

BASELINE = "dataloader"
WORKERS = 2  # of the baseline
BATCH_SIZE = 128
PHOTOGRAPHS = 2048


@dataclass
class Candidates:
    """Functions that begin an epoch, by name. absent: lines about those that are not there."""

    images: int
    size: int
    epochs: dict[str, Callable[[int], Iterator[Any]]] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)

    def offer(self, name: str, make: Callable[[], Pipeline]) -> None:
        """Add a pipeline, if it can be made here."""
        try:
            self.epochs[name] = make().epoch
        except ValueError as error:
            self.absent.append(f"not timed: {name}: {error}")


def cifar10(scratch: Path, device: torch.device, count: int | None = None) -> Candidates:
    """Images in memory, cropped and flipped: CIFAR-10's, or so many of them. scratch: a folder to write into."""
    from torchvision import transforms

    train = datasets.load("cifar10", limit_train=count, limit_test=10).train
    transform = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    found = Candidates(len(train), 32)
    found.epochs[BASELINE] = baseline(PillowImages(train, transform), device)
    given: Any = {"augment": True, "flip": True, "device": device}
    sampling = Sampling(len(train), BATCH_SIZE)
    found.offer("tensor", lambda: TensorPipeline(train, sampling, **given))
    found.offer("ffcv", lambda: FFCVPipeline(in_beton(train, scratch / "cifar10.beton"), sampling, **given))
    found.offer("dali", lambda: DALIPipeline(train, sampling, **given))
    found.offer("image", lambda: ImagePipeline(train, sampling, **given))
    return found


def jpeg224(scratch: Path, device: torch.device, count: int | None = None) -> Candidates:
    """Photographs in files, random windows of which are resized and flipped."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    folder, size = photographs.make(scratch / "photographs", count or PHOTOGRAPHS), photographs.SIZE
    transform = transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    request, read = Request(image_size=size), image_folder(folder)
    train, test = (
        listing(files, part, request) for files, part in zip((read.train, read.test), SPLIT_NAMES, strict=True)
    )
    files, _ = encoded_splits(train, test, request)
    found = Candidates(len(train), size)
    found.epochs[BASELINE] = baseline(ImageFolder(folder / "train", transform), device)
    given: Any = {"augment": True, "flip": True, "device": device}
    sampling = Sampling(len(train), BATCH_SIZE)
    found.offer(
        "ffcv",
        lambda: FFCVPipeline(
            in_beton(train, scratch / "photographs.beton", BetonFormat("jpeg"), request), sampling, **given
        ),
    )
    found.offer("dali", lambda: DALIPipeline(files, sampling, **given))
    found.offer("image", lambda: ImagePipeline(files, sampling, **given))
    return found


DATA = {"cifar10": cifar10, "jpeg224": jpeg224}


class PillowImages(Dataset[tuple[Tensor, int]]):
    """Images in memory as torchvision's CIFAR10 gives them."""

    def __init__(self, images: Split, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.labels, self.transform = images.images.numpy(), images.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def baseline(dataset: Dataset[Any], device: torch.device) -> Callable[[int], Iterator[Batch]]:
    """Torch's DataLoader; its workers start with each epoch and end with it, as they do unless told otherwise."""
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=WORKERS, pin_memory=device.type == "cuda")

    def epoch(number: int) -> Iterator[Batch]:
        for images, labels in loader:
            yield Batch(images.to(device, non_blocking=True), labels.to(device, non_blocking=True), labels)

    return epoch


def in_beton(
    images: Split | Listing,
    path: Path,
    form: BetonFormat = beton_writer.RAW_FORMAT,
    request: Request | None = None,
) -> EncodedImages:
    """The images in a .beton file, which is written."""
    beton_writer.write(path, [images], form)
    written = beton.read(path).listings()[""]
    return encoded_splits(written, written, request or Request())[0]
