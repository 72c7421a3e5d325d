"""`distill_loss` as Triton kernels: a launch for values and gradients, one for the means, one for the backward.

A program holds whole rows of logits in registers. Absent logits, gradients and weights are None and compiled out;
numbers are arguments, and change without a compilation.
Shape suffixes: B batch, C classes, K the six terms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.contract import LossAndGradients, LossInputs, LossRow, check_terms
from engine.kernels.triton_ops import CHECKED, two_floats

_BLOCK = 1024
_TERMS = ("ce_nat", "ce_adv", "kl_self", "kl_at_nat", "kl_at_adv", "kl_st_adv")  # that `_loss` computes, by number
_PADDING = tl.constexpr(-1e30)  # in place of logits beyond the last class: finite, with an exponential of 0
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_HANDS_NAN_ON = tl.constexpr(tl.PropagateNan.ALL)


class Tile(NamedTuple):
    """Rows of logits that one program computes, padded to a power of two."""

    rows: int
    columns: int
    num_warps: int


def tile(classes: int) -> Tile:
    """The tile for a number of classes: two values of each tensor in a thread, in longer rows four or eight.

    Two warps at least. With eight values in each thread of 16 warps, 4096 classes take nearly all registers of a
    multiprocessor.
    """
    columns = triton.next_power_of_2(classes)
    values = 2 if columns <= 64 else 4 if columns <= 256 else 8
    num_warps = max(columns // (32 * values), 2)
    return Tile(32 * num_warps * values // columns, columns, num_warps)


def loss_and_gradients(inputs: LossInputs, row: LossRow, want_adv: bool, want_nat: bool) -> LossAndGradients:
    """Values of `reference.distill_loss` and its gradients, of logits in float32, float16 or bfloat16."""
    check_terms("the Triton kernel", _TERMS, row)
    batch, classes = inputs.student.shape

    def new(*shape: int) -> Tensor:
        return inputs.student.new_empty(shape, dtype=torch.float32)

    loss, terms_K, alpha_B, loss_B, terms_BK = new(), new(6), new(batch), new(batch), new(batch, 6)
    grad_adv = new(batch, classes) if want_adv else None
    grad_nat = new(batch, classes) if want_nat else None
    result = LossAndGradients(loss, alpha_B, terms_K, loss_B, grad_adv, grad_nat)
    if not batch:
        loss.zero_()
        terms_K.zero_()
        return result
    rows, columns, num_warps = tile(classes)
    sample_weights = inputs.sample_weights
    with torch.cuda.device_of(inputs.student):
        _loss[(triton.cdiv(batch, rows),)](
            tuple(_strided(logits) for logits in inputs[:5]),
            (inputs.labels, inputs.labels.stride(0)),
            None if sample_weights is None else (sample_weights, sample_weights.stride(0)),
            loss_B,
            alpha_B,
            terms_BK,
            grad_adv,
            grad_nat,
            tuple(pair if active else None for pair, active in zip(row.weights, row.active, strict=True)),
            _reciprocal(row.tau),
            _reciprocal(row.tau_self),
            float(row.beta),
            float(row.label_smoothing) or None,
            batch,
            CLASSES=classes,
            DETACH_SELF=row.detach_self,
            BLOCK_B=rows,
            BLOCK_C=columns,
            num_warps=num_warps,
            **CHECKED,
        )
        active = sum(is_active << k for k, is_active in enumerate(row.active))
        _means[(7,)](loss_B, terms_BK, loss, terms_K, batch, active, BLOCK=_BLOCK, num_warps=4)
    return result


def scale(
    upstream: Tensor,
    grad_adv: Tensor | None,
    grad_nat: Tensor | None,
    dtype_adv: torch.dtype,
    dtype_nat: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients times the scalar `upstream`, which is read on the device, in the dtypes of the logits."""
    out_adv = None if grad_adv is None else torch.empty_like(grad_adv, dtype=dtype_adv)
    out_nat = None if grad_nat is None else torch.empty_like(grad_nat, dtype=dtype_nat)
    size = max(grad.numel() for grad in (grad_adv, grad_nat) if grad is not None)
    if size:
        with torch.cuda.device_of(upstream):
            grid = (triton.cdiv(size, _BLOCK),)
            _scale[grid](upstream, grad_adv, grad_nat, out_adv, out_nat, size, BLOCK=_BLOCK, num_warps=4)
    return out_adv, out_nat


def _strided(logits: Tensor | None) -> tuple[Tensor | int, ...] | None:
    """Logits with their strides; without where they are contiguous: the compiler knows the strides then."""
    if logits is None:
        return None
    return (logits,) if logits.is_contiguous() else (logits, *logits.stride())


