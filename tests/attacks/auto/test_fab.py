"""FAB-T: the iterates of the package in float64, images that go their ways alone, hits, passes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attacks.auto.fab import FabT
from engine.attacks.auto.search import Ball, PassCount, Start
from tests.attacks.auto.published import Network, images_of, in_float64, package, start_of, trained, ways

BALLS = {"Linf": Ball("Linf", 0.05), "L2": Ball("L2", 0.3)}
THREATS = pytest.mark.parametrize("threat_model", sorted(BALLS))


def walked(attack: FabT, network: Network, start: Start) -> tuple[list[Tensor], Tensor]:
    """Images that the network saw with and then without a gradient, step by step; hits, (K, B)."""
    state = attack.begin(start)
    network.seen.clear()
    hits = [attack.advance(state, last=step == attack.steps - 1).hit_B for step in range(attack.steps)]
    return list(network.seen), torch.stack(hits)


def published(network: Network, ball: Ball, start: Start, rank: int) -> tuple[list[Tensor], Tensor]:
    """The same of the package; instead of the hits, its nearest images of another class."""
    attack = package("fab_pt").FABAttack_PT(network, norm=ball.threat_model, eps=ball.epsilon, targeted=True)
    attack.target_class = rank
    with in_float64():
        # It looks twice at the images as they are, to see what is right and what the targets are.
        network.seen.clear()
        nearest = attack.attack_single_run(start.x_nat, start.labels_B, is_targeted=True)
    return network.seen[2:], nearest


@THREATS
@pytest.mark.parametrize("rank", [2, 3, 5, 6])
@pytest.mark.parametrize("kind", ["random", "trained"])
def test_goes_the_way_of_the_package(kind: str, threat_model: str, rank: int) -> None:
    network, ball = Network() if kind == "random" else trained(), BALLS[threat_model]
    start = start_of(network, images_of(16), rank)
    attack = FabT(network, ball)
    ours, hit_KB = walked(attack, network, start)
    theirs, nearest = published(network, ball, start, rank)
    assert len(ours) == len(theirs) == 200
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=1e-8)
    moved = torch.stack(ours[2::2]) - torch.stack(ours[1:-1:2])
    back_KB = moved.flatten(2).abs().amax(dim=2) > 0
    assert back_KB.sum(dim=0).max() > 20  # images of other classes, from which the way leads back
    # The package counts the nearest image if it lies in the ball: so does an image that is there at any step.
    order = {"Linf": torch.inf, "L2": 2}[threat_model]
    distance_B = (nearest - start.x_nat).flatten(1).norm(order, dim=1)
    broken_B = (network(nearest).argmax(dim=1) != start.labels_B) & (distance_B <= ball.epsilon)
    assert torch.equal(hit_KB.any(dim=0), broken_B)


@THREATS
def test_some_images_fall_and_some_stand(threat_model: str) -> None:
    network = Network()
    _, hit_KB = walked(FabT(network, BALLS[threat_model]), network, start_of(network, images_of(16)))
    assert 0 < hit_KB.any(dim=0).sum() < 16


@THREATS
def test_a_hit_is_an_image_of_another_class_in_the_ball(threat_model: str) -> None:
    network, ball = Network(), BALLS[threat_model]
    start = start_of(network, images_of(16))
    attack = FabT(network, ball, num_steps=30)
    state = attack.begin(start)
    order = {"Linf": torch.inf, "L2": 2}[threat_model]
    outside = 0
    for _ in range(30):
        found = attack.advance(state, last=False)
        other_B = network(found.x).argmax(dim=1) != start.labels_B
        length_B = (found.x - start.x_nat).flatten(1).norm(order, dim=1)
        assert torch.equal(found.hit_B, other_B & (length_B <= ball.epsilon))
        outside += int((other_B & ~found.hit_B).sum())
        back = start.x_nat + 0.9 * (found.x - start.x_nat)
        torch.testing.assert_close(state.x[other_B], back[other_B], rtol=0, atol=1e-12)
        torch.testing.assert_close(state.x[~other_B], found.x[~other_B], rtol=0, atol=0)
        for images in (found.x, state.x, state.x_nat):
            assert images.is_contiguous(memory_format=torch.channels_last)
    assert outside > 20


@THREATS
@settings(max_examples=12, deadline=None)
@given(rounds=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), min_size=5, max_size=25))
def test_an_image_goes_its_way_alone(threat_model: str, rounds: list[list[int]]) -> None:
    network = Network()
    start = start_of(network, images_of(4))
    attack = FabT(network, BALLS[threat_model])
    for alone, beside in ways(attack, start, rounds):
        for own, others in zip(alone, beside, strict=True):
            torch.testing.assert_close(own, others, rtol=0, atol=1e-9)


def test_each_step_is_two_forward_passes_and_a_backward_pass() -> None:
    attack = FabT(Network(), BALLS["Linf"])
    assert attack.steps == 100
    assert attack.passes(100) == PassCount(200, 100)


def test_a_start_has_memory_of_its_own() -> None:
    network = Network()
    start = start_of(network, images_of(3))
    kept = start.x_nat.clone()
    attack = FabT(network, BALLS["Linf"])
    state = attack.begin(start)
    attack.advance(state, last=False)
    assert torch.equal(start.x_nat, kept)
    assert not torch.equal(state.x, kept)
