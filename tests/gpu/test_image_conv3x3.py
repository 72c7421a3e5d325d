"""`image_conv3x3` and the attack's step by it on a CUDA device: the table of inputs, against float64."""

from __future__ import annotations

import functools

import pytest

from engine.system.precision import full_precision
from tests.kernels.holding import assert_no_worse_than_twice_eager
from tests.kernels.stem_cases import (
    HALF_CASES,
    STEM_CASES,
    StemCase,
    check_image_conv3x3,
    check_image_conv3x3_update,
)

CASES = [*STEM_CASES, *HALF_CASES]
by_case = pytest.mark.parametrize("case", CASES, ids=str)
measured = functools.cache(check_image_conv3x3)


@by_case
def test_numbers(fused: str, device: str, case: StemCase) -> None:
    """Products in bfloat16 on tensor cores, beside those of cuDNN in float32, which are not rounded to TF32."""
    with full_precision():
        measured(case, fused, device)


def test_no_worse_than_twice_eager(fused: str, device: str) -> None:
    with full_precision():
        assert_no_worse_than_twice_eager(
            (f"{name} {case.dtype}", error)
            for case in CASES
            for name, error in measured(case, fused, device).items()
        )


@by_case
def test_the_attack_s_step(fused: str, device: str, case: StemCase) -> None:
    check_image_conv3x3_update(case, fused, device)