def _reciprocal(temperature: float) -> tuple[float, float] | None:
    """1 / temperature for `_softmax`; None for 1, so that equal temperatures are computed once."""
    return None if temperature == 1 else two_floats(1 / temperature)


# long: one kernel, so that each logit is read once; the helpers below hold what its terms share
# many parameters: pointers, numbers and constants of a kernel
@triton.jit(do_not_specialize=["batch"])
def _loss(
    logits,
    labels,
    sample_weights,
    loss_ptr,
    alpha_ptr,
    terms_ptr,
    grad_adv_ptr,
    grad_nat_ptr,
    weights,
    per_tau,
    per_tau_self,
    beta,
    smoothing,
    batch: tl.int32,
    CLASSES: tl.constexpr,
    DETACH_SELF: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    s_adv, s_nat, _, t_at_adv, _ = logits
    position = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    stored = position < batch
    # Positions beyond the batch read its last row, so that no load needs a mask.
    row = tl.minimum(position, batch - 1).to(tl.int64)
    column = tl.arange(0, BLOCK_C)[None, :]
    label = tl.load(labels[0] + row * labels[1])
    known = (label >= 0) & (label < CLASSES)
    tl.device_assert(known, "distill_loss: a label is out of range")
    is_label = column == tl.where(known, label, -1).to(tl.int32)[:, None]

    alpha = tl.full((BLOCK_B,), 1.0, tl.float32)
    if t_at_adv is not None:
        z_at_adv = _shifted(t_at_adv, row, column, CLASSES, BLOCK_C)
        log_p = tl.sum(tl.where(is_label, z_at_adv, 0.0), axis=1) - tl.log(tl.sum(tl.exp(z_at_adv), axis=1))
        # A probability that underflows to 0 gives alpha 1 at beta = 0, not 0 * -inf.
        alpha = tl.exp(beta * tl.maximum(log_p, _LOWEST, _HANDS_NAN_ON))

    sample_weight = tl.full((BLOCK_B,), 1.0, tl.float32)
    if sample_weights is not None:
        sample_weight = tl.load(sample_weights[0] + row * sample_weights[1]).to(tl.float32)
    share = sample_weight / batch  # of a sample in the mean
    loss = tl.zeros((BLOCK_B,), tl.float32)
    grad_adv = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    grad_nat = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)

    if s_adv is not None:
        z_adv = _shifted(s_adv, row, column, CLASSES, BLOCK_C)
        if weights[1] is not None:
            term, grad = _cross_entropy(z_adv, is_label, smoothing, column, CLASSES)
            weight = weights[1][0] + weights[1][1] * alpha
            loss += weight * term
            grad_adv += (share * weight)[:, None] * grad
            tl.store(terms_ptr + row * 6 + 1, term, mask=stored)
        student = _softmax(z_adv, per_tau)
        for k in tl.static_range(3, 6):
            if weights[k] is not None:
                z = z_at_adv if k == 4 else _shifted(logits[k - 1], row, column, CLASSES, BLOCK_C)
                teacher = _softmax(z, per_tau)
                term = _divergence(teacher, student)
                weight = weights[k][0] + weights[k][1] * alpha
                loss += weight * term
                grad_adv += _per(share * weight, per_tau)[:, None] * (student[2] - teacher[2])
                tl.store(terms_ptr + row * 6 + k, term, mask=stored)
    if s_nat is not None:
        z_nat = _shifted(s_nat, row, column, CLASSES, BLOCK_C)
        if weights[0] is not None:
            term, grad = _cross_entropy(z_nat, is_label, smoothing, column, CLASSES)
            weight = weights[0][0] + weights[0][1] * alpha
            loss += weight * term
            grad_nat += (share * weight)[:, None] * grad
            tl.store(terms_ptr + row * 6, term, mask=stored)
        if weights[2] is not None:
            target = _softmax(z_nat, per_tau_self)
            student = _softmax(z_adv, per_tau_self)
            term = _divergence(target, student)
            weight = weights[2][0] + weights[2][1] * alpha
            loss += weight * term
            factor = _per(share * weight, per_tau_self)[:, None]
            grad_adv += factor * (student[2] - target[2])
            if not DETACH_SELF:
                ratio = target[0] - student[0]  # the log of p / q but for a constant, which drops out
                grad_nat += factor * target[2] * (ratio - tl.sum(target[2] * ratio, axis=1)[:, None])
            tl.store(terms_ptr + row * 6 + 2, term, mask=stored)

    tl.store(alpha_ptr + row, alpha, mask=stored)
    tl.store(loss_ptr + row, sample_weight * loss, mask=stored)
    place = row[:, None] * CLASSES + column
    if grad_adv_ptr is not None:
        tl.store(grad_adv_ptr + place, grad_adv, mask=stored[:, None] & (column < CLASSES))
    if grad_nat_ptr is not None:
        tl.store(grad_nat_ptr + place, grad_nat, mask=stored[:, None] & (column < CLASSES))


