"""APGD: the iterates of the package from equal starts in float64, its checks, its losses, its starts."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.attacks.auto import losses
from engine.attacks.auto.apgd import Apgd, StepCheck, checks
from engine.attacks.auto.search import Ball, PassCount, Start
from engine.kernels.philox import Stream
from tests.attacks.auto.published import Network, images_of, in_float64, package, start_of, sure, trained, ways

CASES = [
    (loss, threat_model, num_steps)
    for loss in ("ce", "dlr", "dlr-targeted")
    for threat_model in ("Linf", "L2")
    for num_steps in (100, 20)
]
EPSILONS = {"Linf": 0.05, "L2": 0.3}


class Path(NamedTuple):
    """images: that the network saw. hit: an image of the way is of another class."""

    images_KBCHW: Tensor
    hit_B: Tensor


class Way(NamedTuple):
    """Images ours looked at. halvings, restarts: of each image, the latter of those that moved it."""

    path: Path
    halvings_B: Tensor
    restarts_B: Tensor


def walked(attack: Apgd, network: Network, start: Start) -> Way:
    state = attack.begin(start)
    network.seen.clear()
    size_B = state.step_size_B.clone()
    hit_B = torch.zeros_like(start.labels_B, dtype=torch.bool)
    restarts_B = torch.zeros_like(start.labels_B)
    for step in range(attack.steps):
        found = attack.advance(state, last=step == attack.steps - 1)
        hit_B |= found.hit_B
        moved_B = (state.x_last != found.x).flatten(1).any(dim=1)
        restarts_B += moved_B & (step < attack.steps - 1)
    halvings_B = (size_B / state.step_size_B).log2().round().long()
    return Way(Path(torch.stack(network.seen), hit_B), halvings_B, restarts_B)


def published(network: Network, loss: str, ball: Ball, start: Start, x_init: Tensor, num_steps: int) -> Path:
    module = package("autopgd_base")
    keys: dict[str, Any] = {"n_iter": num_steps, "norm": ball.threat_model, "eps": ball.epsilon}
    if loss == "dlr-targeted":
        attack = module.APGDAttack_targeted(network, **keys)
        attack.y_target = start.target_B
    else:
        attack = module.APGDAttack(network, loss=loss, **keys)
    network.seen.clear()
    with in_float64():
        attack.init_hyperparam(start.x_nat)
        _, stands, _, _ = attack.attack_single_run(start.x_nat, start.labels_B, x_init=x_init)
    return Path(torch.stack(network.seen), stands == 0)


def attack_of(network: nn.Module, loss: str, ball: Ball, num_steps: int) -> Apgd:
    return Apgd(network, loss, ball, seed=4, stream=Stream.APGD_CE, num_steps=num_steps)


def undetermined(network: nn.Module, loss: str, images_KBCHW: Tensor, start: Start) -> Tensor:
    """True from the first image on after which rounding errors decide, (K, B).

    Either DLR is 1 whatever the image, and its gradient nothing but rounding errors, or the loss is that of the
    image before or the largest so far but for rounding, and so is the package's answer whether it has increased.
    """
    logits_KBC = torch.stack([network(images) for images in images_KBCHW]).detach()
    sorted_KBC, own_KB1 = logits_KBC.sort(dim=2).values, start.labels_B.expand(len(logits_KBC), -1)[..., None]
    constant_KB = (logits_KBC.gather(2, own_KB1)[..., 0] == sorted_KBC[..., -3]) & (loss == "dlr")
    loss_KB = torch.stack(
        [losses.LOSSES[loss](logits_BC, start.labels_B, start.target_B) for logits_BC in logits_KBC]
    )
    tied_KB = torch.zeros_like(constant_KB)
    for earlier_KB in (loss_KB[:-1], loss_KB[:-1].cummax(dim=0).values):
        tied_KB[1:] |= (loss_KB[1:] - earlier_KB).abs() < 1e-12
    return (constant_KB | tied_KB).cummax(dim=0).values


@pytest.mark.parametrize("kind", ["random", "trained"])
@pytest.mark.parametrize(("loss", "threat_model", "num_steps"), CASES)
def test_goes_the_way_of_the_package(kind: str, loss: str, threat_model: str, num_steps: int) -> None:
    network = Network() if kind == "random" else trained()
    ball = Ball(threat_model, EPSILONS[threat_model])
    start = start_of(network, sure(network, 48) if loss == "dlr" else images_of(24), rank=3)
    attack = attack_of(network, loss, ball, num_steps)
    x_init = attack.begin(start).x_adv.contiguous()
    ours = walked(attack, network, start)
    theirs = published(network, loss, ball, start, x_init, num_steps)
    images_KBCHW = ours.path.images_KBCHW
    assert len(images_KBCHW) == num_steps + 1
    # The image after the last without a tie is the last that is determined.
    lost_KB = undetermined(network, loss, images_KBCHW, start)
    compared_KB = torch.cat((torch.ones_like(lost_KB[:1]), ~lost_KB[:-1]))
    whole_B = compared_KB.all(dim=0)
    assert whole_B.sum() >= 3
    # Along a gradient, and not its sign, errors of 1e-16 grow with the steps.
    growing = {"Linf": 1e-10, "L2": 1e-6}[threat_model]
    for first, last, tolerance in ((0, 21, 1e-10), (21, num_steps + 1, growing)):
        one, other = (each[first:last][compared_KB[first:last]] for each in (images_KBCHW, theirs.images_KBCHW))
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
    assert torch.equal(ours.path.hit_B, theirs.hit_B)
    # All that the package decides has been decided, and for some images one way and for some another.
    assert ours.halvings_B[whole_B].max() >= 3
    assert ours.restarts_B[whole_B].max() >= 2
    decided = torch.stack((ours.halvings_B, ours.restarts_B), dim=1)[whole_B]
    assert len(decided.unique(dim=0)) > 1


def test_the_first_check_compares_the_first_loss_with_zero() -> None:
    """As published: an increase if the loss is positive, and none if it is negative."""
    for sign, increases in ((1.0, 1), (-1.0, 0)):
        network = Falling(sign)
        start = Start(
            torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64),
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
            torch.full((1,), 2),
            torch.ones(1, dtype=torch.int64),
        )
        attack = attack_of(network, "margin-targeted", Ball("Linf", 0.1), 100)
        state = attack.begin(start)
        for _ in range(22):
            attack.advance(state, last=False)
        assert state.increases_B.tolist() == [increases]
        assert state.step_size_B.tolist() == [0.2]
        attack.advance(state, last=False)
        assert state.increases_B.tolist() == [0]
        assert state.step_size_B.tolist() == [0.1]


class Falling(nn.Module):
    """A loss of one sign that is smaller in each pass, whatever the image."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign, self.calls = sign, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        value = self.sign * (1 + 1 / self.calls if self.sign > 0 else self.calls)
        zero_B = 0 * images.flatten(1).sum(dim=1)
        return torch.stack((zero_B, zero_B + value), dim=1)


