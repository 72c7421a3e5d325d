"""`pgd_update` as Triton kernels: in L-inf one flat pass over memory, in L2 one program per sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_NAN = tl.constexpr(tl.PropagateNan.ALL)  # minima and maxima propagate NaN, as those of torch do


def pgd_update(
    x_adv: Tensor, grad: Tensor, x_nat: Tensor, l2: bool, epsilon: float, step_size: float, counts: Tensor | None
) -> None:
    """`reference.pgd_update` of dense tensors of one layout: images float32, grad float32, float16 or bfloat16."""
    if not x_adv.numel():
        return
    tensors = (x_adv, grad, x_nat, counts)
    with torch.cuda.device_of(x_adv):
        if l2:
            size = x_adv.numel() // len(x_adv)
            block, num_warps = blocks(size)
            _l2[(len(x_adv),)](*tensors, epsilon, step_size, SIZE=size, BLOCK=block, num_warps=num_warps)
        else:
            grid = (triton.cdiv(x_adv.numel(), _BLOCK),)
            _linf[grid](*tensors, epsilon, step_size, x_adv.numel(), BLOCK=_BLOCK, num_warps=4)


def blocks(size: int) -> tuple[int, int]:
    """Size of the blocks of a sample, one where registers hold the whole sample, and number of warps."""
    block = triton.next_power_of_2(size)
    if block > 16384:
        block = 4096
    return block, min(max(block // 512, 1), 16)


@triton.jit
def _linf(x_ptr, grad_ptr, nat_ptr, counts_ptr, epsilon, step_size, size, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    grad = _load(grad_ptr, offset, inside)
    x, nat = _load(x_ptr, offset, inside), _load(nat_ptr, offset, inside)
    tl.store(x_ptr + offset, moved(x, grad, nat, epsilon, step_size), mask=inside)
    if counts_ptr is not None:
        count(counts_ptr, grad, inside)


@triton.jit
def moved(x, grad, nat, epsilon, step_size):
    """Images after a step in L-inf."""
    # Comparisons with NaN are false: its pixel stays.
    x += tl.where(grad > 0, step_size, tl.where(grad < 0, -step_size, 0.0))
    x = tl.minimum(tl.maximum(x, nat - epsilon, _NAN), nat + epsilon, _NAN)
    return tl.clamp(x, 0.0, 1.0, _NAN)


@triton.jit
def count(counts_ptr, grad, inside):
    """Add the zero and the non-finite entries of a gradient to the counts; outside it is 0."""
    _add(counts_ptr, _zeros(grad, inside), _nonfinites(grad))


@triton.jit
def _l2(x_ptr, grad_ptr, nat_ptr, counts_ptr, epsilon, step_size, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One sample in four passes, of which the compiler makes one where a block holds the whole sample."""
    start = tl.program_id(0).to(tl.int64) * SIZE
    x_ptr, grad_ptr, nat_ptr = x_ptr + start, grad_ptr + start, nat_ptr + start

    largest = 0.0
    zeros, nonfinites = 0, 0
    for first in range(0, SIZE, BLOCK):
        offset = first + tl.arange(0, BLOCK)
        grad = _load(grad_ptr, offset, offset < SIZE)
        largest = tl.maximum(largest, tl.max(tl.abs(grad)))
        zeros += _zeros(grad, offset < SIZE)
        nonfinites += _nonfinites(grad)
    # First to a largest entry of 1: the squares of a tiny gradient would underflow, and its norm with them.
    largest = tl.maximum(largest, _TINY)

    square = 0.0
    for first in range(0, SIZE, BLOCK):
        offset = first + tl.arange(0, BLOCK)
        grad = _load(grad_ptr, offset, offset < SIZE) / largest
        square += tl.sum(grad * grad)
    step = step_size / _root(square)

    square = 0.0
    for first in range(0, SIZE, BLOCK):
        offset = first + tl.arange(0, BLOCK)
        delta = _perturbation(x_ptr, grad_ptr, nat_ptr, offset, offset < SIZE, largest, step)
        square += tl.sum(delta * delta)
    shrink = tl.minimum(epsilon / _root(square), 1.0, _NAN)

    for first in range(0, SIZE, BLOCK):
        offset = first + tl.arange(0, BLOCK)
        delta = _perturbation(x_ptr, grad_ptr, nat_ptr, offset, offset < SIZE, largest, step)
        moved = _load(nat_ptr, offset, offset < SIZE) + shrink * delta
        tl.store(x_ptr + offset, tl.clamp(moved, 0.0, 1.0, _NAN), mask=offset < SIZE)
    if counts_ptr is not None:
        _add(counts_ptr, zeros, nonfinites)


@triton.jit
def _perturbation(x_ptr, grad_ptr, nat_ptr, offset, inside, largest, step):
    """The perturbation after the step, before the projection."""
    grad = _load(grad_ptr, offset, inside) / largest
    return _load(x_ptr, offset, inside) + step * grad - _load(nat_ptr, offset, inside)


@triton.jit
def _load(ptr, offset, inside):
    return tl.load(ptr + offset, mask=inside, other=0).to(tl.float32)


@triton.jit
def _root(square):
    return tl.maximum(tl.sqrt_rn(square), _TINY, _NAN)


@triton.jit
def _zeros(grad, inside):
    return tl.sum(((grad == 0) & inside).to(tl.int32))


@triton.jit
def _nonfinites(grad):
    return tl.sum((~(tl.abs(grad) < float("inf"))).to(tl.int32))


@triton.jit
def _add(counts_ptr, zeros, nonfinites):
    # Sums of integers are the same in any order of the programs.
    tl.atomic_add(counts_ptr, zeros.to(tl.int64), mask=zeros > 0, sem="relaxed")
    tl.atomic_add(counts_ptr + 1, nonfinites.to(tl.int64), mask=nonfinites > 0, sem="relaxed")
