"""Sums on the device of what the training measures of a batch. B batch, C classes, K terms."""

from __future__ import annotations

import torch

from engine.kernels import dispatch, reference
from engine.kernels.contract import (
    ALPHA_BINS,
    MAX_CLASSES,
    MEASURED_LOGITS,
    BatchSums,
    MeasuredBatch,
    check_device,
)

_LOGITS = (torch.float32, torch.float16, torch.bfloat16)
_OTHER_TOTALS = 18  # beside the terms


@torch.no_grad()
def batch_sums(sums: BatchSums, batch: MeasuredBatch) -> None:
    """Add a batch to the sums in place, without a wait: totals += row, histogram += counts of alpha.

    The loss and the terms, means over the batch, count B times; right is argmax_c logits_ic = y_i, where NaN is
    the largest, and the first of several largest counts. `record` is written where the loss is not finite and no
    earlier one was. Same input, same bits.

    Raises ValueError for shapes, dtypes and devices that do not fit.
    """
    _check_sums(sums, batch)
    _check_batch(batch)
    check_device(
        **sums._asdict(), loss=batch.loss, terms=batch.terms, alpha=batch.alpha, labels=batch.labels,
        step=batch.step, **dict(zip(MEASURED_LOGITS, batch.logits, strict=True)),
    )  # fmt: skip
    fused = (
        batch.loss.dtype == batch.terms.dtype == torch.float32
        and (batch.alpha is None or batch.alpha.dtype == torch.float32)
        and all(logits is None or logits.dtype in _LOGITS for logits in batch.logits)
        and all(logits is None or logits.shape[1] <= MAX_CLASSES for logits in batch.logits)
    )
    implementation = dispatch.choose("batch_sums", batch.labels.device, fused=fused)
    serve = reference.batch_sums
    if implementation != "reference":
        serve = dispatch.fused(implementation, "batch_sums", "batch_sums")
    serve(sums, batch)


def _check_sums(sums: BatchSums, batch: MeasuredBatch) -> None:
    """Raise ValueError where the sums are not those of the batch's number of terms."""
    terms = len(batch.sources)
    sizes = {"totals": _OTHER_TOTALS + terms, "histogram": ALPHA_BINS, "record": 1 + terms}
    for name, size in sizes.items():
        given = getattr(sums, name)
        if given.dtype != torch.float64 or given.shape != (size,) or not given.is_contiguous():
            kind = f"{given.dtype} of {tuple(given.shape)}, strides {given.stride()}"
            raise ValueError(f"{name}: expected float64 of shape ({size},), contiguous, got {kind}")


def _check_batch(batch: MeasuredBatch) -> None:
    """Raise ValueError for parts of a batch that do not fit together."""
    labels, count = batch.labels, batch.terms.numel()
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 (B,), got {labels.dtype} of {tuple(labels.shape)}")
    if batch.loss.dim() or batch.terms.dim() != 1:
        shapes = f"{tuple(batch.loss.shape)} and {tuple(batch.terms.shape)}"
        raise ValueError(f"loss and terms: expected shapes () and (K,), got {shapes}")
    if batch.step.dim() or batch.step.dtype != torch.int64:
        raise ValueError(f"step: expected int64 (), got {batch.step.dtype} of {tuple(batch.step.shape)}")
    if not all(-1 <= source < count for source in batch.sources):
        raise ValueError(f"sources: expected places among {count} terms, or -1, got {batch.sources}")
    if len(batch.logits) != len(MEASURED_LOGITS):
        raise ValueError(
            f"logits: expected {', '.join(MEASURED_LOGITS)}, or None for each, got {len(batch.logits)}"
        )
    if batch.alpha is not None and batch.alpha.shape != labels.shape:
        raise ValueError(f"alpha: expected ({len(labels)},), got {tuple(batch.alpha.shape)}")
    for name, logits in zip(MEASURED_LOGITS, batch.logits, strict=True):
        if logits is not None and (logits.dim() != 2 or len(logits) != len(labels)):
            raise ValueError(f"logits: {name}: expected ({len(labels)}, C), got {tuple(logits.shape)}")
