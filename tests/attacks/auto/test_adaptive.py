"""AA-fast: restarts of A3 against a loop in float64, images that go alone, closed-form truth, masked gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attacks import table
from engine.attacks.auto import standard
from engine.attacks.auto.adaptive import WEIGHT, Adaptive, AdaptiveState
from engine.attacks.auto.search import Ball, PassCount, Start, put, taken
from engine.attacks.autoattack import Outcome
from engine.attacks.fast import FAST_PARTS, NUMBERS
from engine.attacks.kinds import Task
from engine.evaluation.measure import evaluate
from engine.kernels.philox import Stream, normal, uniform

SHAPE, CLASSES = (3, 5, 4), 4
BALLS = {"Linf": Ball("Linf", 0.05), "L2": Ball("L2", 0.3)}
THREATS = pytest.mark.parametrize("threat_model", sorted(BALLS))
SOME_STEPS = {"start_steps": 3, "margin_steps": 6}


class Network(nn.Module):
    """Convolution, tanh, linear, one image at a time: no rounding depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.conv = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64)
        self.linear = torch.randn(CLASSES, 80, generator=generator, dtype=torch.float64) / 8

    def forward(self, images: Tensor) -> Tensor:
        def logits(image: Tensor) -> Tensor:
            return torch.tanh(F.conv2d(image, self.conv, padding=1)).flatten(1) @ self.linear.T

        return torch.cat([logits(image[None].contiguous()) for image in images])


def start_of(size: int = 5) -> Start:
    generator = torch.Generator().manual_seed(1)
    x_nat = torch.rand(size, *SHAPE, generator=generator, dtype=torch.float64)
    order = Network()(x_nat).argsort(dim=1, descending=True)
    rank = 2 + torch.arange(size)
    return Start(x_nat, order[:, 0], 1000 + 37 * torch.arange(size), rank, order[:, 1])


def part_of(start: Start, rows: list[int]) -> Start:
    return Start(*(value[rows] for value in start))


def textbook(start: Start, ball: Ball, row: int) -> list[Tensor]:
    """Images at which the network is asked, by the formulas, for one image."""
    x_nat, label, sample = start.x_nat[row], int(start.labels_B[row]), start.sample_B[row : row + 1]
    rank, eps, network = int(start.rank_B[row]), ball.epsilon, Network()
    w = 2 * uniform(7, Stream.FAST, 512 + rank, sample, CLASSES)[0].double() - 1
    w[start.target_B[row]], w[label] = WEIGHT, -WEIGHT
    if ball.threat_model == "Linf":
        noise = 2 * uniform(7, Stream.FAST, 256 + rank, sample, x_nat.numel())[0].double() - 1
        noise = noise / noise.abs().max()
    else:
        noise = normal(7, Stream.FAST, 256 + rank, sample, x_nat.numel())[0].double()
        noise = noise / noise.norm()
    x = (x_nat + eps * noise.view(SHAPE)).clamp(0, 1)
    seen = [x]
    for step in range(9):
        x = x.clone().requires_grad_()
        z = network(x[None])[0]
        others = [z[c] for c in range(CLASSES) if c != label]
        loss = w @ z if step < 3 else torch.stack(others).max() - z[label]
        (grad,) = torch.autograd.grad(loss, x)
        size = eps if step < 3 else eps * (0.001 + 0.999 * (1 + math.cos(math.pi * (step - 3) / 6)) / 2)
        if ball.threat_model == "Linf":
            x = (x.detach() + size * grad.sign() - x_nat).clamp(-eps, eps) + x_nat
        else:
            away = x.detach() + size * grad / grad.norm() - x_nat
            x = x_nat + away * min(1.0, eps / float(away.norm()))
        x = x.clamp(0, 1)
        seen.append(x)
    return seen


def search_on(ball: Ball) -> Adaptive:
    return Adaptive(Network(), ball, CLASSES, seed=7, **SOME_STEPS)


@THREATS
def test_the_images_are_those_of_a_loop_in_float64(threat_model: str) -> None:
    start, search = start_of(), search_on(BALLS[threat_model])
    state = search.begin(start)
    found = [search.advance(state, last=step == search.steps - 1) for step in range(search.steps)]
    logits = [Network()(step.x) for step in found]
    for step, z in zip(found, logits, strict=True):
        assert step.finite_B.all()
        assert step.hit_B.tolist() == (z.argmax(dim=1) != start.labels_B).tolist()
    for row in range(5):
        expected = textbook(start, BALLS[threat_model], row)
        assert len(expected) == search.steps == 10
        for step, image in zip(found, expected, strict=True):
            torch.testing.assert_close(step.x[row], image, rtol=1e-6, atol=1e-7)
    assert search.passes(10) == PassCount(10, 9)


@THREATS
def test_an_image_goes_its_way_alone(threat_model: str) -> None:
    """Images that come, go and change places: the bits of each are those that it has alone."""
    search, start = search_on(BALLS[threat_model]), start_of()
    alone: list[list[Tensor]] = []
    for row in range(5):
        state = search.begin(part_of(start, [row]))
        alone.append([search.advance(state, last=False).x[0] for _ in range(9)])
    state = search.begin(part_of(start, [0, 1, 2, 3]))
    for step in range(4):
        seen = search.advance(state, last=False).x
        assert all(torch.equal(seen[row], alone[row][step]) for row in range(4))
    put(state, torch.tensor([1]), search.begin(part_of(start, [4])))
    state = taken(state, torch.tensor([3, 1]))
    assert isinstance(state, AdaptiveState)
    for step in range(5):
        seen = search.advance(state, last=False).x
        assert torch.equal(seen[0], alone[3][4 + step])
        assert torch.equal(seen[1], alone[4][step])


# ---------------------------------------------------------------- AA-fast on networks whose truth is known


