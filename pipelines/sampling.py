"""Order of the samples, and their division into batches and among ranks, shared by all pipelines.

A pure function of (seed, epoch): nothing has to be saved for a resume, and the batches of N ranks, put together,
are those of one. N data set, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.common.lookup import check_known, look_up
from engine.common.numbers import ceil_div
from engine.kernels.philox import Stream, random_words

_BLOCK = 256  # neighbours on the disk that quasi-random order reads together
_BLOCKS_PER_WINDOW = 16


def _random(sample_N: Tensor, seed: int, epoch: int) -> Tensor:
    return _words(sample_N, seed, epoch).argsort(stable=True)  # equal words keep the order of the samples


def _quasi_random(sample_N: Tensor, seed: int, epoch: int) -> Tensor:
    """Shuffle whole blocks, by the words of their first samples; then the samples within a window of blocks."""
    word_N = _words(sample_N, seed, epoch)
    blocks = word_N[::_BLOCK].argsort(stable=True)
    block_N = torch.empty_like(blocks)
    block_N[blocks] = torch.arange(len(blocks))
    window_N = block_N[sample_N // _BLOCK] // _BLOCKS_PER_WINDOW
    return (window_N << 32 | word_N).argsort(stable=True)


def _sequential(sample_N: Tensor, seed: int, epoch: int) -> Tensor:
    return sample_N


def _words(sample_N: Tensor, seed: int, epoch: int) -> Tensor:
    return random_words(seed, Stream.SHUFFLE, epoch, sample_N, 1)[:, 0]


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
class Sampling:
    """The batches of a split.

    batch_size: of all ranks together, a multiple of their number. order: "random"; "quasi-random", which shuffles
    within windows of neighbouring samples, for data that are read from a disk; or "sequential".
    last: what becomes of a batch that the samples do not fill: "keep" it as it is, its samples dealt to the ranks
    as evenly as possible; "drop" it; "pad" it with the first samples of the epoch, which are then seen twice.
    Raises ValueError for what does not fit together.
    """

    num_samples: int
    batch_size: int
    seed: int = 0
    order: str = "random"
    last: str = "keep"
    shard: Shard = Shard()

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
        if not last.counts and self.num_samples < self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} exceeds the {self.num_samples} images: all would be dropped"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        whole, left = divmod(self.num_samples, self.batch_size)
        return whole + (left > 0 and look_up("last", self.last, LAST_BATCHES).counts)

    def size_of(self, step: int) -> int:
        """Images in that batch of an epoch, of all ranks together; one that is padded counts whole."""
        left = self.num_samples - step * self.batch_size
        return (
            self.batch_size if look_up("last", self.last, LAST_BATCHES).is_filled else min(self.batch_size, left)
        )

    def samples(self, epoch: int) -> Tensor:
        """The epoch's samples in the order of all ranks together: int64 N."""
        return look_up("order", self.order, ORDERS)(torch.arange(self.num_samples), self.seed, epoch)

    def batches(self, epoch: int, start_step: int = 0) -> list[Tensor]:
        """The samples of this rank in each step from start_step on."""
        return [self._of_this_rank(global_B) for global_B in self._global_batches(epoch)[start_step:]]

    def _global_batches(self, epoch: int) -> list[Tensor]:
        order_N = self.samples(epoch)
        if look_up("last", self.last, LAST_BATCHES).is_filled:
            missing = self.steps_per_epoch * self.batch_size - self.num_samples
            order_N = torch.cat((order_N, order_N.repeat(ceil_div(missing, self.num_samples))[:missing]))
        return list(order_N.split(self.batch_size)[: self.steps_per_epoch])

    def _of_this_rank(self, global_B: Tensor) -> Tensor:
        return global_B.tensor_split(self.shard.world)[self.shard.rank]


def to_device(batches: list[Tensor], device: torch.device | str) -> list[Tensor]:
    """The batches on that device, by one copy for all."""
    sizes = [len(sample_B) for sample_B in batches]
    return list(torch.cat(batches).to(device).split(sizes)) if batches else []
