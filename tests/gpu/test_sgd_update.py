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
    gradients = start[-1]
    table = sgd_update(tensors, numbers)
    graph, kept = captured(lambda: sgd_update(tensors, numbers, table))
    for values, before in zip(own, start, strict=True):
        assert all(a is None or torch.equal(a, b) for a, b in zip(left, right, strict=True))
