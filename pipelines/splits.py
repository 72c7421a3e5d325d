"""Labelled images, and stratified parts of them: every class keeps its share."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from engine.common.lookup import check_known, look_up
from engine.config import LARGEST_IMAGE
from engine.kernels.philox import Stream, random_words

SPLIT_NAMES = ("train", "test")
Progress = Callable[[str, int, int], None]
"""Called as images are decoded with "train" or "test", the images done, and the images of that split."""

# Parts are chosen by the shuffle's words of epochs that no run reaches.
_VALIDATION_EPOCH = 2**32 - 1
_LIMIT_EPOCH = 2**32 - 2


class Indexable(Protocol):
    """Images that are got by their indices."""

    def __getitem__(self, sample_B: Tensor, /) -> Tensor:
        """uint8 BHWC."""


class Splittable(Protocol):
    """Images with labels, in memory or not, from which a subset can be taken."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> Tensor:
        """int64 N."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label."""

    def take(self: AnySplittable, index: Tensor) -> AnySplittable:
        """The images of those indices, in that order."""


AnySplittable = TypeVar("AnySplittable", bound=Splittable)


@dataclass(frozen=True, eq=False)
class Split:
    """images: uint8 NHWC; labels: int64 N; class_names: the name of each label.

    skipped: the files that were left out because they cannot be read.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    any_size: ClassVar[bool] = False  # views are of the whole images

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int]:
        """H and W of a view."""
        return self.images.shape[1], self.images.shape[2]

    def where(self, sample: int) -> str:
        """Name of a sample in a message."""
        return f"image {sample}"

    def take(self, index: Tensor) -> Split:
        """The images of those indices, in that order."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def update(self, digest: hashlib._Hash) -> None:
        """Add shapes, images and labels to a hash."""
        digest.update(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy())
        digest.update(self.labels.contiguous().numpy())


# on_bad_image -> an image that cannot be read is left out.
SKIPS = {"fail": False, "skip": True}
# resident -> share of the free memory that decoded images may take.
RESIDENT_SHARES = {"always": math.inf, "never": 0.0, "if it fits": 0.5}


@dataclass(frozen=True)
class Request:
    """Request for a data set: how many of its images, of what size, and where they are kept.

    limit_train, limit_test: at most so many images; seed: which ones. progress: called as images are decoded.
    on_bad_image: "fail" at an image that cannot be read, or "skip" it. image_size: of the views, crops of images
    of any size; None: all images are of one size. resident: images of one size are decoded into memory "always",
    "never", or "if it fits" into half of what is free. only_test: no training images are read, nor need be there.
    whole_if_flat: then a flat folder of classes is of test images only, see `Wanted` of `reading.folder`.
    """

    limit_train: int | None = None
    limit_test: int | None = None
    seed: int = 0
    progress: Progress | None = None
    on_bad_image: str = "fail"
    image_size: int | None = None
    resident: str = "always"
    only_test: bool = False
    whole_if_flat: bool = False

    def __post_init__(self) -> None:
        check_known("on_bad_image", self.on_bad_image, SKIPS)
        check_known("resident", self.resident, RESIDENT_SHARES)
        if self.image_size is not None and not 1 <= self.image_size <= LARGEST_IMAGE:
            raise ValueError(f"image_size must be 1 to {LARGEST_IMAGE:,}, got {self.image_size}")

    @property
    def skips_bad_images(self) -> bool:
        """True if images that cannot be read are left out."""
        return look_up("on_bad_image", self.on_bad_image, SKIPS)

    @property
    def resident_share(self) -> float:
        """Share of the free memory that images may take; 0: they stay in their files."""
        return look_up("resident", self.resident, RESIDENT_SHARES)

    def of(self, name: str, images: AnySplittable) -> AnySplittable:
        """The images wanted of the split "train" or "test", without a copy where that is all of them."""
        limit = look_up("part", name, dict(zip(SPLIT_NAMES, (self.limit_train, self.limit_test), strict=True)))
        if name == "train" and self.only_test:
            return images.take(torch.arange(0))
        if limit is None or limit >= len(images):
            return images
        return images.take(limited(images.labels, limit, self.seed, f"limit_{name}"))


