"""Labelled images, and stratified parts of them: every class keeps its share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from engine.kernels.philox import Stream, random_words

Progress = Callable[[str, int, int], None]
"""Called as images are decoded with "train" or "test", the images done, and the images of that split."""

# Parts are chosen by the shuffle's words of epochs that no run reaches.
_VALIDATION_EPOCH = 2**32 - 1
_LIMIT_EPOCH = 2**32 - 2


class Indexable(Protocol):
    """Images that are got by their indices."""

    def __getitem__(self, sample_B: Tensor, /) -> Tensor:
        """uint8 BHWC."""


class Part(Protocol):
    """Labelled images, in memory or not, of which parts can be taken."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> Tensor:
        """int64 N."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label."""

    def take(self: AnyPart, index: Tensor) -> AnyPart:
        """The images of those indices, in that order."""


AnyPart = TypeVar("AnyPart", bound=Part)


@dataclass(frozen=True, eq=False)
class Split:
    """images: uint8 NHWC; labels: int64 N; class_names: the name of each label.

    skipped: the files that were left out because they cannot be read.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    windows: ClassVar[bool] = False  # views are of the whole images

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int]:
        """H and W of a view."""
        return self.images.shape[1], self.images.shape[2]

    def take(self, index: Tensor) -> Split:
        """The images of those indices, in that order."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def update(self, digest: hashlib._Hash) -> None:
        """Add shapes, images and labels to a hash."""
        digest.update(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy())
        digest.update(self.labels.contiguous().numpy())


@dataclass(frozen=True)
class Request:
    """What is asked of a data set.

    limit_train, limit_test: at most so many images; seed: which ones. progress: whom to tell. on_bad_image: "fail"
    at an image that cannot be read, or "skip" it. image_size: of the views that are cut from images of any size;
    None: all images are of one size. resident: whether images of one size are decoded into memory: "always",
    "never", or "if it fits" into half of what is free.
    """

    limit_train: int | None = None
    limit_test: int | None = None
    seed: int = 0
    progress: Progress | None = None
    on_bad_image: str = "fail"
    image_size: int | None = None
    resident: str = "always"

    def __post_init__(self) -> None:
        if self.on_bad_image not in ("fail", "skip"):
            raise ValueError(f"on_bad_image: {self.on_bad_image!r} is unknown; known are fail, skip")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be 1 or more, got {self.image_size}")

    def of(self, part: str, images: AnyPart) -> AnyPart:
        """The images wanted of "train" or "test"; all of them are not copied."""
        limit = self.limit_train if part == "train" else self.limit_test
        if limit is None or limit >= len(images):
            return images
        return images.take(limited(images.labels, limit, self.seed, f"limit_{part}"))


def split_validation(split: AnyPart, fraction: float, seed: int = 0) -> tuple[AnyPart, AnyPart]:
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


def balanced(split: AnyPart, size: int) -> AnyPart:
    """At most `size` images, of every class as equally many as there are. Raises ValueError as `limited` does."""
    return split.take(limited(split.labels, size, 0, "size"))


def limited(labels_N: Tensor, limit: int | None, seed: int, argument: str) -> Tensor:
    """Ascending indices of `limit` samples, of every class as equally many as there are; None: of all samples.

    Raises ValueError, naming the argument, where the limit is below the number of classes.
    """
    if limit is None or limit >= len(labels_N):
        return torch.arange(len(labels_N))
    sizes = _class_sizes(labels_N)
    if limit < len(sizes):
        raise ValueError(
            f"{argument}: at least one image of each of the {len(sizes)} classes is needed, got {limit}"
        )
    counts = _apportion(limit, dict.fromkeys(sizes, limit / len(sizes)), sizes)
    return _choose(labels_N, counts, seed, _LIMIT_EPOCH)


def _class_sizes(labels_N: Tensor) -> dict[int, int]:
    """Images of each label that occurs."""
    return {label: size for label, size in enumerate(labels_N.bincount().tolist()) if size}


def _apportion(total: int, shares: dict[int, float], most: dict[int, int]) -> dict[int, int]:
    """Counts from 1 to most that sum to total and follow the shares; the largest remainders round up."""
    counts = {label: min(max(int(share), 1), most[label]) for label, share in shares.items()}

    def remainder(label: int) -> float:
        return shares[label] - counts[label]

    while sum(counts.values()) < total:
        counts[max((label for label in counts if counts[label] < most[label]), key=remainder)] += 1
    while sum(counts.values()) > total:
        counts[min((label for label in counts if counts[label] > 1), key=remainder)] -= 1
    return counts


def _choose(labels_N: Tensor, counts: dict[int, int], seed: int, epoch: int) -> Tensor:
    """Ascending indices of counts[label] random samples of each label."""
    sample_N = torch.arange(len(labels_N))
    order_N = random_words(seed, Stream.SHUFFLE, epoch, sample_N, 1)[:, 0].argsort(stable=True)
    chosen = [order_N[labels_N[order_N] == label][:count] for label, count in counts.items()]
    return torch.cat(chosen).sort().values
