"""`image_conv3x3` as Triton kernels, in the interpreter, over the table of cases."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "it takes a process of its own: TRITON_INTERPRET=1 pytest tests/interpreter", allow_module_level=True
    )
pytest.importorskip("triton", reason="triton is not installed")

from hypothesis import given, settings

from engine.kernels.triton_ops import image_conv3x3 as triton_image_conv3x3
from tests.interpreter.device import imitate
from tests.kernels.holding import assert_no_worse_than_twice_eager
from tests.kernels.stem_cases import (
    ANY_STEM,
    HALF_CASES,
    STEM_CASES,
    StemCase,
    arguments,
    check_image_conv3x3,
    check_image_conv3x3_update,
)

CASES = STEM_CASES[::3]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    imitate(monkeypatch)


def test_numbers() -> None:
    """With the rounding errors of products of three numbers in bfloat16."""
    measured = [(case, check_image_conv3x3(case, "triton")) for case in CASES]
    assert_no_worse_than_twice_eager(
        (f"{name} {case.dtype}", error) for case, errors in measured for name, error in errors.items()
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_attack_s_step(case: StemCase) -> None:
    check_image_conv3x3_update(case, "triton")


@settings(max_examples=5, deadline=None)
@given(case=ANY_STEM)
def test_numbers_of_any_shape(case: StemCase) -> None:
    with pytest.MonkeyPatch.context() as patch:
        imitate(patch)
        check_image_conv3x3(case, "triton")
        check_image_conv3x3_update(case, "triton")


@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_float16(case: StemCase) -> None:
    """A CPU's outputs are never float16, so the kernels are called by themselves."""
    given = arguments(case)
    images, weight, grad, std = given["images"], given["weight"], given["grad"], given.get("std")
    half, single = (
        triton_image_conv3x3.image_conv3x3(images, weight, given.get("bias"), given.get("mean"), std, dtype)
        for dtype in (torch.float16, torch.float32)
    )
    assert half.dtype == torch.float16
    assert torch.equal(half, single.half())
    of_half, of_single = (
        triton_image_conv3x3.image_conv3x3_backward(value, weight, std) for value in (grad, grad.float())
    )
    assert torch.equal(of_half, of_single)