def split_validation(split: AnySplittable, fraction: float, seed: int = 0) -> tuple[AnySplittable, AnySplittable]:
    """(train, validation): round(fraction N) images held out, every class by its share and at least one of each.

    Raises ValueError where fraction is not in [0,1) or a class has a single image.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"validation: a fraction from 0 to below 1 is expected, got {fraction:g}")
    held_N = torch.zeros(len(split), dtype=torch.bool)
    if fraction > 0:
        sizes = _class_sizes(split.labels)
        for label, size in sizes.items():
            if size == 1:
                name = split.class_names[label]
                raise ValueError(f"validation: class {name!r} has a single image, too few to hold one out; give 0")
        most = {label: size - 1 for label, size in sizes.items()}
        total = min(max(round(fraction * len(split)), len(sizes)), sum(most.values()))
        counts = _apportion(total, {label: fraction * size for label, size in sizes.items()}, most)
        held_N[_choose(split.labels, counts, seed, _VALIDATION_EPOCH)] = True
    return split.take((~held_N).nonzero()[:, 0]), split.take(held_N.nonzero()[:, 0])


def balanced(split: AnySplittable, size: int) -> AnySplittable:
    """At most `size` images, chosen as `limited` does."""
    return split.take(limited(split.labels, size, 0, "size"))


def limited(labels_N: Tensor, limit: int | None, seed: int, argument: str) -> Tensor:
    """Ascending indices of `limit` samples, of every class as equally many as there are; None: of all samples.

    A limit below the number of classes takes one of each of the first ones.
    Raises ValueError, naming the argument, where the limit is below 1.
    """
    if limit is None or limit >= len(labels_N):
        return torch.arange(len(labels_N))
    sizes = _class_sizes(labels_N)
    if limit < 1:
        raise ValueError(f"{argument} must be 1 or more, got {limit}")
    sizes = dict(list(sizes.items())[:limit])
    counts = _apportion(limit, dict.fromkeys(sizes, limit / len(sizes)), sizes)
    return _choose(labels_N, counts, seed, _LIMIT_EPOCH)


def _class_sizes(labels_N: Tensor) -> dict[int, int]:
    """Images of each label that occurs."""
    return {label: size for label, size in enumerate(labels_N.bincount().tolist()) if size}


def _apportion(total: int, shares: dict[int, float], most: dict[int, int]) -> dict[int, int]:
    """Counts from 1 to `most` that sum to `total` and follow the shares; the largest remainders round up."""
    counts = {label: min(max(int(share), 1), most[label]) for label, share in shares.items()}
    missing = total - sum(counts.values())
    step = 1 if missing > 0 else -1

    def changeable(label: int) -> bool:
        return counts[label] < most[label] if step > 0 else counts[label] > 1

    # The class that is furthest from its share comes first; of several, the first one.
    order = {label: rank for rank, label in enumerate(counts)}
    waiting = [
        (step * (counts[label] - shares[label]), order[label], label) for label in counts if changeable(label)
    ]
    heapq.heapify(waiting)
    for _ in range(abs(missing)):
        _, rank, label = heapq.heappop(waiting)
        counts[label] += step
        if changeable(label):
            heapq.heappush(waiting, (step * (counts[label] - shares[label]), rank, label))
    return counts


def _choose(labels_N: Tensor, counts: dict[int, int], seed: int, epoch: int) -> Tensor:
    """Ascending indices of counts[label] random samples of each label."""
    sample_N = torch.arange(len(labels_N))
    order_N = random_words(seed, Stream.SHUFFLE, epoch, sample_N, 1)[:, 0].argsort(stable=True)
    by_class_N = order_N[labels_N[order_N].argsort(stable=True)]
    sizes_C = labels_N.bincount()
    wanted_C = torch.zeros_like(sizes_C)
    wanted_C[list(counts)] = torch.tensor(list(counts.values()))
    labels_N = labels_N[by_class_N]
    place_N = sample_N - (sizes_C.cumsum(0) - sizes_C)[labels_N]  # within its class
    return by_class_N[place_N < wanted_C[labels_N]].sort().values
