"""`batch_norm` as Triton kernels, in the interpreter, over the table of cases."""

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
from hypothesis import strategies as st

from engine.kernels.triton_ops import batch_norm as triton_batch_norm
from tests.interpreter.device import imitate
from tests.kernels.holding import assert_no_worse_than_twice_eager
from tests.kernels.norms import ANY_NORM, NORM_CASES, NormCase, arguments, check_batch_norm, last


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    imitate(monkeypatch)


def test_numbers() -> None:
    measured = [(case, check_batch_norm(case, "triton")) for case in NORM_CASES]
    assert_no_worse_than_twice_eager(
        (f"{name} {case.dtype}", error) for case, errors in measured for name, error in errors.items()
    )


@settings(max_examples=15, deadline=None)
@given(
    case=ANY_NORM,
    programs=st.integers(1, 8),
    values=st.sampled_from((256, 4096)),
)
def test_numbers_of_any_shape_and_division(case: NormCase, programs: int, values: int) -> None:
    """Many parts, whose last one may be short, and programs that go over several tiles."""
    with pytest.MonkeyPatch.context() as patch:
        imitate(patch)
        for name, number in {"_VALUES": values, "_SUMMING": programs, "_APPLYING": programs + 1}.items():
            patch.setattr(triton_batch_norm, name, number)
        check_batch_norm(case, "triton")


def test_float16() -> None:
    """A CPU's maps are never float16, so the kernels are called by themselves."""
    case = NormCase((3, 20, 5, 5), residual=True, relu=True)
    given = {name: value.half() if value.dim() == 4 else value for name, value in arguments(case).items()}
    wide = {name: last(value.float()) if value.dim() == 4 else value for name, value in given.items()}
    found, expected = (
        triton_batch_norm.batch_norm(
            call["x"], call["weight"], call["bias"], None, None, call["residual"], 0.1, 1e-5, True
        )
        for call in (given, wide)
    )
    assert found[0].dtype == torch.float16
    assert torch.equal(found[0], expected[0].half())
    assert torch.equal(found[1], expected[1])
