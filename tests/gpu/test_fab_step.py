"""The step of FAB on a CUDA device: values, streams, graphs, and no wait."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels import fab_step
from tests.gpu.stage import by_implementation, captured, needs_two_devices, no_wait, on_a_busy_stream
from tests.kernels.fab_cases import FAB_CASES, FabCase, arguments, check_fab_step, check_many_corners, uneven

pytestmark = by_implementation("fab_step")
each_norm = pytest.mark.parametrize("threat_model", ["Linf", "L2"])


def case_of(threat_model: str) -> FabCase:
    return FabCase((8, 3, 32, 32), threat_model, reach=-0.1)


@pytest.mark.parametrize("case", FAB_CASES, ids=str)
def test_it_equals_numpy_image_by_image(implementation: str, device: str, case: FabCase) -> None:
    check_fab_step(case, implementation, device)


@each_norm
def test_images_of_many_blocks(implementation: str, device: str, threat_model: str) -> None:
    check_fab_step(
        FabCase((4, 3, 224, 224), threat_model, uneven, layout=torch.channels_last), implementation, device
    )


@each_norm
def test_pixels_that_reach_the_border_one_by_one(implementation: str, device: str, threat_model: str) -> None:
    check_many_corners(threat_model, implementation, device)


@each_norm
def test_the_host_does_not_wait(implementation: str, device: str, threat_model: str) -> None:
    case = case_of(threat_model)
    given, again = arguments(case, device), arguments(case, device)
    expected = fab_step(*given, **case.keys)
    with no_wait():
        got = fab_step(*again, **case.keys)
    assert torch.equal(got, expected)


@each_norm
def test_a_captured_graph_steps_at_every_replay(implementation: str, device: str, threat_model: str) -> None:
    case = case_of(threat_model)
    given, fresh = arguments(case, device), arguments(case, device)
    graph, x_adv = captured(lambda: fab_step(*given, **case.keys))
    x_adv.copy_(fresh[0])
    for _ in range(3):
        for _, grad in (given[1:3], fresh[1:3]):
            grad.copy_(grad.flip(0))
        graph.replay()
        assert torch.equal(x_adv, fab_step(*fresh, **case.keys))


@each_norm
def test_it_runs_on_the_current_stream(implementation: str, device: str, threat_model: str) -> None:
    case = case_of(threat_model)
    expected = fab_step(*arguments(case, device), **case.keys)
    given = arguments(case, device)
    right = given[2].clone()
    given[2].zero_()

    def work() -> Tensor:
        given[2].copy_(right)
        return fab_step(*given, **case.keys)

    assert torch.equal(on_a_busy_stream(work), expected)


@needs_two_devices
@each_norm
def test_it_runs_where_its_tensors_are(implementation: str, threat_model: str) -> None:
    assert torch.cuda.current_device() == 0
    check_fab_step(case_of(threat_model), implementation, "cuda:1")
