"""The Triton kernels, run by Triton's interpreter on a CPU over the table of cases.

In a process of its own, as triton reads the variable when it is imported:

    TRITON_INTERPRET=1 pytest tests/interpreter
"""

from __future__ import annotations

import functools
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("it takes a process of its own: TRITON_INTERPRET=1 pytest tests/interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from engine.kernels import crop_flip, distill_loss
from engine.kernels.triton_ops.distill_loss import tile
from tests.interpreter.device import imitate
from tests.kernels import cases
from tests.kernels.holding import Errors, assert_no_worse_than_twice_eager

PROGRAMS = 20  # of a launch; each takes some milliseconds

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what a mask then drops


@pytest.fixture(autouse=True)
def triton_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    imitate(monkeypatch)
    monkeypatch.setenv("ENGINE_KERNELS", "triton")


# ---------------------------------------------------------------- the interpreter itself


@triton.jit
def _convert(source, target, SIZE: tl.constexpr):
    numbers = tl.arange(0, SIZE)
    tl.store(target + numbers, tl.load(source + numbers).to(target.dtype.element_ty))


@triton.jit
def _double(numbers):
    tl.store(numbers, tl.load(numbers) + tl.load(numbers))


@triton.jit
def _fma(x, y, z, result):
    tl.store(result, tl.fma(tl.load(x), tl.load(y), tl.load(z)))


def test_conversions_to_and_from_bfloat16_are_torchs() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    single = torch.empty(2**16)
    _convert[(1,)](every, single, 2**16)
    assert torch.equal(single.nan_to_num(7), every.float().nan_to_num(7))

    between = (torch.arange(2**17, dtype=torch.int64) * 2**15 + torch.arange(2**17) % 3 - 1).to(torch.int32)
    numbers = between.view(torch.float32)
    rounded = torch.empty(2**17, dtype=torch.bfloat16)
    _convert[(1,)](numbers, rounded, 2**17)
    assert torch.equal(rounded.nan_to_num(7), numbers.bfloat16().nan_to_num(7))


def test_arithmetic_in_bfloat16_is_refused() -> None:
    with pytest.raises(InterpreterError, match="bfloat16"):
        _double[(1,)](torch.ones(1, dtype=torch.bfloat16))


def test_fma_rounds_once() -> None:
    x, result = torch.tensor([1 + 2.0**-23]), torch.empty(1)
    _fma[(1,)](x, x, torch.tensor([-1 - 2.0**-22]), result)
    assert result.item() == 2.0**-46


# ---------------------------------------------------------------- the table


def quick(case: cases.LossCase | cases.CropCase) -> bool:
    if isinstance(case, cases.LossCase):
        return case.batch <= PROGRAMS * tile(case.classes).rows and case.dtypes != (cases.DOUBLE,)
    return case.batch * case.size[0] * case.size[1] * case.channels <= PROGRAMS * 1024 and case.dtype == cases.SINGLE


LOSS_CASES = [case for case in cases.LOSS_CASES if quick(case)]
PGD_CASES = [case for case in cases.PGD_CASES if case.dtype == cases.SINGLE]
CROP_CASES = [case for case in cases.CROP_CASES if quick(case)]

# What is measured case by case is read again over all of them.
measure_distill_loss = functools.cache(cases.check_distill_loss)
measure_pgd_update = functools.cache(cases.check_pgd_update)


@pytest.mark.parametrize("case", LOSS_CASES, ids=str)
def test_distill_loss(case: cases.LossCase) -> None:
    measure_distill_loss(case, "triton")


def test_distill_loss_is_no_worse_than_twice_eager() -> None:
    errors: list[tuple[str, Errors]] = []
    for case in LOSS_CASES:
        dtypes = {"grad_adv": case.dtypes[0], "grad_nat": case.dtypes[1 % len(case.dtypes)]}
        measured = measure_distill_loss(case, "triton")
        errors += [(f"{name} {dtypes.get(name, '')}", error) for name, error in measured.items()]
    assert_no_worse_than_twice_eager(errors)


@pytest.mark.parametrize("case", PGD_CASES, ids=str)
def test_pgd_update(case: cases.PgdCase) -> None:
    measure_pgd_update(case, "triton")


def test_pgd_update_is_no_worse_than_twice_eager() -> None:
    assert_no_worse_than_twice_eager(
        error for case in PGD_CASES for error in measure_pgd_update(case, "triton").items()
    )


@pytest.mark.parametrize("case", CROP_CASES, ids=str)
def test_crop_flip(case: cases.CropCase) -> None:
    cases.check_crop_flip(case, "triton")