def test_checks_are_those_of_the_paper() -> None:
    assert [check.step for check in checks(100)] == [22, 41, 57, 70, 80, 87, 93, 99]
    assert [check.gap for check in checks(100)] == [22, 19, 16, 13, 10, 7, 6, 6]
    assert checks(20)[:3] == [StepCheck(4, 4), StepCheck(7, 3), StepCheck(9, 2)]
    assert [check.step for check in checks(20)[3:]] == [*range(10, 21)]
    assert {check.gap for check in checks(20)[3:]} == {1}


@given(num_steps=st.integers(1, 400))
def test_checks_are_those_of_the_package(num_steps: int) -> None:
    published = package("autopgd_base").APGDAttack(None, n_iter=num_steps, eps=1.0)
    gap, since, found = published.n_iter_2, 0, []
    for step in range(1, num_steps + 1):
        since += 1
        if since == gap:
            found.append(StepCheck(step, gap))
            gap, since = max(gap - published.size_decr, published.n_iter_min), 0
    assert checks(num_steps) == found


def gradient(loss_B: Tensor, logits_BC: Tensor) -> Tensor:
    (grad_BC,) = torch.autograd.grad(loss_B.sum(), logits_BC)
    return grad_BC


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), min_size=1, max_size=6),
    labels=st.lists(st.integers(0, 4), min_size=6, max_size=6),
    targets=st.lists(st.integers(1, 4), min_size=6, max_size=6),
    scale=st.sampled_from([1e-3, 0.7, 40.0]),
)
def test_losses_are_those_of_the_package(
    rows: list[list[int]], labels: list[int], targets: list[int], scale: float
) -> None:
    """With whole numbers for logits, of which many are equal; but not the two that a loss is divided by."""
    module = package("autopgd_base")
    logits_BC = scale * torch.tensor(rows, dtype=torch.float64)
    descending_BC = logits_BC.sort(dim=1, descending=True).values
    logits_BC = logits_BC[descending_BC[:, 0] > descending_BC[:, 2]].requires_grad_()
    labels_B = torch.tensor(labels[: len(logits_BC)], dtype=torch.int64)
    target_B = (labels_B + torch.tensor(targets[: len(logits_BC)], dtype=torch.int64)) % 5
    targeted = module.APGDAttack_targeted(None, eps=1.0)
    targeted.y_target = target_B
    plain = module.APGDAttack(None, eps=1.0)
    pairs = [
        (losses.dlr, plain.dlr_loss(logits_BC, labels_B)),
        (losses.targeted_dlr, targeted.dlr_loss_targeted(logits_BC, labels_B)),
        (losses.cross_entropy, nn.CrossEntropyLoss(reduction="none")(logits_BC, labels_B)),
    ]
    for ours, theirs_B in pairs:
        loss_B = ours(logits_BC, labels_B, target_B)
        torch.testing.assert_close(loss_B, theirs_B, rtol=1e-12, atol=1e-12)
        mine_BC, theirs_BC = gradient(loss_B, logits_BC), gradient(theirs_B, logits_BC)
        # Among equal logits either may be taken for the larger: what each group of them gets is the same.
        groups_BCC = (logits_BC[:, :, None] == logits_BC[:, None, :]).double()
        torch.testing.assert_close(
            (groups_BCC @ mine_BC[..., None]).squeeze(2),
            (groups_BCC @ theirs_BC[..., None]).squeeze(2),
            rtol=1e-9,
            atol=1e-9 / scale,
        )
        single_BC = groups_BCC.sum(dim=2) == 1
        torch.testing.assert_close(mine_BC[single_BC], theirs_BC[single_BC], rtol=1e-9, atol=1e-9 / scale)


