"""`batch_sums` as one Triton kernel. A program counts over a block of rows; the first one adds the rest, too."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.contract import ALPHA_BINS, BatchSums, MeasuredBatch
from engine.kernels.triton_ops.distill_loss import tile

_BINS = tl.constexpr(ALPHA_BINS)
_BINS_PADDED = tl.constexpr(triton.next_power_of_2(ALPHA_BINS))
_BLOCK = 1024
_RIGHT, _CASES, _CASE_SAMPLES, _ENTRIES = (tl.constexpr(place) for place in (4, 12, 16, 17))  # after the K terms


def batch_sums(sums: BatchSums, batch: MeasuredBatch) -> None:
    """`reference.batch_sums` of a loss, terms and alpha in float32, and logits of at most 32 bits."""
    size = len(batch.labels)
    given: list[Tensor] = []
    places = []
    for logits in batch.logits:
        places.append(-1 if logits is None else len(given))
        if logits is not None:
            given.append(logits)
    classes = max((logits.shape[1] for logits in given), default=1)
    rows, columns, num_warps = tile(classes)
    with torch.cuda.device_of(sums.totals):
        _batch_sums[(max(triton.cdiv(size, rows), 1),)](
            *sums,
            batch.loss,
            (batch.terms, batch.terms.stride(0)),
            batch.step,
            None if batch.alpha is None else (batch.alpha, batch.alpha.stride(0)),
            (batch.labels, batch.labels.stride(0)),
            tuple([(logits, logits.shape[1], *logits.stride()) for logits in given]),
            size,
            batch.entries,
            SOURCES=batch.sources,
            PLACES=tuple(places),
            BLOCK_B=rows,
            BLOCK_C=columns,
            BLOCK=_BLOCK,
            num_warps=num_warps,
        )


# many parameters: pointers, numbers and constants of a kernel
@triton.jit(do_not_specialize=["size", "entries"])
def _batch_sums(
    totals_ptr,
    histogram_ptr,
    record_ptr,
    loss_ptr,
    terms,
    step_ptr,
    alpha,
    labels,
    logits,
    size: tl.int32,
    entries: tl.int64,
    SOURCES: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts are added by atomics, in any order: sums of integers below 2^53 are exact in float64.

    logits: those that there are. PLACES: of each of the measured logits its place among them, -1 for none.
    """
    is_first = tl.program_id(0) == 0
    place = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside, row = place < size, place.to(tl.int64)
    label = tl.load(labels[0] + row * labels[1], mask=inside, other=0)
    after_terms = totals_ptr + len(SOURCES)
    if is_first:
        _add_means(totals_ptr, record_ptr, loss_ptr, terms, step_ptr, size, SOURCES)
        _add(after_terms + _ENTRIES, size * entries)

    right = ()
    for k in tl.static_range(len(PLACES)):
        if PLACES[k] < 0:
            right = _appended(right, tl.zeros((BLOCK_B,), tl.int1))
        else:
            right = _appended(right, _right(logits[PLACES[k]], row, label, inside, BLOCK_B, BLOCK_C))
            _count(after_terms + _RIGHT + 2 * k, right[k])
            if is_first:
                _add(after_terms + _RIGHT + 2 * k + 1, size)
    if PLACES[2] >= 0 and PLACES[3] >= 0:
        _count_cases(after_terms + _CASES, right, inside)
        if is_first:
            _add(after_terms + _CASE_SAMPLES, size)

    if alpha is not None:
        bins = tl.arange(0, _BINS_PADDED)
        alpha_B = tl.load(alpha[0] + row * alpha[1], mask=inside, other=0)
        bin_B = tl.minimum(tl.maximum(alpha_B * _BINS, 0.0), _BINS - 1.0).to(tl.int32)  # NaN: bin 0
        counts = tl.sum(((bin_B[:, None] == bins[None, :]) & inside[:, None]).to(tl.int32), axis=0)
        tl.atomic_add(histogram_ptr + bins, counts.to(tl.float64), mask=counts > 0, sem="relaxed")
        if is_first:
            _add(after_terms + 2, _sum(alpha, size, BLOCK))
            _add(after_terms + 3, size)


@triton.jit
def _add_means(totals_ptr, record_ptr, loss_ptr, terms, step_ptr, size, SOURCES: tl.constexpr):
    """The loss and the terms, each times the number of samples in float32, and the record."""
    loss = tl.load(loss_ptr)
    _add(totals_ptr, size)
    _add(totals_ptr + 1, loss * size.to(tl.float32))
    is_new = _is_wrong(loss) & (tl.load(record_ptr) < 0)
    for k in tl.static_range(len(SOURCES)):
        if SOURCES[k] >= 0:
            term = tl.load(terms[0] + SOURCES[k] * terms[1])
            _add(totals_ptr + 2 + k, term * size.to(tl.float32))
            tl.store(record_ptr + 1 + k, _is_wrong(term).to(tl.float64), mask=is_new)
        else:
            tl.store(record_ptr + 1 + k, 0.0, mask=is_new)
    tl.store(record_ptr, tl.load(step_ptr).to(tl.float64), mask=is_new)


@triton.jit
def _right(logits, row, label, inside, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """True where the label's logit is the first of the largest: nothing before it is as large, nothing is larger.

    NaN is larger than every number.
    """
    column = tl.arange(0, BLOCK_C)[None, :]
    known = inside & (label >= 0) & (label < logits[1])
    start = logits[0] + row * logits[2]
    own = tl.load(start + label * logits[3], mask=known, other=0).to(tl.float32)[:, None]
    mask = inside[:, None] & (column < logits[1])
    z = tl.load(start[:, None] + column.to(tl.int64) * logits[3], mask=mask, other=0).to(tl.float32)
    is_before = column < label[:, None]
    beats = tl.where(z != z, is_before | (own == own), (z > own) | ((z == own) & is_before))
    return known & (tl.sum((beats & mask).to(tl.int32), axis=1) == 0)


@triton.jit
def _sum(values, size, BLOCK: tl.constexpr):
    """In float64, block by block: the same bits every time."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, size, BLOCK):
        place = first + tl.arange(0, BLOCK)
        total += tl.load(values[0] + place.to(tl.int64) * values[1], mask=place < size, other=0).to(tl.float64)
    return tl.sum(total)


@triton.jit
def _appended(right, flags):
    return right + (flags,)  # noqa: RUF005  # which a kernel knows


@triton.jit
def _count_cases(ptr, right, inside):
    _count(ptr, right[2] & right[3])
    _count(ptr + 1, right[2] & ~right[3])
    _count(ptr + 2, inside & ~right[2] & ~right[3])
    _count(ptr + 3, ~right[2] & right[3])


@triton.jit
def _count(ptr, flags):
    count = tl.sum(flags.to(tl.int32))
    tl.atomic_add(ptr, count.to(tl.float64), mask=count > 0, sem="relaxed")


@triton.jit
def _add(ptr, value):
    """Addition by the first program alone, to a total that no other one writes."""
    tl.store(ptr, tl.load(ptr) + value.to(tl.float64))


@triton.jit
def _is_wrong(number):
    return ~(tl.abs(number) < float("inf"))
