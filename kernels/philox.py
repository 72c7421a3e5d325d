"""Philox-4x32-10, a counter-based random generator (Salmon et al., SC 2011, "Random123").

A number is a pure function of (seed, counter): there is no state to save, and a sample's numbers do not depend on
the batch, the device or the number of processes they are drawn in.
Each use of randomness has a `Stream` of its own.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Stream(enum.IntEnum):
    """Use of the numbers, the last word of the counter; two streams of one seed are independent."""

    AUGMENT = 0
    ATTACK_START = 1
    SHUFFLE = 2
    ATTACK_SCALE = 3
    MIX = 4
    TRIVIAL_AUGMENT = 5
    COLOUR_JITTER = 6
    EXTRA = 7
    DROPOUT = 8
    APGD_CE = 9
    APGD_DLR = 10
    APGD_T = 11
    SQUARE = 12
    FAST = 13


def random_words(seed: int, stream: Stream, epoch: int | Tensor, sample_B: Tensor, count: int) -> Tensor:
    """Uniform 32-bit words, one row per sample.

    The counter of word 4 j + w of a sample is (j, sample, epoch, stream), and its key the seed.

    seed: 0 <= seed < 2**64. epoch: 0 <= epoch < 2**32, or int64 on the device of sample_B: a scalar, or (B, 1).
    sample_B: int64, of which the low 32 bits count.
    Returns int64 of shape (B, count) with values in [0, 2**32), on the device of sample_B.
    """
    device = sample_B.device
    block_J = torch.arange((count + 3) // 4, dtype=torch.int64, device=device)
    c0 = block_J.expand(sample_B.shape[0], -1)
    c1 = (sample_B & _MASK)[:, None].expand_as(c0)
    c2 = epoch.expand_as(c0) if isinstance(epoch, Tensor) else torch.full_like(c0, epoch)
    c3 = torch.full_like(c0, int(stream))
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        # The 64-bit products wrap in int64, but their bits are right: shift, then mask.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=2).flatten(1)[:, :count]


def uniform(seed: int, stream: Stream, epoch: int | Tensor, sample_B: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2**-24 and so exact in fp32; float32 of shape (B, count)."""
    return (random_words(seed, stream, epoch, sample_B, count) >> 8).to(torch.float32) * 2.0**-24


def normal(seed: int, stream: Stream, epoch: int | Tensor, sample_B: Tensor, count: int) -> Tensor:
    """Standard normal numbers by Box and Muller's transform; float32 of shape (B, count)."""
    half = (count + 1) // 2
    u_BN = uniform(seed, stream, epoch, sample_B, 2 * half)
    radius = (-2 * torch.log1p(-u_BN[:, :half])).sqrt()  # 1 - u lies in (0, 1]: the logarithm is finite
    angle = 2 * torch.pi * u_BN[:, half:]
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :count]
