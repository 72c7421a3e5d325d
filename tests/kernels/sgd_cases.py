"""Weights for `sgd_update`, and the update written out in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import SgdNumbers, SgdTensors, sgd_update

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
SHAPES = ((6, 5, 3, 3), (6,), (7, 5, 1, 1), (10, 64), (), (70, 70), (2048,), (2049,), (0, 3))
LR, SCALE = 0.1, 8.0


@dataclass(frozen=True)
class SgdCase:
    """Weights of these shapes, in channels-last where they are of a convolution.

    half: of the gradients and copies of each second weight; None: all are float32, and there are no copies.
    scaled: with a gradient scaler, which has divided nothing yet. found_inf: it has found what is not finite.
    strided: gradients in another order of memory. turned: momenta in another one. gaps: weights with gaps.
    """

    shapes: tuple[tuple[int, ...], ...] = SHAPES
    half: torch.dtype | None = BRAIN
    momentum: float = 0.9
    decay: float = 5e-3
    nesterov: bool = False
    scaled: bool = False
    found_inf: bool = False
    lr_on_device: bool = False
    strided: bool = False
    turned: bool = False
    gaps: bool = False
    dtype: torch.dtype = SINGLE
    seed: int = 0


CASES = [
    SgdCase(),
    SgdCase(nesterov=True, half=HALF, scaled=True, lr_on_device=True),
    SgdCase(half=None, momentum=0.0),
    SgdCase(momentum=0.0, decay=0.0),
    SgdCase(scaled=True, found_inf=True, half=HALF),
    SgdCase(strided=True),
    SgdCase(turned=True),
    SgdCase(gaps=True, nesterov=True),
    SgdCase(shapes=((3, 4, 3, 3),)),
    SgdCase(shapes=((0, 4),)),
    SgdCase(shapes=()),
]


def make(case: SgdCase, device: str = "cpu") -> tuple[SgdTensors, SgdNumbers]:
    """The tensors and numbers of a case, on a device."""
    generator = torch.Generator().manual_seed(case.seed)

    def drawn(shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)
        values = values.to(memory_format=torch.channels_last) if len(shape) == 4 else values
        if case.gaps:
            values = torch.stack((values, values), dim=-1)[..., 0]
        return values

    weights = [drawn(shape) for shape in case.shapes]
    momenta = [drawn(shape) for shape in case.shapes] if case.momentum else []
    if case.turned:
        momenta = [momentum.contiguous() for momentum in momenta]
    gradients: list[Tensor] = []
    halves: list[Tensor | None] = []
    for number, weight in enumerate(weights):
        is_half = case.half is not None and number % 2 == 0
        gradient = torch.randn(weight.shape, generator=generator) * (SCALE if case.scaled else 1.0)
        if not case.strided and weight.dim() == 4:
            gradient = gradient.to(memory_format=torch.channels_last)
        gradients.append(gradient.to(case.half if is_half else case.dtype))
        halves.append(torch.zeros_like(weight, dtype=case.half).copy_(weight) if is_half else None)
    numbers = SgdNumbers(
        torch.tensor(LR, device=device) if case.lr_on_device else LR,
        case.momentum,
        case.decay,
        case.nesterov,
        torch.tensor(SCALE, device=device) if case.scaled else None,
        torch.tensor(float(case.found_inf), device=device) if case.scaled else None,
    )
    tensors = SgdTensors(
        [weight.to(device) for weight in weights],
        [gradient.to(device) for gradient in gradients],
        [momentum.to(device) for momentum in momenta],
        [None if half is None else half.to(device) for half in halves],
    )
    return tensors, numbers


def check(case: SgdCase, device: str = "cpu") -> None:
    """The op writes what the update written out in float64 gives, in place; each copy is its weight, rounded."""
    tensors, numbers = make(case, device)
    before = [[value.double().clone() for value in values] for values in (tensors.weights, tensors.momenta)]
    gradients = [gradient.double().clone() for gradient in tensors.gradients]
    versions = [weight._version for weight in tensors.weights]
    sgd_update(tensors, numbers)
    assert all(weight._version > seen for weight, seen in zip(tensors.weights, versions, strict=True))
    within = 1e-6 if case.dtype == SINGLE else 1e-14
    for place, (weight, half) in enumerate(zip(tensors.weights, tensors.halves, strict=True)):
        momentum = before[1][place] if case.momentum else None
        expected, expected_momentum = _updated(
            case, float(numbers.lr), before[0][place], gradients[place], momentum
        )
        torch.testing.assert_close(weight.double(), expected, rtol=within, atol=within)
        if expected_momentum is not None:
            torch.testing.assert_close(
                tensors.momenta[place].double(), expected_momentum, rtol=within, atol=within
            )
        if half is not None:
            assert torch.equal(half, weight.to(half.dtype))


def _updated(
    case: SgdCase, lr: float, weight: Tensor, gradient: Tensor, momentum: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if case.scaled and case.found_inf:
        return weight, momentum
    direction = gradient / (SCALE if case.scaled else 1.0) + case.decay * weight
    if momentum is not None:
        momentum = case.momentum * momentum + direction
        direction = direction + case.momentum * momentum if case.nesterov else momentum
    return weight - lr * direction, momentum


def any_case(dtypes: tuple[torch.dtype, ...]) -> st.SearchStrategy[SgdCase]:
    """Any few weights, of these formats."""
    side = st.integers(0, 9)
    shapes = st.one_of(
        st.tuples(), st.tuples(st.integers(0, 9000)), st.tuples(side, side), st.tuples(side, side, side, side)
    )
    return st.builds(
        SgdCase,
        shapes=st.lists(shapes, max_size=9).map(tuple),
        half=st.sampled_from((None, HALF, BRAIN)),
        momentum=st.sampled_from((0.9, 0.5)),
        decay=st.sampled_from((0.0, 0.01)),
        nesterov=st.booleans(),
        scaled=st.booleans(),
        found_inf=st.booleans(),
        lr_on_device=st.booleans(),
        strided=st.booleans(),
        turned=st.booleans(),
        gaps=st.booleans(),
        dtype=st.sampled_from(dtypes),
        seed=st.integers(0, 2**31),
    )
