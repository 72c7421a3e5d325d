"""Labelled images in memory, and stratified parts of them: every class keeps its share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.philox import Stream, random_words

Progress = Callable[[str, int, int], None]
"""Called as images are decoded with "train" or "test", the images done, and the images of that split."""

# Parts are chosen by the shuffle's words of epochs that no run reaches.
_VALIDATION_EPOCH = 2**32 - 1
_LIMIT_EPOCH = 2**32 - 2


@dataclass(frozen=True, eq=False)
class Split:
    """images: uint8 NHWC; labels: int64 N; class_names: the name of each label."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Split:
        """The images of those indices, in that order."""
        return Split(self.images[index], self.labels[index], self.class_names)


@dataclass(frozen=True)
class Request:
    """What is asked of a data set: at most so many images, which ones (seed), and whom to tell of the progress."""

    limit_train: int | None = None
    limit_test: int | None = None
    seed: int = 0
    progress: Progress | None = None

    def select(self, part: str, labels_N: Tensor) -> Tensor:
        """Indices of the images wanted of "train" or "test"."""
        limit = self.limit_train if part == "train" else self.limit_test
        return limited(labels_N, limit, self.seed, f"limit_{part}")


def split_validation(split: Split, fraction: float, seed: int = 0) -> tuple[Split, Split]:
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


def balanced(split: Split, size: int) -> Split:
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
