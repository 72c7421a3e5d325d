"""`random_start`, uniform in an L-inf ball, as one Triton kernel. A program writes a block of a sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.philox import Stream

_BLOCK = 256  # counters, of four numbers each
_STREAM = tl.constexpr(int(Stream.ATTACK_START))


def random_start(noise: Tensor, sample_B: Tensor, epsilon: float, seed: int, counter: int | Tensor) -> None:
    """`reference.random_start`, the uniform start in an L-inf ball, into dense float32."""
    batch, channels = noise.shape[:2]
    pixels = noise[0, 0].numel() if batch else 0
    if not batch * channels * pixels:
        return
    counters = triton.cdiv(channels * pixels, 4)
    with torch.cuda.device_of(noise):
        _random_start[(batch, triton.cdiv(counters, _BLOCK))](
            noise,
            sample_B,
            epsilon,
            seed,
            counter,
            CHANNELS=channels,
            PIXELS=pixels,
            CHANNELS_LAST=not noise.is_contiguous(),
            COUNTER_ON_DEVICE=isinstance(counter, Tensor),
            BLOCK=_BLOCK,
            num_warps=4,
        )


# many parameters: pointers, numbers and constants of a kernel
@triton.jit(do_not_specialize=["seed", "counter"])
def _random_start(
    noise_ptr,
    sample_ptr,
    epsilon,
    seed: tl.uint64,
    counter,  # a number, or a pointer to one
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COUNTER_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SIZE: tl.constexpr = CHANNELS * PIXELS
    row = tl.program_id(0).to(tl.int64)
    sample = tl.load(sample_ptr + row).to(tl.uint32)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if COUNTER_ON_DEVICE:
        counter = tl.load(counter)
    words = tl.philox(seed, block.to(tl.uint32), sample, counter.to(tl.uint32), _STREAM)
    for k in tl.static_range(4):
        number = 4 * block + k
        uniform = (words[k] >> 8).to(tl.float32) * (1.0 / (1 << 24))  # exact, as 2 u - 1 is
        at = number % PIXELS * CHANNELS + number // PIXELS if CHANNELS_LAST else number
        tl.store(noise_ptr + row * SIZE + at, epsilon * (2.0 * uniform - 1.0), mask=number < SIZE)
