"""Batches for `batch_sums`, and its totals counted again sample by sample in numpy and Python's integers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import ALPHA_BINS, BatchSums, MeasuredBatch, batch_sums

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
START, STEP = 3.0, 41  # what the sums hold before, and the number of the step


@dataclass(frozen=True)
class SumsCase:
    """A batch. given: which of the logits there are. terms: K. sources: places of the sums' terms among them."""

    batch: int = 33
    classes: int = 10
    dtype: torch.dtype = SINGLE
    given: tuple[bool, ...] = (True, True, True, True)
    terms: int = 3
    sources: tuple[int, ...] = (1, -1, 0, 2)
    with_alpha: bool = True
    strided: bool = False
    ties: bool = False
    nans: bool = False
    seed: int = 0


CASES = [
    SumsCase(),
    SumsCase(1, 2, BRAIN),
    SumsCase(0),
    SumsCase(40, 100, HALF, strided=True),
    SumsCase(70, 16, ties=True),
    SumsCase(50, 5, BRAIN, ties=True, nans=True, strided=True),
    SumsCase(5, 1000, nans=True),
    SumsCase(9, 3, given=(True, False, False, False), terms=1, sources=(0,), with_alpha=False),
    SumsCase(9, 3, given=(False, True, True, False), terms=1, sources=(-1, 0), with_alpha=False),
    SumsCase(2100, 4, given=(False, True, False, True), terms=2, sources=(0, 1)),
]


def make(case: SumsCase) -> MeasuredBatch:
    """The batch of a case, on a CPU."""
    generator = torch.Generator().manual_seed(case.seed)
    step = 2 if case.strided else 1

    def logits() -> Tensor:
        shape = (case.batch, step * case.classes)
        made = torch.randint(-2, 3, shape, generator=generator) if case.ties else torch.empty(0)
        made = made.float() if case.ties else 3 * torch.randn(shape, generator=generator)
        if case.nans:
            made = made.masked_fill(torch.rand(shape, generator=generator) < 0.2, math.nan)
            made = made.masked_fill(torch.rand(shape, generator=generator) < 0.1, -math.inf)
        return made.to(case.dtype)[:, ::step]

    alpha = torch.rand(step * case.batch, generator=generator)
    alpha[: len(alpha) // 4] = (
        alpha[: len(alpha) // 4] * ALPHA_BINS
    ).round() / ALPHA_BINS  # edges of bins, 0 and 1
    return MeasuredBatch(
        torch.rand((), generator=generator),
        torch.randn(step * case.terms, generator=generator)[::step],
        case.sources,
        alpha[::step] if case.with_alpha else None,
        tuple(logits() if given else None for given in case.given),
        torch.randint(case.classes, (step * case.batch,), generator=generator)[::step],
        torch.tensor(STEP),
        entries=30_000,
    )


def zero_sums(terms: int, device: str = "cpu") -> BatchSums:
    """Sums that hold `START` everywhere, and no record."""
    sizes = (18 + terms, ALPHA_BINS, 1 + terms)
    totals, histogram, record = (torch.full((n,), START, dtype=torch.float64, device=device) for n in sizes)
    return BatchSums(totals, histogram, record.fill_(-1))


def expected(batch: MeasuredBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Totals, histogram and record after one batch from `zero_sums`."""
    count, terms = len(batch.labels), [float(term) for term in batch.terms]
    loss, labels = float(batch.loss), batch.labels.tolist()
    taken = [0.0 if source < 0 else terms[source] for source in batch.sources]
    alpha = [] if batch.alpha is None else [float(a) for a in batch.alpha]
    totals = [count, count * loss, *(count * term for term in taken), math.fsum(alpha), len(alpha)]
    right = []
    for given in batch.logits:
        # numpy's argmax, too, takes the first of the largest, and NaN for larger than all.
        rows = np.empty((0, 1)) if given is None else given.double().numpy()
        right.append([int(np.argmax(row)) == label for row, label in zip(rows, labels, strict=False)])
        totals += [sum(right[-1]), len(right[-1])]
    pairs = list(zip(right[2], right[3], strict=False)) if batch.logits[2] is not None else []
    totals += [pairs.count(pair) for pair in ((True, True), (True, False), (False, False), (False, True))]
    totals += [len(pairs), count * batch.entries]
    histogram = np.zeros(ALPHA_BINS)
    for value in alpha:
        histogram[min(int(np.float32(value) * np.float32(ALPHA_BINS)), ALPHA_BINS - 1)] += 1
    record = np.full(1 + len(taken), -1.0)
    if not math.isfinite(loss):
        record = np.array([float(batch.step), *(not math.isfinite(term) for term in taken)], dtype=float)
    return START + np.array(totals, dtype=float), START + histogram, record


def on(device: str, batch: MeasuredBatch) -> MeasuredBatch:
    """The batch with its tensors there."""

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        return value.to(device) if isinstance(value, Tensor) else value

    return MeasuredBatch(*map(moved, batch))


def check(case: SumsCase, loss: float | None = None, device: str = "cpu") -> BatchSums:
    """One batch by the implementation that serves, against `expected`; in place. loss: in place of the case's."""
    batch = make(case)
    if loss is not None:
        batch = batch._replace(loss=torch.tensor(loss))
        batch.terms[0] = loss
    sums = zero_sums(len(case.sources), device)
    places = [tensor.data_ptr() for tensor in sums]
    batch_sums(sums, on(device, batch))
    assert [tensor.data_ptr() for tensor in sums] == places
    for name, got, right in zip(BatchSums._fields, sums, expected(batch), strict=True):
        # Of the totals the loss, the terms and alpha are sums of float32; the counts are exact.
        exact = np.ones(len(right), dtype=bool)
        if name == "totals":
            exact[1 : 3 + len(case.sources)] = False
        np.testing.assert_array_equal(got.cpu().numpy()[exact], right[exact], err_msg=name)
        np.testing.assert_allclose(got.cpu().numpy()[~exact], right[~exact], rtol=3e-7, atol=1e-6, err_msg=name)
    return sums


def any_case(classes: int, terms: int, dtypes: tuple[torch.dtype, ...]) -> st.SearchStrategy[SumsCase]:
    """Any batch of so many classes and terms at most."""
    return st.builds(
        SumsCase,
        batch=st.integers(0, 40),
        classes=st.integers(1, classes),
        dtype=st.sampled_from(dtypes),
        given=st.tuples(*[st.booleans()] * 4),
        terms=st.just(3),
        sources=st.lists(st.integers(-1, 2), min_size=1, max_size=terms).map(tuple),
        with_alpha=st.booleans(),
        strided=st.booleans(),
        ties=st.booleans(),
        nans=st.booleans(),
        seed=st.integers(0, 2**31),
    )


def check_first_record(device: str = "cpu") -> None:
    """The first loss that is not finite is kept, with its step and the terms that are not."""
    sums = zero_sums(4, device)
    for step, loss in enumerate((1.0, math.nan, math.inf)):
        batch = make(SumsCase())._replace(loss=torch.tensor(loss), step=torch.tensor(step))
        batch.terms[1] = loss
        batch_sums(sums, on(device, batch))
    assert sums.record.tolist() == [1, 1, 0, 0, 0]
