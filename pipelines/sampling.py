"""Which samples stand in which batch, on every rank: the order that all pipelines share.

A pure function of (seed, epoch): nothing has to be saved for a resume, and the batches of N ranks, put together,
are those of one. N data set, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.philox import Stream, random_words

_BLOCK = 256  # neighbours on the disk that quasi-random order reads together
_BLOCKS_PER_WINDOW = 16


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
        for name, known in (
            ("order", ("random", "quasi-random", "sequential")),
            ("last", ("keep", "drop", "pad")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is unknown; known are {', '.join(known)}")
        if self.num_samples < 1:
            raise ValueError("images: a pipeline needs at least one image, got none")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}")
        if self.batch_size % self.shard.world:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of the {self.shard.world} processes"
            )
        if self.last == "drop" and self.num_samples < self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} exceeds the {self.num_samples} images: all would be dropped"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        if self.last == "drop":
            return self.num_samples // self.batch_size
        return -(-self.num_samples // self.batch_size)

    def size_of(self, step: int) -> int:
        """Images in that batch of an epoch, of all ranks together; one that is padded counts whole."""
        left = self.num_samples - step * self.batch_size
        return self.batch_size if self.last == "pad" else min(self.batch_size, left)

    def samples(self, epoch: int) -> Tensor:
        """The epoch's samples in the order of all ranks together: int64 N."""
        sample_N = torch.arange(self.num_samples)
        if self.order == "sequential":
            return sample_N
        word_N = random_words(self.seed, Stream.SHUFFLE, epoch, sample_N, 1)[:, 0]
        if self.order == "random":  # equal words keep the order of the samples
            return word_N.argsort(stable=True)
        # First whole blocks are shuffled, by the words of their first samples; then samples within a window.
        blocks = word_N[::_BLOCK].argsort(stable=True)
        block_N = torch.empty_like(blocks)
        block_N[blocks] = torch.arange(len(blocks))
        window_N = block_N[sample_N // _BLOCK] // _BLOCKS_PER_WINDOW
        return (window_N << 32 | word_N).argsort(stable=True)

    def batches(self, epoch: int, start_step: int = 0) -> list[Tensor]:
        """The samples of this rank in each step from start_step on."""
        return [self._of_this_rank(whole_B) for whole_B in self._whole(epoch)[start_step:]]

    def _whole(self, epoch: int) -> list[Tensor]:
        order_N = self.samples(epoch)
        if self.last == "pad":
            missing = self.steps_per_epoch * self.batch_size - self.num_samples
            order_N = torch.cat((order_N, order_N.repeat(-(-missing // self.num_samples))[:missing]))
        return list(order_N.split(self.batch_size)[: self.steps_per_epoch])

    def _of_this_rank(self, whole_B: Tensor) -> Tensor:
        return whole_B.tensor_split(self.shard.world)[self.shard.rank]


def moved(batches: list[Tensor], device: torch.device | str) -> list[Tensor]:
    """The batches on that device, by one copy."""
    sizes = [len(sample_B) for sample_B in batches]
    return list(torch.cat(batches).to(device).split(sizes)) if batches else []
