"""The Triton kernels, run by Triton's interpreter on a CPU over the table of cases.

In a process of its own, as triton reads the variable when it is imported:

    TRITON_INTERPRET=1 pytest tests/interpreter
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "it takes a process of its own: TRITON_INTERPRET=1 pytest tests/interpreter", allow_module_level=True
    )
pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.errors import InterpreterError

from engine.kernels import Term, crop_flip, dispatch, distill_loss
from engine.kernels.contract import KINDS
from engine.kernels.triton_ops import distill_loss as triton_distill_loss
from engine.kernels.triton_ops.distill_loss import tile
from tests.interpreter.device import imitate
from tests.kernels import cases
from tests.kernels.holding import Errors, assert_no_worse_than_twice_eager

PROGRAMS = 32  # of a launch; each takes some milliseconds

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
    return (
        case.batch * case.size[0] * case.size[1] * case.channels <= PROGRAMS * 1024 and case.dtype == cases.SINGLE
    )


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
        dtypes = {"grad_s_adv": case.dtypes[0], "grad_s_nat": case.dtypes[1 % len(case.dtypes)]}
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


# ---------------------------------------------------------------- random tables of terms

STUDENT, TEACHERS = ("s_adv", "s_nat", "s_difference"), ("t_at_adv", "t_at_nat")
WEIGHTS = st.floats(-2, 2, width=16)


@st.composite
def random_terms(draw: st.DrawFn) -> list[Term]:
    """Up to six terms, of any kind, whose targets are a teacher's or the student's, and which may repeat."""
    terms = []
    for _ in range(draw(st.integers(1, 6))):
        kind, student = draw(st.sampled_from(list(KINDS))), draw(st.sampled_from(STUDENT))
        others = [name for name in (*TEACHERS, *STUDENT) if name != student]
        target = draw(st.sampled_from(others)) if KINDS[kind] else None
        temperature = draw(st.sampled_from((1.0, 0.5, 4.0))) if KINDS[kind] else 1.0
        weight = (draw(WEIGHTS), draw(st.just(0.0) | WEIGHTS))
        factor = draw(st.sampled_from((None, "f", "g")))
        terms.append(Term(kind, student, target, weight, temperature, draw(st.booleans()), factor))
    return terms


@settings(max_examples=60, deadline=None)
@given(
    terms=random_terms(),
    classes=st.integers(2, 20),
    learning=st.sets(st.sampled_from((*STUDENT, *TEACHERS))),
    trusting=st.booleans(),
    label_smoothing=st.sampled_from((0.0, 0.1)),
    seed=st.integers(0, 99),
)
def test_random_terms_agree_with_the_reference_in_float64(
    terms: list[Term], classes: int, learning: set[str], trusting: bool, label_smoothing: float, seed: int
) -> None:
    """Values, and the gradient to each of the logits that ask for one, a teacher's among them."""
    generator = torch.Generator().manual_seed(seed)
    values = {name: 2 * torch.randn(5, classes, generator=generator) for name in (*STUDENT, *TEACHERS)}
    labels = torch.randint(classes, (5,), generator=generator)
    factors = {name: 2 * torch.rand(5, generator=generator) for name in ("f", "g")}
    found = []
    for dtype in (torch.float32, torch.float64):  # in which the reference serves
        call = {
            "logits": {
                name: one.to(dtype, copy=True).requires_grad_(name in learning) for name, one in values.items()
            },
            "labels": labels,
            "terms": terms,
            "trust": "t_at_adv" if trusting or any(term.weight[1] for term in terms) else None,
            "factors": factors,
            "label_smoothing": label_smoothing,
        }
        found.append({name: value.double() for name, value in cases.call_distill_loss(call).items()})
    got, right = found
    assert got.keys() == right.keys()
    for name, value in got.items():
        assert torch.allclose(value, right[name], rtol=1e-4, atol=1e-5), name


def test_the_kernel_computes_what_is_declared() -> None:
    assert dispatch.COMPUTES["distill_loss"]["triton"] == frozenset(triton_distill_loss._KINDS)


def test_a_kind_that_is_not_declared_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.setitem(dispatch.COMPUTES, "distill_loss", {"triton": frozenset({"ce"})})
    (s_adv,), labels, terms = logits(1, 5, 7), torch.arange(5), [Term("margin", "s_adv"), Term("ce", "s_adv")]
    with pytest.warns(UserWarning, match="triton implementation does not compute margin: the reference serves"):
        found = distill_loss({"s_adv": s_adv}, labels, terms)
    monkeypatch.setenv("ENGINE_KERNELS", "reference")
    assert torch.equal(found.loss, distill_loss({"s_adv": s_adv}, labels, terms).loss)


