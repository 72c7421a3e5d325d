"""Steps of AutoAttack on a GPU, seen by a mock of its driver: captured as a graph, without waiting."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import models
from engine.attacks.auto import standard
from engine.attacks.auto.search import Ball, Start
from engine.attacks.auto.slots import Slots, Stepper
from engine.attacks.auto.standard import AutoAttack
from engine.attacks.pgd import NORMS
from tests.fake_cuda import FakeCuda
from tests.fake_cuda.journal import of, recorded

PARTS = tuple(standard._SEARCHES)
CLASSES, SIZE, NUM_STEPS, IMAGES = 4, 8, 6, 3


class Waiting(nn.Module):
    """A network that asks the device for a number in each pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits if logits.sum().item() < 1 else -logits


def steps(part: str, threat_model: str, waits: bool) -> dict[str, Any]:
    """Calls of each of some steps of all images, the last of which is the last of the attack."""
    network = models.build("resnet8", CLASSES).cuda().eval().requires_grad_(False)
    network = Waiting(network) if waits else network
    auto = AutoAttack(network, CLASSES, Ball(threat_model, 0.1), seed=0, heartbeat=lambda: None)
    search = auto.search(part)
    x_nat, labels_B = torch.rand(IMAGES, 3, SIZE, SIZE), torch.zeros(IMAGES, dtype=torch.int64)
    start = Start(*(each.cuda() for each in (x_nat, labels_B, labels_B, labels_B + 2, labels_B + 1)))
    slots, step = Slots(search.begin(start), [None] * IMAGES), Stepper(search)
    found: list[dict[str, int]] = []
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for number in range(NUM_STEPS):
            with recorded() as calls:
                step(slots, last=number == NUM_STEPS - 1)
            found.append(
                {
                    "kernels": len(of("kernel", calls)),
                    "graphs": len(of("graph_launch", calls)),
                    "nodes": sum(int(call["nodes"]) for call in of("graph_launch", calls)),
                    "waits": sum(call["call"] in ("synchronize", "copy_and_wait") for call in calls),
                }
            )
    warned = [str(each.message) for each in given if "CUDA graph" in str(each.message)]
    return {"steps": found, "warnings": warned}


@pytest.mark.parametrize("threat_model", NORMS)
@pytest.mark.parametrize("part", PARTS)
def test_from_the_third_step_on_each_is_one_launch_and_waits_for_nothing(
    part: str, threat_model: str, fake_cuda: FakeCuda
) -> None:
    found = fake_cuda.run(steps, part, threat_model, False)
    first, second, *captured, last = found["steps"]
    assert not found["warnings"]
    assert first["graphs"] == second["graphs"] == last["graphs"] == 0
    assert second["kernels"] > 20
    for each in captured[1:]:
        assert each == {"kernels": 0, "graphs": 1, "nodes": captured[0]["nodes"], "waits": 0}
    assert captured[0]["nodes"] >= second["kernels"]
    assert second["waits"] == last["waits"] == 0


def test_a_network_in_which_the_host_waits_is_attacked_op_by_op(fake_cuda: FakeCuda) -> None:
    found = fake_cuda.run(steps, "apgd-ce", "Linf", True)
    assert not any(step["graphs"] for step in found["steps"])
    (warning,) = found["warnings"]
    assert "the host waits for the GPU" in warning
    assert "test_slots.py" in warning


@pytest.mark.parametrize("threat_model", NORMS)
@pytest.mark.parametrize("part", PARTS)
def test_a_step_leaves_its_state_where_it_is(part: str, threat_model: str) -> None:
    """A graph writes where its next replay reads, and where new images are put."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES))
    search = AutoAttack(network, CLASSES, Ball(threat_model, 0.1), seed=0, heartbeat=lambda: None).search(part)
    labels_B = torch.zeros(IMAGES, dtype=torch.int64)
    state = search.begin(Start(torch.rand(IMAGES, 3, SIZE, SIZE), labels_B, labels_B, labels_B + 2, labels_B + 1))
    places = [tensor.data_ptr() for tensor in state.tensors()]
    for _ in range(2):
        found = search.advance(state, last=False)
        assert [tensor.data_ptr() for tensor in state.tensors()] == places
        assert found.x.data_ptr() not in places  # it is kept after the step
    assert state.step_B.tolist() == [2] * IMAGES
