"""`batch_norm` on a CUDA device: the table of inputs, against float64."""

from __future__ import annotations

import functools

import pytest

from tests.kernels.holding import assert_no_worse_than_twice_eager
from tests.kernels.norms import NORM_CASES, NormCase, check_batch_norm

measured = functools.cache(check_batch_norm)


@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_numbers(fused: str, device: str, case: NormCase) -> None:
    measured(case, fused, device)


def test_no_worse_than_twice_eager(fused: str, device: str) -> None:
    assert_no_worse_than_twice_eager(
        (f"{name} {case.dtype}", error)
        for case in NORM_CASES
        for name, error in measured(case, fused, device).items()
    )