@triton.jit
def _shifted(logits, row, column, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr):
    """`z - max z` of each row: the largest, which decide a softmax, round little when divided by a temperature."""
    if len(logits) == 1:
        ptr = logits[0] + row[:, None] * CLASSES + column
    else:
        ptr = logits[0] + row[:, None] * logits[1] + column.to(tl.int64) * logits[2]
    if CLASSES == BLOCK_C:
        z = tl.load(ptr).to(tl.float32)
        shifted = z - tl.max(z, axis=1)[:, None]
    else:
        z = tl.load(ptr, mask=column < CLASSES, other=0).to(tl.float32)
        largest = tl.max(tl.where(column < CLASSES, z, float("-inf")), axis=1)
        shifted = tl.where(column < CLASSES, z - largest[:, None], _PADDING)
    return shifted


@triton.jit
def _cross_entropy(z, is_label, smoothing, column, CLASSES: tl.constexpr):
    """The cross-entropy of each row, and its gradient."""
    _, normalizer, p = _softmax(z, None)
    if smoothing is None:
        target = is_label.to(tl.float32)
        expected = tl.sum(tl.where(is_label, z, 0.0), axis=1)
    else:
        target = tl.where(is_label, 1.0 - smoothing, 0.0) + smoothing / CLASSES
        expected = tl.sum(tl.where(column < CLASSES, target * z, 0.0), axis=1)
    return normalizer - expected, p - target


@triton.jit
def _softmax(z, per_temperature):
    """`u = z / temperature`, `log sum exp(u)` and the softmax p of each row."""
    u = z
    if per_temperature is not None:
        u = tl.fma(z, per_temperature[0], z * per_temperature[1])
    exp = tl.exp(u)
    total = tl.sum(exp, axis=1)
    return u, tl.log(total), exp * (1.0 / total)[:, None]


@triton.jit
def _divergence(target, student):
    """KL(p || q) = sum p d with d = log(p / q), to which sum q - p = 0 is added: p (e^-d - 1 + d) for each class.

    Where d is small, that is p d^2 / 2! - p d^3 / 3! + ...: no digits are lost where q is close to p.
    """
    u_p, normalizer_p, p = target
    u_q, normalizer_q, q = student
    d = (u_p - u_q) - (normalizer_p - normalizer_q)[:, None]
    series = 1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720 - d * (1 / 5040 - d / 40320)))))
    return tl.sum(tl.where(tl.abs(d) < 0.5, p * d * d * series, p * d + (q - p)), axis=1)


@triton.jit
def _per(value, per_temperature):
    if per_temperature is not None:
        value *= per_temperature[0]
    return value


@triton.jit(do_not_specialize=["batch", "active"])
def _means(loss_B_ptr, terms_BK_ptr, loss_ptr, terms_K_ptr, batch: tl.int64, active, BLOCK: tl.constexpr):
    """Program 0 writes the mean loss, program k + 1 that of term k: each sum has one fixed order."""
    k = tl.program_id(0) - 1
    if k < 0:
        tl.store(loss_ptr, _mean(loss_B_ptr, 1, batch, BLOCK))
    elif (active >> k) & 1:
        tl.store(terms_K_ptr + k, _mean(terms_BK_ptr + k, 6, batch, BLOCK))
    else:
        tl.store(terms_K_ptr + k, 0.0)


@triton.jit
def _mean(ptr, STRIDE: tl.constexpr, size, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        offset = first + tl.arange(0, BLOCK)
        total += tl.load(ptr + offset * STRIDE, mask=offset < size, other=0)
    return tl.sum(total) / size


@triton.jit
def _scale(upstream_ptr, adv_ptr, nat_ptr, out_adv_ptr, out_nat_ptr, size, BLOCK: tl.constexpr):
    upstream = tl.load(upstream_ptr).to(tl.float32)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    if adv_ptr is not None:
        tl.store(out_adv_ptr + offset, upstream * tl.load(adv_ptr + offset, mask=inside), mask=inside)
    if nat_ptr is not None:
        tl.store(out_nat_ptr + offset, upstream * tl.load(nat_ptr + offset, mask=inside), mask=inside)
