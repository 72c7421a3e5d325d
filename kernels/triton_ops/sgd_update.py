"""`sgd_update` as one Triton kernel for all tensors: a table on the device says where each of them lies."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.contract import SgdNumbers, SgdTensors

_BLOCK = 2048
_WARPS = 8
_FORMATS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_BEYOND = 2**62  # the first block of no tensor
# Rows of the table: the first block of a tensor, addresses, number of values, 1 where its gradient is in half
# precision. An address of 0: there is no copy.
_START, _WEIGHT, _GRADIENT, _MOMENTUM, _HALF, _SIZE, _IS_HALF = (tl.constexpr(row) for row in range(7))
_ROWS = 7


def sgd_update(tensors: SgdTensors, numbers: SgdNumbers, table: Tensor | None) -> Tensor:
    """`reference.sgd_update` of float32 weights and momenta, each with gradient and copy in one order of memory.

    Gradients and copies are in float32 or in one half format. Addresses of gradients change from call to call: the
    table goes to the device in every one, by a copy that nobody waits for. Returned: its memory on the host.
    """
    device = tensors.weights[0].device
    padded = triton.next_power_of_2(len(tensors.weights))
    rows = _rows(tensors)
    host = table
    if host is None or host.shape != (_ROWS, padded):
        host = torch.empty(_ROWS, padded, dtype=torch.int64, pin_memory=device.type == "cuda")
    host.copy_(torch.tensor([[*row, *[_BEYOND] * (padded - len(row))] for row in rows]))
    others = [tensor for tensor in (*tensors.gradients, *tensors.halves) if tensor is not None]
    half = next((_FORMATS[tensor.dtype] for tensor in others if tensor.dtype in _FORMATS), None)
    blocks = rows[_START][-1] + triton.cdiv(rows[_SIZE][-1], _BLOCK)
    if not blocks:
        return host
    with torch.cuda.device_of(tensors.weights[0]):
        _sgd_update[(blocks,)](
            host.to(device, non_blocking=True),
            numbers.lr,
            numbers.grad_scale,
            numbers.found_inf,
            numbers.momentum,
            numbers.weight_decay,
            LR_ON_DEVICE=isinstance(numbers.lr, Tensor),
            HAS_MOMENTUM=bool(numbers.momentum),
            NESTEROV=numbers.nesterov,
            HALF=half,
            PADDED=padded,
            ALIGNED=all(address % 16 == 0 for row in rows[_WEIGHT : _HALF + 1] for address in row),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return host


def _rows(tensors: SgdTensors) -> list[list[int]]:
    """Rows of the table."""
    momenta = tensors.momenta or tensors.weights
    sizes = [weight.numel() for weight in tensors.weights]
    blocks = [triton.cdiv(size, _BLOCK) for size in sizes]
    return [
        [0, *itertools.accumulate(blocks[:-1])],
        [weight.data_ptr() for weight in tensors.weights],
        [gradient.data_ptr() for gradient in tensors.gradients],
        [momentum.data_ptr() for momentum in momenta],
        [0 if half is None else half.data_ptr() for half in tensors.halves],
        sizes,
        [int(gradient.dtype != torch.float32) for gradient in tensors.gradients],
    ]


# many parameters: pointers, numbers and constants of a kernel
@triton.jit
def _sgd_update(
    table_ptr,
    lr,
    scale_ptr,
    inf_ptr,
    momentum,
    weight_decay,
    LR_ON_DEVICE: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of one tensor: of the last one that starts at or before it."""
    block = tl.program_id(0)
    starts = tl.load(table_ptr + tl.arange(0, PADDED))
    row = table_ptr + (tl.sum((starts <= block).to(tl.int32)) - 1)
    first = (block - tl.load(row)) * BLOCK
    size = tl.load(row + _SIZE * PADDED)
    if inf_ptr is not None:
        size = tl.where(tl.load(inf_ptr) == 0, size, 0)
    if LR_ON_DEVICE:
        lr = tl.load(lr)
    numbers = (lr, momentum, weight_decay)
    offset = tl.arange(0, BLOCK)
    if first + BLOCK <= size:  # without a mask, which would narrow the accesses
        _update(row, first, offset, None, numbers, scale_ptr, HAS_MOMENTUM, NESTEROV, HALF, PADDED, ALIGNED)
    else:
        inside = offset < size - first
        _update(row, first, offset, inside, numbers, scale_ptr, HAS_MOMENTUM, NESTEROV, HALF, PADDED, ALIGNED)


# many parameters: of a part of a kernel
@triton.jit
def _update(
    row,
    first,
    offset,
    inside,
    numbers,
    scale_ptr,
    HAS_MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update values at offsets from the first one."""
    lr, momentum, weight_decay = numbers
    weights = _pointer(row + _WEIGHT * PADDED, first, tl.float32, ALIGNED) + offset
    w = tl.load(weights, mask=inside)
    if HALF is None:
        g = tl.load(_pointer(row + _GRADIENT * PADDED, first, tl.float32, ALIGNED) + offset, mask=inside)
    else:
        if tl.load(row + _IS_HALF * PADDED) != 0:
            gradients = _pointer(row + _GRADIENT * PADDED, first, HALF, ALIGNED) + offset
            g = tl.load(gradients, mask=inside).to(tl.float32)
        else:
            g = tl.load(_pointer(row + _GRADIENT * PADDED, first, tl.float32, ALIGNED) + offset, mask=inside)
    if scale_ptr is not None:
        g = tl.div_rn(g, tl.broadcast_to(tl.load(scale_ptr), g.shape))
    g += weight_decay * w
    if HAS_MOMENTUM:
        momenta = _pointer(row + _MOMENTUM * PADDED, first, tl.float32, ALIGNED) + offset
        m = momentum * tl.load(momenta, mask=inside) + g
        tl.store(momenta, m, mask=inside)
        g = g + momentum * m if NESTEROV else m
    w -= lr * g
    tl.store(weights, w, mask=inside)
    if HALF is not None:  # noqa: SIM102  # known to the compiler, the other one not
        if tl.load(row + _HALF * PADDED) != 0:
            tl.store(_pointer(row + _HALF * PADDED, first, HALF, ALIGNED) + offset, w.to(HALF), mask=inside)


@triton.jit
def _pointer(entry, first, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(entry).to(tl.pointer_type(dtype)) + first
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer
