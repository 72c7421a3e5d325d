"""`distill_loss` on a CUDA device: the table of inputs, and how it behaves there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.stage import (
    assert_the_device_refuses,
    by_implementation,
    captured,
    needs_two_devices,
    no_wait,
    on_a_busy_stream,
)
from tests.kernels import cases
from tests.kernels.cases import LOGITS, LOSS_CASES, LossCase, call_distill_loss, check_distill_loss
from tests.kernels.holding import Errors, assert_no_worse_than_twice_eager, assert_same_bits

pytestmark = by_implementation("distill_loss")

measure = functools.cache(check_distill_loss)

LARGE = [case for case in LOSS_CASES if case.batch * case.classes > 2_000_000]
SMALL = [case for case in LOSS_CASES if case not in LARGE]

CASE = LossCase(
    batch=256,
    classes=100,
    logits=cases.normal,
    dtypes=(cases.SINGLE,),
    layouts=(cases.contiguous,),
    terms=cases.table_1(cases.RANDOM_ROWS[0], tau=2.5, tau_self=0.8),
    beta=0.3,
    label_smoothing=0.1,
    sample_weights=(cases.SINGLE, cases.contiguous),
    spare=True,
)
OTHER = replace(CASE, logits=cases.near)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_table(implementation: str, device: str, case: LossCase) -> None:
    measure(case, implementation, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_table_of_many_samples_and_classes(implementation: str, device: str, case: LossCase) -> None:
    check_distill_loss(case, implementation, device)


def test_table_is_no_worse_than_twice_eager(implementation: str, device: str) -> None:
    """The gradients of each dtype by themselves: float16 rounds more than the arithmetic before it."""
    errors: list[tuple[str, Errors]] = []
    for case in SMALL:
        dtypes = {f"grad_{name}": case.dtypes[i % len(case.dtypes)] for i, name in enumerate(LOGITS)}
        measured = measure(case, implementation, device)
        errors += [(f"{name} {dtypes.get(name, '')}", error) for name, error in measured.items()]
    assert_no_worse_than_twice_eager(errors)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("batch", [0, 256])
def test_the_host_does_not_wait(device: str, batch: int) -> None:
    arguments = replace(CASE, batch=batch).arguments(device)
    expected = call_distill_loss(arguments)
    with no_wait():
        got = call_distill_loss(arguments)
    assert_same_bits(got, expected)


def fill(arguments: dict[str, Any], other: dict[str, Any]) -> None:
    with torch.no_grad():
        for name in LOGITS:
            arguments["logits"][name].copy_(other["logits"][name])


@pytest.mark.usefixtures("implementation")
def test_a_captured_graph_gives_the_same_bits_for_new_logits(device: str) -> None:
    arguments, other = CASE.arguments(device), OTHER.arguments(device)
    graph, outputs = captured(lambda: call_distill_loss(arguments))
    for _ in range(2):
        fill(arguments, other)
        graph.replay()
        assert_same_bits(outputs, call_distill_loss(other))


@pytest.mark.usefixtures("implementation")
def test_it_runs_on_the_current_stream(device: str) -> None:
    arguments, other = CASE.arguments(device), OTHER.arguments(device)
    expected = call_distill_loss(other)
    call_distill_loss(arguments)

    def work() -> dict[str, Tensor]:
        fill(arguments, other)
        return call_distill_loss(arguments)

    assert_same_bits(on_a_busy_stream(work), expected)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [cases.SINGLE, cases.HALF, cases.BRAIN])
def test_its_bits_are_the_same_from_run_to_run(device: str, dtype: torch.dtype) -> None:
    arguments = replace(CASE, batch=4096, classes=200, dtypes=(dtype,)).arguments(device)
    expected = call_distill_loss(arguments)
    for _ in range(20):
        assert_same_bits(call_distill_loss(arguments), expected)


@needs_two_devices
def test_it_runs_where_its_tensors_are(implementation: str) -> None:
    assert torch.cuda.current_device() == 0
    check_distill_loss(CASE, implementation, "cuda:1")
    assert {value.device.index for value in call_distill_loss(CASE.arguments("cuda:1")).values()} == {1}


@pytest.mark.parametrize("label", [5, -1, -100, 2**32])
def test_a_label_out_of_range_is_refused_on_the_device(implementation: str, label: int) -> None:
    assert_the_device_refuses(
        f"""
import torch
from engine.kernels import Term, distill_loss
logits = torch.zeros(2, 5, device="cuda", requires_grad=True)
labels = torch.tensor([1, {label}], device="cuda")
distill_loss({{"s": logits}}, labels, [Term("ce", "s")])
""",
        implementation,
    )


@pytest.mark.usefixtures("implementation")
def test_addresses_of_more_than_31_bits(device: str, memory: Callable[[float], None]) -> None:
    memory(7)
    case = replace(CASE, batch=4, dtypes=(cases.HALF,))
    near = case.arguments(device)
    room = torch.empty(3 * 2**30 + case.classes, dtype=cases.HALF, device=device)
    first = near["logits"]["s_adv"]
    far = near | {"logits": {name: room.as_strided((4, case.classes), (2**30, 1)) for name in LOGITS}}
    fill(far, {"logits": dict.fromkeys(LOGITS, first)})
    same = near | {"logits": {name: first.detach().clone() for name in LOGITS}}
    for call in (far, same):
        call["logits"] |= {name: call["logits"][name].detach().requires_grad_() for name in cases.STUDENT}
    got, expected = call_distill_loss(far), call_distill_loss(same)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)
