"""Every implementation that runs on a CPU against the whole table of inputs, and against inputs beside it."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import Term, crop_flip
from engine.kernels.contract import KINDS
from tests.kernels import cases, exact
from tests.kernels.cases import (
    CROP_CASES,
    LOGITS,
    LOSS_CASES,
    PGD_CASES,
    CropCase,
    LossCase,
    PgdCase,
    call_distill_loss,
    check_crop_flip,
    check_distill_loss,
    check_pgd_update,
)
from tests.kernels.holding import Errors, assert_no_worse_than_twice_eager, assert_same_bits, serving

# What is measured case by case is read again over all of them.
measure_distill_loss = functools.cache(check_distill_loss)
measure_pgd_update = functools.cache(check_pgd_update)

# Seconds and a gigabyte each.
LARGE = [case for case in LOSS_CASES if case.batch * case.classes > 2_000_000]
SMALL = [case for case in LOSS_CASES if case not in LARGE]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_distill_loss(implementation: str, case: LossCase) -> None:
    measure_distill_loss(case, implementation)


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_distill_loss_of_many_samples_and_classes(implementation: str, case: LossCase) -> None:
    check_distill_loss(case, implementation)


def test_distill_loss_is_no_worse_than_twice_eager(implementation: str) -> None:
    """The gradients of each dtype by themselves: float16 rounds more than the arithmetic before it."""
    errors: list[tuple[str, Errors]] = []
    for case in SMALL:
        dtypes = {f"grad_{name}": case.dtypes[i % len(case.dtypes)] for i, name in enumerate(LOGITS)}
        measured = measure_distill_loss(case, implementation)
        errors += [(f"{name} {dtypes.get(name, '')}", error) for name, error in measured.items()]
    assert_no_worse_than_twice_eager(errors)


@pytest.mark.parametrize("case", PGD_CASES, ids=str)
def test_pgd_update(implementation: str, case: PgdCase) -> None:
    measure_pgd_update(case, implementation)


def test_pgd_update_is_no_worse_than_twice_eager(implementation: str) -> None:
    assert_no_worse_than_twice_eager(
        error for case in PGD_CASES for error in measure_pgd_update(case, implementation).items()
    )


@pytest.mark.parametrize("case", CROP_CASES, ids=str)
def test_crop_flip(implementation: str, case: CropCase) -> None:
    check_crop_flip(case, implementation)


# ---------------------------------------------------------------- beside the table

TEMPERATURES = st.floats(math.log(0.1), math.log(100)).map(math.exp)
WEIGHTS = st.tuples(*[st.just(0.0) | st.floats(-2, 2)] * 2)
ROWS = st.tuples(*[WEIGHTS] * 6).filter(lambda row: any(map(any, row)))
FACTORS = st.sampled_from((None, "f", "g"))
OF_LABELS = st.builds(
    Term,
    kind=st.sampled_from([kind for kind, has_target in KINDS.items() if not has_target]),
    student=st.sampled_from(LOGITS),
    target=st.none(),
    weight=WEIGHTS,
    temperature=st.just(1.0),
    factor=FACTORS,
)
OF_LOGITS = st.builds(
    Term,
    kind=st.sampled_from([kind for kind, has_target in KINDS.items() if has_target]),
    student=st.sampled_from(LOGITS),
    target=st.sampled_from(LOGITS),
    weight=WEIGHTS,
    temperature=TEMPERATURES,
    detach=st.booleans(),
    factor=FACTORS,
)
DTYPES = st.sampled_from((cases.SINGLE, cases.HALF, cases.BRAIN))
LOSS_LAYOUTS = st.sampled_from((*cases.MIXED_LAYOUTS, cases.one_column))


@settings(max_examples=150, deadline=None)
@given(
    case=st.builds(
        cases.table_case,
        batch=st.integers(0, 40),
        classes=st.integers(2, 300),
        logits=st.sampled_from((cases.normal, cases.wide, cases.equal, cases.one_hot, cases.masked, cases.near)),
        dtypes=st.lists(DTYPES, min_size=1, max_size=5).map(tuple),
        layouts=st.lists(LOSS_LAYOUTS, min_size=1, max_size=5).map(tuple),
        row=st.sampled_from(cases.ROWS) | ROWS,
        tau=TEMPERATURES,
        tau_self=TEMPERATURES,
        beta=st.floats(0, 2),
        detach_self=st.booleans(),
        label_smoothing=st.sampled_from((0.0, 1.0)) | st.floats(0, 1),
        sample_weights=st.none() | st.tuples(DTYPES, LOSS_LAYOUTS),
        spare=st.booleans(),
    )
)
def test_distill_loss_of_any_case(implementation: str, case: LossCase) -> None:
    check_distill_loss(case, implementation)


@settings(max_examples=150, deadline=None)
@given(
    case=st.builds(
        LossCase,
        batch=st.integers(0, 40),
        classes=st.integers(2, 50),
        logits=st.sampled_from((cases.normal, cases.equal, cases.one_hot, cases.masked)),
        dtypes=st.lists(DTYPES, min_size=1, max_size=5).map(tuple),
        layouts=st.lists(LOSS_LAYOUTS, min_size=1, max_size=5).map(tuple),
        terms=st.lists(OF_LABELS | OF_LOGITS, min_size=1, max_size=9).map(tuple),
        beta=st.floats(0, 2),
        label_smoothing=st.sampled_from((0.0, 1.0)) | st.floats(0, 1),
        sample_weights=st.none() | st.tuples(DTYPES, LOSS_LAYOUTS),
        spare=st.booleans(),
        trust=st.sampled_from(LOGITS),
        learning=st.sets(st.sampled_from(LOGITS)).map(tuple),
    )
)
def test_distill_loss_of_any_terms(implementation: str, case: LossCase) -> None:
    """Any kinds, students, targets, temperatures and factors, and gradients to any of the logits."""
    check_distill_loss(case, implementation)


LENGTHS = st.just(0.0) | st.floats(1e-6, 4)
IMAGE_LAYOUTS = st.sampled_from(
    (cases.contiguous, cases.channels_last, cases.shifted, cases.cropped, cases.every_second)
)


@settings(max_examples=100, deadline=None)
@given(
    case=st.builds(
        PgdCase,
        shape=st.lists(st.integers(1, 12), min_size=1, max_size=4).map(lambda image: (3, *image)),
        threat_model=st.sampled_from(("Linf", "L2")),
        gradient=st.sampled_from((cases.plain, cases.sparse, cases.tiny, cases.huge, cases.ragged, cases.broken)),
        grad_dtype=DTYPES,
        layouts=st.tuples(IMAGE_LAYOUTS, IMAGE_LAYOUTS, IMAGE_LAYOUTS),
        epsilon=LENGTHS,
        step_size=LENGTHS,
        counting=st.booleans(),
    )
)
def test_pgd_update_of_any_case(implementation: str, case: PgdCase) -> None:
    check_pgd_update(case, implementation)


@settings(max_examples=100, deadline=None)
@given(
    case=st.builds(
        CropCase,
        size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
        channels=st.integers(1, 5),
        batch=st.integers(0, 9),
        padding=st.integers(0, 9),
        flip=st.booleans(),
        augment=st.just(True),
        seed=st.integers(0, 2**64 - 1),
        epoch=st.integers(0, 2**32 - 1),
        reuse=st.booleans(),
        indexed=st.booleans(),
    )
)
def test_crop_flip_of_any_case(implementation: str, case: CropCase) -> None:
    check_crop_flip(case, implementation)


def unwritten(count: int, dtype: np.dtype[Any]) -> Tensor:
    """Zeros in as much memory as is then written of them."""
    return torch.from_numpy(np.zeros(count, dtype))


def test_distill_loss_reads_rows_that_lie_far_apart(implementation: str) -> None:
    """The last one begins at the entry 2**31."""
    case = replace(
        LOSS_CASES[0], batch=3, classes=50, dtypes=(cases.HALF,), terms=cases.table_1(cases.RANDOM_ROWS[0])
    )
    call = case.arguments()
    room = unwritten(2**31 + 50, np.dtype(np.float16)).as_strided((3, 50), (2**30, 1))
    room.copy_(call["logits"]["t_at_adv"])
    with serving("distill_loss", implementation, "cpu"):
        far = call | {"logits": call["logits"] | {"t_at_adv": room}}
        assert_same_bits(call_distill_loss(far), call_distill_loss(call))


def test_crop_flip_finds_images_that_lie_far_apart(implementation: str) -> None:
    """The last one begins beyond the byte 2**31."""
    count = 2**31 // (64 * 64 * 3) + 2
    images = unwritten(count * 64 * 64 * 3, np.dtype(np.uint8)).view(count, 64, 64, 3)
    images[-1] = torch.randint(256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with serving("crop_flip", implementation, "cpu"):
        views, labels = crop_flip(images, torch.arange(count), torch.tensor([count - 1]), seed=3, epoch=5)
    right = exact.crop_flip(images[-1].numpy(), count - 1, seed=3, epoch=5, padding=4, flip=True)
    np.testing.assert_array_equal(views[0].permute(1, 2, 0).numpy(), right.astype(np.float32) / np.float32(255))
    assert labels.tolist() == [count - 1]
