"""Mixed images by mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019), around any pipeline. B batch, H, W."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from engine.kernels.philox import Stream, random_words
from engine.pipelines.base import Batch, Mixture, Pipeline
from engine.pipelines.sampling import SampledPipeline, Sampling

# The words of a sample, of `Stream.MIX`.
_PARTNER, _KIND, _SHARE, _ROW, _COLUMN = range(5)


@dataclass(frozen=True)
class Mixing:
    """mixup, cutmix: parameter a of the Beta(a, a) that the share of an image is drawn from; 0: not used.

    Where both are used, each image draws one of them, either as likely.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __bool__(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class PairSampling(Sampling):
    """Batches of another sampling, whose samples are followed by as many partners, one for each.

    A partner is any sample of the epoch, a function of (seed, epoch, sample).
    """

    @property
    def images_per_rank(self) -> int:
        """Images that a rank loads for a full batch."""
        return 2 * super().images_per_rank

    def batches(self, epoch: int, start_step: int = 0) -> list[Tensor]:
        """The samples of this rank in each step from start_step on, and their partners."""
        order_N = self.samples(epoch)

        def partners(sample_B: Tensor) -> Tensor:
            return order_N[_scaled(_words(self.seed, epoch, sample_B)[:, _PARTNER], len(order_N))]

        return [torch.cat((own_B, partners(own_B))) for own_B in self.divided(order_N, start_step)]


class MixingPipeline(SampledPipeline):
    """Batches of mixed images, each of a sample of the batch and its partner.

    mixup: s x + (1 - s) x', with s ~ Beta(a, a). CutMix: x, but x' in a box of (1 - s) H W around a point drawn
    evenly, as far as it lies in the image, and s the part of x that is left.

    pairs: a pipeline of the same data by `PairSampling`, each image cropped and flipped as it is without mixing.
    sampling: that of the samples. shape: H, W. All is a function of (seed, epoch, sample).
    """

    def __init__(
        self, pairs: Pipeline, sampling: Sampling, mixing: Mixing, *, num_classes: int, shape: tuple[int, int]
    ) -> None:
        super().__init__(sampling)
        self._pairs, self._mixing = pairs, mixing
        self._num_classes, self._shape = num_classes, shape

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from start_step on, of this rank; one without samples is empty."""
        batches = self._sampling.batches(epoch, start_step)
        if not batches:
            return
        draws_N = _draws(self._mixing, self._sampling.seed, epoch, torch.cat(batches), self._shape)
        draws: list[Tensor] = []
        for number, pairs in enumerate(self._pairs.epoch(epoch, start_step)):
            if not draws:  # one copy for the whole epoch
                draws = list(draws_N.to(pairs.x_nat.device).split([len(own_B) for own_B in batches]))
            with record_function("mix"):
                yield _mixed(pairs, draws[number], self._num_classes)

    def close(self) -> None:
        """End the epochs that were left before their end, and their threads."""
        self._pairs.close()


def _draws(mixing: Mixing, seed: int, epoch: int, sample_N: Tensor, shape: tuple[int, int]) -> Tensor:
    """Share of each sample, and the box of its partner: top, bottom, left, right, or zeros; float64 (N, 5)."""
    from scipy.special import betaincinv

    words = _words(seed, epoch, sample_N)
    has_box_N = words[:, _KIND] >> 31 > 0
    if not (mixing.mixup and mixing.cutmix):
        has_box_N = torch.full_like(has_box_N, mixing.cutmix > 0)
    a_N = torch.where(has_box_N, mixing.cutmix, mixing.mixup).double()
    u_N = (words[:, _SHARE].double() + 0.5) * 2.0**-32
    share_N = torch.from_numpy(betaincinv(a_N.numpy(), a_N.numpy(), u_N.numpy()))
    box = []
    for size, word in zip(shape, (_ROW, _COLUMN), strict=True):
        centre_N = _scaled(words[:, word], size)
        half_N = (0.5 * (1 - share_N).sqrt() * size).long()
        box += [(centre_N - half_N).clamp_min(0), (centre_N + half_N).clamp_max(size)]
    top_N, bottom_N, left_N, right_N = box = [(side_N * has_box_N).double() for side_N in box]
    outside_N = 1 - (bottom_N - top_N) * (right_N - left_N) / (shape[0] * shape[1])
    return torch.stack((torch.where(has_box_N, outside_N, share_N), *box), dim=1)


def _mixed(pairs: Batch, draws_B5: Tensor, num_classes: int) -> Batch:
    """The batch of B mixed images of B samples and, after them, their partners."""
    size = len(draws_B5)
    x_own, x_other = pairs.x_nat.split(size) if size else (pairs.x_nat, pairs.x_nat)
    share_B = draws_B5[:, 0].to(x_own.dtype)
    top, bottom, left, right = draws_B5[:, 1:].t()[..., None, None, None]
    row_H1 = torch.arange(x_own.shape[2], device=x_own.device)[:, None]
    column_W = torch.arange(x_own.shape[3], device=x_own.device)
    in_box = (row_H1 >= top) & (row_H1 < bottom) & (column_W >= left) & (column_W < right)
    has_box = bottom > 0
    weight = torch.where(has_box, (~in_box).to(x_own.dtype), share_B[:, None, None, None])
    x_nat = torch.lerp(x_other, x_own, weight).contiguous(memory_format=torch.channels_last)
    mixture = Mixture(pairs.labels[size:], share_B, num_classes)
    return Batch(x_nat, pairs.labels[:size], pairs.sample[:size], mixture)


def _words(seed: int, epoch: int, sample_B: Tensor) -> Tensor:
    return random_words(seed, Stream.MIX, epoch, sample_B, _COLUMN + 1)


def _scaled(word: Tensor, count: int) -> Tensor:
    """floor(word count / 2**32): evenly one of 0 to count - 1."""
    return word * count >> 32
