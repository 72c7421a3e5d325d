"""The update of weights on a device: values, and a captured update that is replayed."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import sgd_update
from tests.gpu.stage import by_implementation, captured, no_wait
from tests.kernels.sgd_cases import CASES, SgdCase, check, make


@by_implementation("sgd_update")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_update_written_out(implementation: str, device: str, case: SgdCase) -> None:
    check(case, device)


@by_implementation("sgd_update")
def test_the_host_does_not_wait(implementation: str, device: str) -> None:
    tensors, numbers = make(SgdCase(lr_on_device=True), device)
    sgd_update(tensors, numbers)
    with no_wait():
        sgd_update(tensors, numbers)


@by_implementation("sgd_update")
def test_a_replayed_update_has_the_bits_of_one_that_is_not_captured(implementation: str, device: str) -> None:
    case = SgdCase(half=torch.float16, scaled=True, lr_on_device=True)
    (tensors, numbers), (others, _) = make(case, device), make(case, device)
    own = (tensors.weights, tensors.momenta, tensors.gradients)
    start = [[value.clone() for value in values] for values in own]
    gradients = start[-1]  # the reference divides them in place
    table = sgd_update(tensors, numbers)
    graph, kept = captured(lambda: sgd_update(tensors, numbers, table))
    for values, before in zip(own, start, strict=True):
        torch._foreach_copy_(values, before)
    for _ in range(3):
        graph.replay()
        torch._foreach_copy_(tensors.gradients, gradients)
        sgd_update(others, numbers)
        torch._foreach_copy_(others.gradients, gradients)
    assert kept is table
    halves = [half for half in tensors.halves if half is not None]
    other_halves = [half for half in others.halves if half is not None]
    for left, right in ((own[0], others.weights), (own[1], others.momenta), (halves, other_halves)):
        assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))