@pytest.mark.parametrize("threat_model", sorted(EPSILONS))
def test_starts_are_spread_as_published(threat_model: str) -> None:
    """L-inf: uniform, the largest coordinate on the boundary. L2: in every direction alike, on the sphere."""
    x_nat = torch.full((400, 3, 4, 4), 0.5, dtype=torch.float64)
    ones = torch.ones(400, dtype=torch.int64)
    start = Start(x_nat, ones, torch.arange(400), 2 * ones, ones)
    attack = attack_of(Network(), "ce", Ball(threat_model, 0.2), 100)
    away_BN = (attack.begin(start).x_adv - x_nat).flatten(1)
    order = {"Linf": torch.inf, "L2": 2}[threat_model]
    torch.testing.assert_close(away_BN.norm(order, dim=1), torch.full((400,), 0.2, dtype=torch.float64))
    assert away_BN.mean(dim=0).abs().max() < 0.2 * 0.15
    deviation = {"Linf": 0.2 * 3**-0.5, "L2": 0.2 * 48**-0.5}[threat_model]
    assert away_BN.std().item() == pytest.approx(deviation, rel=0.05)
    again_BN = (attack.begin(start).x_adv - x_nat).flatten(1)
    assert torch.equal(away_BN, again_BN)
    other_BN = (attack.begin(start._replace(rank_B=3 * ones)).x_adv - x_nat).flatten(1)
    assert (away_BN != other_BN).any(dim=1).all()
    assert len(away_BN.unique(dim=0)) == 400


@pytest.mark.parametrize("threat_model", sorted(EPSILONS))
@settings(max_examples=12, deadline=None)
@given(rounds=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), min_size=20, max_size=45))
def test_an_image_goes_its_way_alone(threat_model: str, rounds: list[list[int]]) -> None:
    """Beside any others at any steps, and moved between states; past a check or more."""
    network = Network()
    start = start_of(network, images_of(4))
    attack = attack_of(network, "ce", Ball(threat_model, EPSILONS[threat_model]), 20)
    for alone, beside in ways(attack, start, rounds):
        for own, others in zip(alone, beside, strict=True):
            torch.testing.assert_close(own, others, rtol=0, atol=1e-7)


def test_passes_and_the_last_step() -> None:
    network = Network()
    attack = attack_of(network, "ce", Ball("Linf", 0.1), 100)
    assert attack.steps == 101
    assert attack.passes(101) == PassCount(101, 100)
    assert attack.passes(1) == PassCount(1, 0)
    state = attack.begin(start_of(network, images_of(3)))
    kept = [value.clone() for value in state.tensors()]
    attack.advance(state, last=True)
    kept[2] += 1
    assert all(torch.equal(one, other) for one, other in zip(kept, state.tensors(), strict=True))


def test_starts_without_a_gradient_are_counted_once() -> None:
    network = Network(factor=0.0)
    attack = attack_of(network, "dlr-targeted", Ball("Linf", 0.1), 20)
    state = attack.begin(start_of(network, images_of(3)))
    for _ in range(4):
        attack.advance(state, last=False)
    assert int(attack.zero_gradients) == 3
