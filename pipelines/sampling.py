"""Order of the samples, and their division into batches and among ranks, shared by all pipelines.

A pure function of (seed, epoch): nothing has to be saved for a resume, and the batches of N ranks, put together,
are those of one. N data set, M extra images, T both in an epoch, B batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from engine.common.lookup import check_known, look_up
from engine.common.numbers import ceil_div
from engine.kernels.philox import Stream, random_words

_BLOCK = 256  # neighbours on the disk that quasi-random order reads together
_BLOCKS_PER_WINDOW = 16
_LARGEST_DENOMINATOR = 10**6  # of a fraction of extra images, which then counts exactly


def _random(word_N: Tensor) -> Tensor:
    return word_N.argsort(stable=True)  # equal words keep the order of the samples


def _quasi_random(word_N: Tensor) -> Tensor:
    """Shuffle whole blocks, by the words of their first samples; then the samples within a window of blocks."""
    blocks = word_N[::_BLOCK].argsort(stable=True)
    block_N = torch.empty_like(blocks)
    block_N[blocks] = torch.arange(len(blocks))
    window_N = block_N[_sequential(word_N) // _BLOCK] // _BLOCKS_PER_WINDOW
    return (window_N << 32 | word_N).argsort(stable=True)


def _sequential(word_N: Tensor) -> Tensor:
    return torch.arange(len(word_N))


ORDERS = {"random": _random, "quasi-random": _quasi_random, "sequential": _sequential}


class LastBatch(NamedTuple):
    """Treatment of a batch that the samples do not fill: it counts as a step or not, and is filled up or not."""

    counts: bool
    is_filled: bool


LAST_BATCHES = {"keep": LastBatch(True, False), "drop": LastBatch(False, False), "pad": LastBatch(True, True)}


@dataclass(frozen=True)
class Shard:
    """One of `world` processes that share each batch. here: how many of them are on this machine, None for all."""

    rank: int = 0
    world: int = 1
    here: int | None = None


@dataclass(frozen=True)
class Extra:
    """Extra images: how many there are, and their fraction of each batch, between 0 and 1.

    Raises ValueError for a fraction or a number that is none.
    """

    num_images: int
    fraction: float

    def __post_init__(self) -> None:
        if not (0 < self.fraction < 1 and 0 < self._ratio < 1):
            raise ValueError(f"extra_fraction must be between 0 and 1, got {self.fraction:g}")
        if self.num_images < 1:
            raise ValueError("extra_data: at least one image is needed, got none")

    @property
    def _ratio(self) -> Fraction:
        return Fraction(self.fraction).limit_denominator(_LARGEST_DENOMINATOR)

    def beside(self, num_samples: int) -> int:
        """Extra images of an epoch of so many others: round(N f / (1 - f))."""
        return math.floor(num_samples * self._ratio / (1 - self._ratio) + Fraction(1, 2))

    def places(self, size: int) -> Tensor:
        """True where an image of an epoch is an extra one, spread evenly: of the first t, round(f t); bool T."""
        above, below = self._ratio.numerator, self._ratio.denominator
        until_T = (2 * above * torch.arange(size + 1) + below) // (2 * below)
        return until_T.diff() > 0


@dataclass(frozen=True)
class Sampling:
    """The batches of a split, and of extra images beside it.

    num_samples: of the split. batch_size: of all ranks together, a multiple of their number.
    order: "random"; "quasi-random", which shuffles within windows of neighbouring samples, for data that are read
    from a disk; or "sequential".
    last: what becomes of a batch that the samples do not fill: "keep" it as it is, its samples dealt to the ranks
    as evenly as possible; "drop" it; "pad" it with the first samples of the epoch, which are then seen twice.
    extra: images with the indices N to N + M - 1. An epoch has all N samples of the split, each once, and
    round(N f / (1 - f)) extra ones, evenly between them: of any b neighbours, a batch or a rank's part of it, f b
    are extra, rounded up or down. The epochs walk on through all M, each once, then again in a new order.
    Raises ValueError for what does not fit together.
    """

    num_samples: int
    batch_size: int
    seed: int = 0
    order: str = "random"
    last: str = "keep"
    shard: Shard = Shard()
    extra: Extra | None = None

    def __post_init__(self) -> None:
        check_known("order", self.order, ORDERS)
        last = look_up("last", self.last, LAST_BATCHES)
        if self.num_samples < 1:
            raise ValueError("images: a pipeline needs at least one image, got none")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}")
        if self.batch_size % self.shard.world:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of the {self.shard.world} processes"
            )
        if not last.counts and self.epoch_size < self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} exceeds the {self.epoch_size} images: all would be dropped"
            )

    @property
    def num_images(self) -> int:
        """Images of the split and extra ones, N + M."""
        return self.num_samples + (self.extra.num_images if self.extra else 0)

    @property
    def epoch_size(self) -> int:
        """Images of one epoch, extra ones included."""
        return self.num_samples + (self.extra.beside(self.num_samples) if self.extra else 0)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        whole, left = divmod(self.epoch_size, self.batch_size)
        return whole + (left > 0 and look_up("last", self.last, LAST_BATCHES).counts)

    @property
    def images_per_rank(self) -> int:
        """Images that a rank loads for a full batch."""
        return self.batch_size // self.shard.world

    def size_of(self, step: int) -> int:
        """Images in that batch of an epoch, of all ranks together; one that is padded counts whole."""
        left = self.epoch_size - step * self.batch_size
        return (
            self.batch_size if look_up("last", self.last, LAST_BATCHES).is_filled else min(self.batch_size, left)
        )

    def samples(self, epoch: int) -> Tensor:
        """The epoch's samples in the order of all ranks together: int64 T."""
        order_N = self._shuffled(self.num_samples, Stream.SHUFFLE, epoch)
        if self.extra is None:
            return order_N
        is_extra_T = self.extra.places(self.epoch_size)
        order_T = torch.empty(len(is_extra_T), dtype=torch.int64)
        order_T[~is_extra_T] = order_N
        order_T[is_extra_T] = self.num_samples + self._extra_samples(self.extra, epoch)
        return order_T

    def _extra_samples(self, extra: Extra, epoch: int) -> Tensor:
        """The epoch's part of all extra images, repeated without end, each time in an order of its own."""
        count = extra.beside(self.num_samples)
        start, end, size = epoch * count, (epoch + 1) * count, extra.num_images
        if not count:
            return torch.empty(0, dtype=torch.int64)
        rounds = range(start // size, ceil_div(end, size))
        order_M = torch.cat([self._shuffled(size, Stream.EXTRA, number) for number in rounds])
        return order_M[start - rounds.start * size :][:count]

    def _shuffled(self, count: int, stream: Stream, epoch: int) -> Tensor:
        words = random_words(self.seed, stream, epoch, torch.arange(count), 1)[:, 0]
        return look_up("order", self.order, ORDERS)(words)

    def batches(self, epoch: int, start_step: int = 0) -> list[Tensor]:
        """The samples of this rank in each step from start_step on."""
        return self.divided(self.samples(epoch), start_step)

    def divided(self, order_T: Tensor, start_step: int = 0) -> list[Tensor]:
        """`batches` of an epoch in that order."""
        if look_up("last", self.last, LAST_BATCHES).is_filled:
            missing = self.steps_per_epoch * self.batch_size - len(order_T)
            order_T = torch.cat((order_T, order_T.repeat(ceil_div(missing, len(order_T)))[:missing]))
        steps = order_T.split(self.batch_size)[start_step : self.steps_per_epoch]
        return [global_B.tensor_split(self.shard.world)[self.shard.rank] for global_B in steps]


class SampledPipeline:
    """Sizes of a pipeline, which are those of its sampling."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling

    @property
    def num_samples(self) -> int:
        """Images of one epoch, of all ranks together."""
        return self._sampling.epoch_size

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        return self._sampling.steps_per_epoch


def to_device(batches: list[Tensor], device: torch.device | str) -> list[Tensor]:
    """The batches on that device, by one copy for all."""
    sizes = [len(sample_B) for sample_B in batches]
    return list(torch.cat(batches).to(device).split(sizes)) if batches else []