class Linear(nn.Module):
    """Logits W x + b times a factor, of images that are rounded to steps, if there are any."""

    def __init__(self, classes: int, factor: float = 1.0, steps: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(classes)
        self.weight = nn.Parameter(torch.randn(classes, 48, generator=generator))
        self.bias = nn.Parameter(-self.weight.detach().sum(dim=1) / 2)
        self.factor, self.steps = factor, steps

    def forward(self, images: Tensor) -> Tensor:
        if self.steps:
            images = (images * self.steps).round() / self.steps
        return self.factor * F.linear(images.flatten(1), self.weight, self.bias)


def data_of(classes: int, count: int = 80) -> tuple[Tensor, Tensor]:
    """Images in (0.3, 0.7), where no ball of the tests meets 0 or 1, and labels of which some are wrong."""
    images = 0.3 + 0.4 * torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    labels = Linear(classes)(images).argmax(dim=1)
    labels[::10] = (labels[::10] + 1) % classes
    return images, labels


def truth(network: Linear, images: Tensor, labels: Tensor, ball: Ball) -> Tensor:
    """True where z_y - z_t > epsilon ||w_y - w_t|| in the dual norm, for every class t but y."""
    weight, bias = network.weight.detach().double(), network.bias.detach().double()
    apart_BCN = weight[labels][:, None] - weight
    margin_BC = (apart_BCN * images.double().flatten(1)[:, None]).sum(dim=2) + bias[labels][:, None] - bias
    needed_BC = ball.epsilon * apart_BCN.norm(p=1 if ball.threat_model == "Linf" else 2, dim=2)
    stands_B: Tensor = ((margin_BC > needed_BC) | F.one_hot(labels, len(bias)).bool()).all(dim=1)
    return stands_B


def attacked(network: nn.Module, classes: int, ball: Ball) -> Any:
    keys: dict[str, Any] = {"epsilon": ball.epsilon, "threat_model": ball.threat_model}
    return evaluate(network, data_of(classes), ["aa-fast"], **keys)["aa-fast"]


LINEAR_BALLS = {"Linf": Ball("Linf", 0.008), "L2": Ball("L2", 0.05)}


@THREATS
@pytest.mark.parametrize(("classes", "factor"), [(2, 1.0), (3, 1e4), (7, 1.0), (7, 1e4)])
def test_a_linear_network_is_exactly_as_robust_as_it_is(classes: int, factor: float, threat_model: str) -> None:
    """Whatever the factor on its logits, under which cross-entropy has no gradient."""
    network, ball = Linear(classes, factor), LINEAR_BALLS[threat_model]
    result = attacked(network, classes, ball)
    expected = truth(network, *data_of(classes), ball)
    assert 0 < expected.sum() < 72
    assert result.verdicts.tolist() == expected.tolist()
    assert result.warnings == ()
    assert tuple(result.parts) == FAST_PARTS
    stood = int(expected.sum())
    runs = min(NUMBERS.targets, classes - 1)
    steps = NUMBERS.start_steps + NUMBERS.margin_steps
    forward = runs * (NUMBERS.target_steps + 1) + NUMBERS.restarts * (steps + 1) + NUMBERS.queries + 1
    backward = runs * NUMBERS.target_steps + NUMBERS.restarts * steps
    of_all = [tuple(part)[2:4] for part in [*result.details.values()][1:]]
    assert sum(count for count, _ in of_all) >= stood * forward
    assert sum(count for _, count in of_all) >= stood * backward
    assert forward + backward < (7857 + 1910) / 10


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@THREATS
def test_every_hit_is_in_the_ball_and_beats_the_network_itself(
    threat_model: str, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the search is in half precision, which sees other logits."""
    if half:
        monkeypatch.setattr(standard, "format_of", lambda place: "bfloat16")
    network, ball, (images, labels) = Linear(5), LINEAR_BALLS[threat_model], data_of(5)
    truly = truth(network, images, labels, ball)
    network.requires_grad_(False)
    task = Task(network, 5, (ball.epsilon, ball.threat_model))
    out = table.find("aa-fast").make(task)(images, labels, torch.arange(80))
    assert isinstance(out, Outcome)
    stood = out.survived_B == len(FAST_PARTS)
    assert bool(stood[truly].all())  # never less than the truth
    assert int(stood.sum()) <= int(truly.sum()) + half
    away = (out.x_adv.double() - images.double()).flatten(1)
    assert float(away.norm(p=math.inf if threat_model == "Linf" else 2, dim=1).max()) <= ball.epsilon
    assert float(out.x_adv.min()) >= 0
    assert float(out.x_adv.max()) <= 1
    assert ((network(out.x_adv).argmax(dim=1) == labels) == stood).all()


def test_a_network_that_rounds_its_images_does_not_look_robust() -> None:
    """Its gradient is zero everywhere; a few squares break it all the same, and there are warnings."""
    ball = Ball("Linf", 0.1)
    masked = attacked(Linear(5, steps=20), 5, ball)
    assert masked.correct < 0.5 * masked.parts["mm"] * masked.n
    assert any("gradient" in text for text in masked.warnings)
    assert any("Square" in text for text in masked.warnings)


class Undefined(Linear):
    """NaN where an image has left the range of the data."""

    def forward(self, images: Tensor) -> Tensor:
        gone_B = ((images < 0.3) | (images > 0.7)).flatten(1).any(dim=1)
        return super().forward(images).masked_fill(gone_B[:, None], torch.nan)


def test_logits_that_are_not_finite_are_no_result() -> None:
    with pytest.raises(FloatingPointError, match="NaN or infinite; no result"):
        attacked(Undefined(5), 5, Ball("Linf", 0.1))


def test_it_is_never_called_autoattack() -> None:
    fast = table.find("aa-fast")
    assert fast.title == table.title("aa-fast", {"parts": dict.fromkeys(FAST_PARTS, 0.5)}) == "AA-fast"
    told = fast.numbers(3, (8 / 255, "Linf"))
    assert "AutoAttack" not in told
    assert "each of 2 target classes" in told
    assert "each of 1 target class)" in fast.numbers(2, (0.5, "L2"))
    parameters = fast.parameters(Task(nn.Identity(), 10, (8 / 255, "Linf")), 100)
    assert parameters.items() >= NUMBERS._asdict().items()
    assert parameters["parts"] == list(FAST_PARTS)
