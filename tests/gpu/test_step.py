"""A training step on a GPU: the bits of lanes and graphs, no waits, and what compilation changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.lib.steps import variants
from engine.system import precision
from engine.training import step_networks
from tests.gpu.stage import no_wait

METHODS = ("at", "trades", "ard", "akd2", "iad1", "iad2")
PLAIN = {"compile": "off", "lanes": "off", "graphs": "off"}
STEPS = 5  # the attack is captured in the second, the whole step in the third, and then replayed


def trained(method: str, **keys: Any) -> dict[str, Tensor]:
    """The student after a few steps of ResNet-18 on random images."""
    images = variants.images_of(variants.RANDOM, 32)
    workload = variants.Workload(method, "resnet18", 32, images, torch.device("cuda:0"))
    with precision.deterministic(), pytest.MonkeyPatch.context() as patch:
        build = step_networks.build
        students: list[torch.nn.Module] = []

        def noted(student: torch.nn.Module, *rest: Any) -> Any:
            students.append(student)
            return build(student, *rest)

        patch.setattr(step_networks, "build", noted)
        step = workload.step(variants.Variant("", PLAIN | {"amp": True} | keys))
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
        return {name: value.clone() for name, value in students[0].state_dict().items()}


@pytest.mark.parametrize("bn", ["train", "eval"])
@pytest.mark.parametrize("method", METHODS)
def test_a_captured_attack_has_the_bits_of_one_that_is_not(method: str, bn: str) -> None:
    eager, captured = (trained(method, attack={"bn": bn}, graphs=graphs) for graphs in ("off", "attack"))
    assert all(torch.equal(eager[name], captured[name]) for name in eager)


@pytest.mark.parametrize("keys", [{}, {"amp_dtype": "float16"}, {"lanes": "on"}, {"compile": "on"}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_captured_step_has_the_bits_of_one_that_is_not(method: str, keys: dict[str, str]) -> None:
    eager, captured = (trained(method, graphs=graphs, **keys) for graphs in ("off", "step"))
    assert all(torch.equal(eager[name], captured[name]) for name in eager)


@pytest.mark.parametrize("method", METHODS)
def test_lanes_have_the_bits_of_one_lane(method: str) -> None:
    one, several = (trained(method, lanes=lanes) for lanes in ("off", "on"))
    assert all(torch.equal(one[name], several[name]) for name in one)


@pytest.mark.parametrize(
    "keys", [{}, {"graphs": "attack", "lanes": "on"}, {"graphs": "step"}, {"compile": "on"}], ids=str
)
def test_no_step_waits_for_the_device(keys: dict[str, str]) -> None:
    images = variants.images_of(variants.RANDOM, 32)
    workload = variants.Workload("iad1", "resnet8", 32, images, torch.device("cuda:0"))
    step = workload.step(variants.Variant("", PLAIN | {"amp": True} | keys))
    for _ in range(4):
        step()
    with no_wait():
        step()


def test_a_compiled_step_is_near_one_that_is_not() -> None:
    """One step of the attack, before signs drift apart; the networks round in other places."""
    one = {"attack": {"num_steps": 0}}
    eager, compiled = (trained("iad1", compile=wanted, **one) for wanted in ("off", "on"))
    for name, value in eager.items():
        if value.is_floating_point():
            assert (compiled[name] - value).norm() <= 0.05 * value.norm() + 1e-3, name
