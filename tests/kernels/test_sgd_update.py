"""The update of weights by the reference against float64 and torch's SGD, and what the op refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings

from engine.kernels import SgdNumbers, SgdTensors, dispatch, reference, sgd_update
from tests.kernels.sgd_cases import CASES, SgdCase, any_case, check, make


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_update_written_out(case: SgdCase, dtype: torch.dtype) -> None:
    check(SgdCase(**{**vars(case), "dtype": dtype}))


@settings(max_examples=100, deadline=None)
@given(any_case((torch.float32, torch.float64)))
def test_any_weights(case: SgdCase) -> None:
    check(case)


@pytest.mark.parametrize("nesterov", [False, True])
def test_in_float32_the_bits_are_those_of_torch_s_optimizer(nesterov: bool) -> None:
    tensors, numbers = make(SgdCase(nesterov=nesterov, half=torch.bfloat16))
    others = [weight.clone() for weight in tensors.weights]
    torch_s = torch.optim.SGD(
        others, lr=0.1, momentum=0.9, weight_decay=numbers.weight_decay, nesterov=nesterov, fused=True
    )
    for weight, gradient, momentum in zip(others, tensors.gradients, tensors.momenta, strict=True):
        weight.grad = gradient.float()
        torch_s.state[weight]["momentum_buffer"] = momentum.clone()
    sgd_update(tensors, numbers)
    torch_s.step()
    for weight, other in zip(tensors.weights, others, strict=True):
        assert torch.equal(weight, other)


def test_the_reference_can_be_compiled() -> None:
    """In one graph, though torch's fused SGD cannot be: the benchmark compares with it."""
    eager, numbers = make(SgdCase(half=torch.bfloat16))
    traced = make(SgdCase(half=torch.bfloat16))[0]
    reference.sgd_update(eager, numbers)
    torch.compile(reference.sgd_update, backend="aot_eager", fullgraph=True)(traced, numbers)
    for mine, expected in zip((*traced.weights, *traced.momenta), (*eager.weights, *eager.momenta), strict=True):
        torch.testing.assert_close(mine, expected)


def changed(**fields: Any) -> SgdTensors:
    return make(SgdCase(shapes=((2, 3), (4,))))[0]._replace(**fields)


ONES = [torch.ones(2, 3), torch.ones(4)]


@pytest.mark.parametrize(
    ("tensors", "numbers", "message"),
    [
        (changed(gradients=ONES[:1]), SgdNumbers(0.1, 0.9), "tensors: expected one of each .* 1 gradients"),
        (changed(), SgdNumbers(0.1), "tensors: expected one of each .* 2 momenta"),
        (changed(momenta=[]), SgdNumbers(0.1, nesterov=True), "nesterov: it needs a momentum"),
        (changed(gradients=ONES[::-1]), SgdNumbers(0.1, 0.9), "tensors: .* one shape, got"),
        (changed(momenta=[one.half() for one in ONES]), SgdNumbers(0.1, 0.9), "tensors: .* one floating dtype"),
        (changed(gradients=[one.long() for one in ONES]), SgdNumbers(0.1, 0.9), "tensors: .* one floating dtype"),
        (changed(), SgdNumbers(torch.ones(1), 0.9), r"lr: expected a \(\) float32"),
        (changed(), SgdNumbers(0.1, 0.9, found_inf=torch.ones((), device="meta")), "one device is needed"),
        (changed(gradients=[one.to("meta") for one in ONES]), SgdNumbers(0.1, 0.9), "one device is needed"),
    ],
)
def test_what_does_not_fit_is_refused(tensors: SgdTensors, numbers: SgdNumbers, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sgd_update(tensors, numbers)


def test_there_is_one_for_a_cpu_and_triton_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGINE_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "missing", lambda *_: "")
    assert dispatch.choose("sgd_update", torch.device("cpu")) == "reference"
    assert dispatch.choose("sgd_update", torch.device("cuda")) == "triton"