# ---------------------------------------------------------------- what the table does not ask


def logits(count: int, batch: int, classes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, classes, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_backward_multiplies_by_the_gradient_from_above(dtype: torch.dtype) -> None:
    s_adv, s_nat = (one.requires_grad_() for one in logits(2, 5, 100, dtype))
    labels = torch.arange(5)
    named = {"s_adv": s_adv, "s_nat": s_nat}
    loss = distill_loss(named, labels, [Term("kl", "s_adv", "s_nat")]).loss
    plain = torch.autograd.grad(loss, (s_adv, s_nat), retain_graph=True)
    scaled = torch.autograd.grad(-4 * loss, (s_adv, s_nat))
    for one, other in zip(plain, scaled, strict=True):
        assert one.abs().max() > 0
        info = torch.finfo(dtype)
        torch.testing.assert_close(other, -4 * one, rtol=info.eps, atol=4 * info.smallest_normal * info.eps)


@pytest.mark.parametrize("shift", [1e-1, 1e-2, 1e-3])
def test_a_divergence_keeps_its_digits_where_the_distributions_are_close(shift: float) -> None:
    """Eager torch has none left at 1e-3."""
    s_adv, away = logits(2, 7, 10)
    t_at_nat = s_adv + shift * away
    named = {"s_adv": s_adv, "t_at_nat": t_at_nat}
    labels = torch.zeros(7, dtype=torch.int64)
    terms = distill_loss(named, labels, [Term("kl", "s_adv", "t_at_nat", temperature=2.0)]).terms
    p, q = ((one.double() / 2).log_softmax(dim=1) for one in (t_at_nat, s_adv))
    exactly = (p.exp() * (p - q)).sum(dim=1).mean()
    torch.testing.assert_close(terms[0].double(), exactly, rtol=2e-6 + 1e-7 / shift, atol=0)


def test_alpha_is_finite_where_the_label_has_probability_zero() -> None:
    t_at_adv = torch.tensor([[-torch.inf, 1.0, 2.0], [0.0, -3e38, 1e4], [1e4, -1e4, 0.0]])
    labels, named = torch.tensor([0, 1, 0]), {"s_adv": torch.zeros(3, 3), "t_at_adv": t_at_adv}
    terms = [Term("ce", "s_adv", weight=(0.0, 1.0))]
    for beta, expected in ((0.0, [1, 1, 1]), (0.1, [0, 0, 1])):
        result = distill_loss(named, labels, terms, trust="t_at_adv", beta=beta)
        assert result.alpha.tolist() == expected
        assert result.loss.isfinite()


@pytest.mark.parametrize("label", [-1, 10, 2**31, -(2**40)])
def test_a_label_out_of_range_is_refused(label: int) -> None:
    (s_adv,) = logits(1, 3, 10)
    with pytest.raises(InterpreterError, match="a label is out of range"):
        distill_loss({"s_adv": s_adv}, torch.tensor([0, label, 9]), [Term("ce", "s_adv")])


@pytest.mark.parametrize("wrong", [-1, 6, 2**40, -(2**40)])
@pytest.mark.parametrize("name", ["sample_B", "index_B"])
@pytest.mark.parametrize("asserting", [True, False])
def test_an_image_out_of_range_is_refused_and_never_read(
    name: str, wrong: int, asserting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2**40 images on, this process owns no memory."""
    imitate(monkeypatch, asserting=asserting)
    images = torch.full((6, 4, 4, 3), 255, dtype=torch.uint8)

    def crop() -> tuple[Tensor, Tensor]:
        samples: dict[str, Any] = {"sample_B": torch.tensor([0, 1])} | {name: torch.tensor([5, wrong])}
        return crop_flip(images, torch.arange(6), **samples, seed=0, epoch=0, augment=False)

    if asserting:
        with pytest.raises(InterpreterError, match="an image is out of range"):
            crop()
    else:
        x, labels = crop()
        assert labels.tolist() == [5, -1]
        assert x[0].eq(1).all()
        assert x[1].eq(0).all()


def test_every_pixel_value_is_its_quotient_by_255() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    x, _ = crop_flip(images, torch.tensor([0]), torch.tensor([0]), seed=0, epoch=0, augment=False)
    assert x.flatten().tolist() == (torch.arange(256, dtype=torch.float32) / torch.tensor(255.0)).tolist()
