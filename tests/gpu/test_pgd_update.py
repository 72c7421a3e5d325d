"""`pgd_update` on a CUDA device: the table of inputs, and how it behaves there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import pgd_update
from tests.gpu.stage import by_implementation, captured, needs_two_devices, no_wait, on_a_busy_stream
from tests.kernels import cases
from tests.kernels.cases import PGD_CASES, PgdCase, check_pgd_update
from tests.kernels.holding import assert_no_worse_than_twice_eager

pytestmark = by_implementation("pgd_update")

measure = functools.cache(check_pgd_update)
each_norm = pytest.mark.parametrize("threat_model", ["Linf", "L2"])


def case_of(threat_model: str) -> PgdCase:
    return PgdCase(
        shape=(16, 3, 32, 32),
        threat_model=threat_model,
        gradient=cases.sparse,
        grad_dtype=cases.HALF,
        layouts=(cases.channels_last, cases.contiguous, cases.channels_last),
        epsilon=0.3,
        step_size=0.1,
        counting=True,
    )


@pytest.mark.parametrize("case", PGD_CASES, ids=str)
def test_table(implementation: str, device: str, case: PgdCase) -> None:
    measure(case, implementation, device)


def test_table_is_no_worse_than_twice_eager(implementation: str, device: str) -> None:
    assert_no_worse_than_twice_eager(
        error for case in PGD_CASES for error in measure(case, implementation, device).items()
    )


def step(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return pgd_update(**arguments), arguments["counts"]


@pytest.mark.usefixtures("implementation")
@each_norm
def test_the_host_does_not_wait(device: str, threat_model: str) -> None:
    expected = step(case_of(threat_model).arguments(device))
    arguments = case_of(threat_model).arguments(device)
    with no_wait():
        got = step(arguments)
    assert all(map(torch.equal, got, expected))


@pytest.mark.usefixtures("implementation")
@each_norm
def test_a_captured_graph_steps_at_every_replay(device: str, threat_model: str) -> None:
    case = case_of(threat_model)
    arguments, fresh = case.arguments(device), case.arguments(device)
    graph, outputs = captured(lambda: step(arguments))
    arguments["x_adv"].copy_(fresh["x_adv"])
    arguments["counts"].copy_(fresh["counts"])
    for _ in range(3):
        arguments["grad"].copy_(arguments["grad"].flip(0))
        fresh["grad"].copy_(fresh["grad"].flip(0))
        graph.replay()
        assert all(map(torch.equal, outputs, step(fresh)))


@pytest.mark.usefixtures("implementation")
@each_norm
def test_it_runs_on_the_current_stream(device: str, threat_model: str) -> None:
    expected = step(case_of(threat_model).arguments(device))
    arguments = case_of(threat_model).arguments(device)
    right = arguments["grad"].clone()
    arguments["grad"].zero_()

    def work() -> tuple[Tensor, Tensor]:
        arguments["grad"].copy_(right)
        return step(arguments)

    assert all(map(torch.equal, on_a_busy_stream(work), expected))


@pytest.mark.usefixtures("implementation")
@each_norm
def test_its_bits_are_the_same_from_run_to_run(device: str, threat_model: str) -> None:
    expected = step(case_of(threat_model).arguments(device))
    for _ in range(20):
        assert all(map(torch.equal, step(case_of(threat_model).arguments(device)), expected))


@needs_two_devices
@each_norm
def test_it_runs_where_its_tensors_are(implementation: str, threat_model: str) -> None:
    assert torch.cuda.current_device() == 0
    check_pgd_update(case_of(threat_model), implementation, "cuda:1")


@each_norm
def test_addresses_and_counts_of_more_than_31_bits(
    implementation: str, device: str, threat_model: str, memory: Callable[[float], None]
) -> None:
    if implementation == "reference":
        pytest.skip("eager torch needs four times the memory")
    rows, columns = 2**19 + 1, 4096
    memory(10 * rows * columns / 1e9 + 1)
    x_adv, x_nat = (torch.zeros(rows, columns, device=device) for _ in range(2))
    grad = torch.zeros(rows, columns, device=device, dtype=cases.BRAIN)
    grad[-1] = 1
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    pgd_update(x_adv, grad, x_nat, threat_model=threat_model, epsilon=64, step_size=32, counts=counts)
    assert counts.tolist() == [(rows - 1) * columns, 0]
    assert bool((x_adv[-1] == (1 if threat_model == "Linf" else 0.5)).all())
    assert not x_adv[:-1].any()
