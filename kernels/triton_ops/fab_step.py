"""`fab_step` as one Triton kernel. A program reads its image once for each step of a projection."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import reference

_NEWTON_STEPS = tl.constexpr(reference.NEWTON_STEPS)
_NO_WEIGHT = tl.constexpr(reference.NO_WEIGHT)
_LEAST_NORM = tl.constexpr(reference.LEAST_NORM)
_LARGEST_BLOCK = 1024


def fab_step(
    x_adv: Tensor, x_nat: Tensor, grad: Tensor, difference_B: Tensor, l2: bool, alpha_max: float, eta: float
) -> None:
    """`reference.fab_step` of dense tensors of one layout, all in float32."""
    if not x_adv.numel():
        return
    size = x_adv.numel() // len(x_adv)
    block, num_warps = blocks(size)
    with torch.cuda.device_of(x_adv):
        _fab_step[(len(x_adv),)](
            x_adv,
            x_nat,
            grad,
            difference_B,
            alpha_max,
            eta,
            SIZE=size,
            BLOCK=block,
            L2=l2,
            num_warps=num_warps,
        )


def blocks(size: int) -> tuple[int, int]:
    """Size of the blocks of an image, and number of warps: four values for each thread."""
    block = min(triton.next_power_of_2(size), _LARGEST_BLOCK)
    return block, max(block // 128, 1)


# many parameters: pointers, numbers and constants of a kernel
@triton.jit
def _fab_step(
    x_ptr,
    nat_ptr,
    grad_ptr,
    difference_ptr,
    alpha_max,
    eta,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    L2: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * SIZE
    x_ptr, nat_ptr, grad_ptr = x_ptr + start, nat_ptr + start, grad_ptr + start
    to_nat = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, SIZE, BLOCK):
        offset = first + tl.arange(0, BLOCK)
        inside = offset < SIZE
        way = _load(nat_ptr, offset, inside) - _load(x_ptr, offset, inside)
        to_nat += _load(grad_ptr, offset, inside) * way
    distance = tl.load(difference_ptr + tl.program_id(0)).to(tl.float64)
    nat_distance = distance + tl.sum(to_nat)

    if tl.abs(nat_distance) < float("inf"):  # else the gradient, the difference or an image is not finite
        sign, nat_sign = _sign(distance), _sign(nat_distance)
        m = _multiplier(grad_ptr, x_ptr, sign, tl.abs(distance), SIZE, BLOCK, L2)
        nat_m = _multiplier(grad_ptr, nat_ptr, nat_sign, tl.abs(nat_distance), SIZE, BLOCK, L2)
        norm = _norm(grad_ptr, x_ptr, sign, m, SIZE, BLOCK, L2)
        nat_norm = _norm(grad_ptr, nat_ptr, nat_sign, nat_m, SIZE, BLOCK, L2)
        alpha = tl.minimum(norm / (norm + nat_norm), alpha_max)
        for first in range(0, SIZE, BLOCK):
            offset = first + tl.arange(0, BLOCK)
            inside = offset < SIZE
            grad = _load(grad_ptr, offset, inside)
            x = _moved(grad, _load(x_ptr, offset, inside), sign, m, eta, L2)
            nat = _moved(grad, _load(nat_ptr, offset, inside), nat_sign, nat_m, eta, L2)
            pixel = tl.minimum(tl.maximum((1.0 - alpha) * x + alpha * nat, 0.0), 1.0)
            tl.store(x_ptr + offset, pixel.to(tl.float32), mask=inside)


@triton.jit
def _multiplier(grad_ptr, point_ptr, sign, wanted, SIZE: tl.constexpr, BLOCK: tl.constexpr, L2: tl.constexpr):
    """The multiplier of `reference.box_projection`."""
    m = tl.full((), 0.0, tl.float64)
    count, grows = 0, True
    while grows and count < _NEWTON_STEPS:
        wholes, slopes = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
        for first in range(0, SIZE, BLOCK):
            offset = first + tl.arange(0, BLOCK)
            grad = _load(grad_ptr, offset, offset < SIZE)  # 0 beyond the end, which has no weight
            weight, speed, room = _pixel(grad, _load(point_ptr, offset, offset < SIZE), sign, L2)
            is_full = m * speed >= room
            wholes += tl.where(is_full, weight * room, 0.0)
            slopes += tl.where(is_full, 0.0, weight * speed)
        slope = tl.sum(slopes)
        found = (wanted - tl.sum(wholes)) / tl.where(slope > 0, slope, 1.0)
        grows = (slope > 0) & (found > m)
        m = tl.where(grows, found, m)
        count += 1
    return m


@triton.jit
def _norm(grad_ptr, point_ptr, sign, m, SIZE: tl.constexpr, BLOCK: tl.constexpr, L2: tl.constexpr):
    """Norm of a projection."""
    norms = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, SIZE, BLOCK):
        offset = first + tl.arange(0, BLOCK)
        grad = _load(grad_ptr, offset, offset < SIZE)
        _, speed, room = _pixel(grad, _load(point_ptr, offset, offset < SIZE), sign, L2)
        length = tl.minimum(m * speed, room)
        norms = norms + length * length if L2 else tl.maximum(norms, length)
    return tl.maximum(tl.sqrt(tl.sum(norms)) if L2 else tl.max(norms), _LEAST_NORM)


@triton.jit
def _moved(grad, point, sign, m, eta, L2: tl.constexpr):
    """Points after eta times their way to the plane."""
    _, speed, room = _pixel(grad, point, sign, L2)
    length = eta * tl.minimum(m * speed, room)
    return point + tl.where(sign * grad > 0, -length, length)


@triton.jit
def _pixel(grad, point, sign, L2: tl.constexpr):
    """Weight, speed, and room to the border of each pixel."""
    weight = tl.abs(grad)
    if L2:
        weight = tl.where(weight < _NO_WEIGHT, 0.0, weight)
        speed = weight
    else:
        speed = tl.where(weight > 0, 1.0, 0.0).to(tl.float64)
    return weight, speed, tl.where(sign * grad > 0, point, 1.0 - point)


@triton.jit
def _sign(distance):
    return tl.where(distance < 0, -1.0, 1.0).to(tl.float64)


@triton.jit
def _load(ptr, offset, inside):
    return tl.load(ptr + offset, mask=inside, other=0).to(tl.float64)
