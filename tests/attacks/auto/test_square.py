"""Square Attack: the package's iterates with the same draws, images that go their ways alone, draws, edges."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.attacks.auto import windows
from engine.attacks.auto.losses import margin
from engine.attacks.auto.search import Ball, PassCount, Start
from engine.attacks.auto.square import Square, SquareState
from tests.attacks.auto.published import ways

SHAPE = (3, 13, 13)  # with tiles that end where the image ends: the package fails on others
BALLS = {"Linf": Ball("Linf", 0.02), "L2": Ball("L2", 0.4)}
THREATS = pytest.mark.parametrize("threat_model", sorted(BALLS))


class Network(nn.Module):
    """Convolution, tanh, linear, one image at a time: no rounding depends on the batch. Notes its images."""

    def __init__(
        self, shape: tuple[int, ...] = SHAPE, classes: int = 4, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def drawn(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

        self.conv = drawn(4, shape[0], 3, 3)
        self.linear = drawn(classes, 4 * math.prod(shape[1:])) / 8
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        return torch.cat([self._logits(image[None].contiguous()) for image in images])

    def _logits(self, image: Tensor) -> Tensor:
        return torch.tanh(F.conv2d(image, self.conv, padding=1)).flatten(1) @ self.linear.T


def start_of(shape: tuple[int, ...] = SHAPE, size: int = 4, dtype: torch.dtype = torch.float64) -> Start:
    """Images, and the class that the network sees in each."""
    generator = torch.Generator().manual_seed(1)
    x_nat = torch.rand(size, *shape, generator=generator, dtype=torch.float64).to(dtype)
    labels = Network(shape, dtype=dtype)(x_nat).argmax(dim=1)
    sample = torch.arange(size) * 37 + 1000
    return Start(x_nat, labels, sample, torch.zeros_like(labels), torch.zeros_like(labels))


def published_draws(attack: Square, state: SquareState, start: Start, row: int) -> Iterator[Tensor]:
    """Uniform numbers from which the package draws what our image draws, in the order of its calls."""
    channels, height, width = start.x_nat.shape[1:]
    sample = start.sample_B[row : row + 1]
    linf = attack._ball.threat_model == "Linf"

    def signs(values: Tensor, *shape: int) -> Tensor:
        return (0.5 + values.double() / 4).view(shape)

    if linf:
        yield signs(windows.start_signs(0, sample, channels * width), 1, channels, 1, width)
    else:
        tiles = (height // (height // 5)) * (width // (height // 5))
        drawn = windows.start_signs(0, sample, (1 + channels) * tiles).view(1 + channels, tiles)
        for tile in range(tiles):
            yield signs(drawn[0, tile], 1)
            yield signs(drawn[1:, tile], 1, channels, 1, 1)
    for step in range(1, attack.steps):
        window = windows.Window(*(int(value) for value in state.windows_BKN[row, step]))  # type: ignore[arg-type]
        size, shape = int(window.size_B), ([1] if not linf else []) + [channels, 1, 1]
        places = [(window.top_B, height), (window.left_B, width)]
        places += [] if linf else [(window.second_top_B, height), (window.second_left_B, width)]
        for place, length in places:
            yield torch.tensor([(int(place) + 0.5) / max(length - size, 1)])
        if not linf:
            yield torch.tensor([0.25 + 0.5 * int(window.turned_B)])
        bits = torch.tensor([int(window.signs_B) >> channel & 1 for channel in range(channels)])
        yield signs(2 * bits - 1, *shape)


def empty_windows(state: SquareState) -> Tensor:
    """Mask of the images whose two windows of the next step are empty, but for roots of rounding errors."""
    window = windows.at_step(state.windows_BKN, state.step_B)
    empty = []
    for row, delta in enumerate(state.x_best - state.x_nat):
        size = int(window.size_B[row])
        places = ((window.top_B, window.left_B), (window.second_top_B, window.second_left_B))
        parts = [delta[:, top[row] : top[row] + size, left[row] : left[row] + size] for top, left in places]
        empty.append(size > 0 and all(bool(part.norm() < 1e-5) for part in parts))
    return torch.tensor(empty)


class Published:
    """The package's attack on one image, with draws that are given: the images it looks at, and their margins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, attack: Square, queries: int) -> None:
        module = pytest.importorskip("pyautoattack.square", reason="pyautoattack is not installed")
        self._monkeypatch, self._network = monkeypatch, Network()
        ball = attack._ball
        keys: dict[str, Any] = {"norm": ball.threat_model, "eps": ball.epsilon, "n_queries": queries}
        self._attack = module.SquareAttack(self._network, **keys, resc_schedule=False)

    def run(self, x_nat: Tensor, label: Tensor, draws: Iterator[Tensor]) -> list[Tensor]:
        """Images in the order in which the network sees them, until the first that it does not know."""
        left = deque(draws)

        def rand(shape: list[int]) -> Tensor:
            value = left.popleft()
            assert list(value.shape) == list(shape)
            return value

        self._network.seen.clear()
        with self._monkeypatch.context() as patched:
            patched.setattr(torch, "rand", rand)
            torch.set_default_dtype(torch.float64)
            try:
                self._attack.init_hyperparam(x_nat)
                self._attack.attack_single_run(x_nat, label)
            finally:
                torch.set_default_dtype(torch.float32)
        return self._network.seen


@pytest.mark.parametrize(
    ("threat_model", "epsilon", "falls"),
    [("Linf", 0.02, False), ("Linf", 0.22, True), ("L2", 0.4, False), ("L2", 4.4, True)],
)
def test_goes_the_way_of_the_package(
    monkeypatch: pytest.MonkeyPatch, threat_model: str, epsilon: float, falls: bool
) -> None:
    queries, start, network = 600, start_of(), Network()
    attack = Square(network, Ball(threat_model, epsilon), seed=0, num_queries=queries)
    state = attack.begin(start)
    draws = [list(published_draws(attack, state, start, row)) for row in range(len(start.x_nat))]
    best, empty, accepted = [], [], []
    for _ in range(attack.steps):
        before = state.x_best.clone()
        empty.append(empty_windows(state) if threat_model == "L2" else torch.zeros(4, dtype=torch.bool))
        attack.advance(state, last=False)
        accepted.append((before != state.x_best).flatten(1).any(dim=1))
        best.append(state.margin_best_B.clone())
    ours, best_KB, empty_KB, accepted_KB = (
        torch.stack(values) for values in (network.seen, best, empty, accepted)
    )
    assert accepted_KB.sum(dim=0).min() > 15

    package, compared, fallen = Published(monkeypatch, attack, queries), 0, 0
    for row, numbers in enumerate(draws):
        label = start.labels_B[row : row + 1]
        theirs = torch.cat(package.run(start.x_nat[row : row + 1], label, iter(numbers)))
        # Into empty windows goes the root of a rounding error, and if taken, each goes its own way from then on.
        astray_K = (empty_KB & accepted_KB)[: len(theirs), row].cumsum(0) > 0
        sound_K = ~(astray_K | empty_KB[: len(theirs), row])
        compared += int(sound_K.sum())
        own = ours[: len(theirs), row]
        torch.testing.assert_close(own[sound_K], theirs[sound_K], rtol=0, atol=1e-12)
        margin_K = margin(Network()(theirs), label.expand(len(theirs))).cummin(0).values
        torch.testing.assert_close(best_KB[: len(theirs), row][sound_K], margin_K[sound_K], rtol=0, atol=1e-12)
        fell = len(theirs) <= queries
        assert fell == bool(best_KB[-1, row] <= 0) or astray_K[-1]
        fallen += fell
    assert compared > 1000
    assert (fallen > 0) == falls


@pytest.mark.parametrize("shape", [(32, 32), (8, 8), (28, 28), (64, 64), (20, 31)], ids=str)
def test_sizes_are_those_of_the_published_schedule(shape: tuple[int, int]) -> None:
    module = pytest.importorskip("pyautoattack.square", reason="pyautoattack is not installed")
    published = module.SquareAttack(None, n_queries=9000, p_init=0.8, resc_schedule=False)
    height, width = shape
    for step in range(1, 9001):
        side = round(math.sqrt(published.p_selection(step - 1) * 3 * height * width / 3))
        level = windows.level(step)
        assert windows.linf_size(level, *shape) == min(max(side, 1), height, width)
        odd = max(side, 3) + (1 if max(side, 3) % 2 == 0 else 0)
        assert windows.l2_size(level, *shape) == min(odd, height, width)


def test_windows_of_cifar_have_the_known_sizes() -> None:
    for threat_model, expected in (
        ("Linf", [29, 20, 14, 10, 7, 5, 4, 3]),
        ("L2", [29, 21, 15, 11, 7, 5, 5, 3]),
    ):
        attack = Square(Network((1, 32, 32)), Ball(threat_model, 0.1), seed=0)
        size_K = attack.begin(start_of((1, 32, 32), size=1)).windows_BKN[0, :, 0].tolist()
        assert len(size_K) == attack.steps == 5001
        assert size_K[0] == 0
        lasts = (0, 10, 50, 200, 500, 1000, 2000, 4000, 5000)
        gaps = [later - earlier for earlier, later in pairwise(lasts)]
        # As published, the step after each round number is the last of its level: steps are counted from zero.
        gaps[0], gaps[-1] = gaps[0] + 1, gaps[-1] - 1
        assert size_K[1:] == [size for size, gap in zip(expected, gaps, strict=True) for _ in range(gap)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 9, 21])
def test_the_pattern_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    module = pytest.importorskip("pyautoattack.square", reason="pyautoattack is not installed")
    published = module.SquareAttack(None, norm="L2", device="cpu")
    table = windows.patterns((size, 2 * size), torch.float64, torch.device("cpu"))
    for turned in (0, 1):
        monkeypatch.setattr(torch, "rand", lambda _, turned=turned: torch.tensor([0.25 + 0.5 * turned]))
        torch.testing.assert_close(table[0, turned, :size, :size], published.eta(size).double(), rtol=0, atol=1e-6)
    assert table[0].square().sum(dim=(1, 2)).tolist() == pytest.approx([1, 1])


@THREATS
@settings(max_examples=15, deadline=None)
@given(rounds=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), min_size=1, max_size=12))
def test_an_image_goes_its_way_alone(threat_model: str, rounds: list[list[int]]) -> None:
    """In any order, beside any others at any steps, and moved between states."""
    start, network = start_of(), Network()
    attack = Square(network, BALLS[threat_model], seed=3, num_queries=60)
    for alone, beside in ways(attack, start, rounds):
        for own, others in zip(alone, beside, strict=True):
            assert torch.equal(own, others)


@settings(max_examples=40, deadline=None)
@given(
    threat_model=st.sampled_from(sorted(BALLS)),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 13), st.integers(1, 13)),
    epsilon=st.sampled_from([0.0, 0.03, 0.5, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@example(threat_model="L2", shape=(1, 10, 1), epsilon=0.5, dtype=torch.float32)
@example(threat_model="L2", shape=(3, 1, 1), epsilon=0.5, dtype=torch.float64)
def test_every_image_stays_in_the_ball(
    threat_model: str, shape: tuple[int, int, int], epsilon: float, dtype: torch.dtype
) -> None:
    start, network = start_of(shape, size=3, dtype=dtype), Network(shape, dtype=dtype)
    attack = Square(network, Ball(threat_model, epsilon), seed=0, num_queries=60)
    state = attack.begin(start)
    order = math.inf if threat_model == "Linf" else 2
    rounding = 8 * torch.finfo(dtype).eps
    best_B = torch.full((3,), math.inf, dtype=dtype)
    for _ in range(attack.steps):
        found = attack.advance(state, last=False)
        assert found.x.dtype == dtype
        assert found.x.min() >= 0
        assert found.x.max() <= 1
        away_B = torch.linalg.vector_norm((found.x - start.x_nat).flatten(1).double(), ord=order, dim=1)
        assert (away_B <= epsilon * (1 + rounding) + rounding).all()
        margins_B = margin(network(found.x), start.labels_B)
        accepted_B = (margins_B < best_B) | (margins_B <= 0)
        best_B = torch.where(accepted_B, margins_B, best_B)
        assert torch.equal(state.margin_best_B, best_B)
        assert torch.equal(state.x_best[accepted_B], found.x[accepted_B])
        assert torch.equal(found.hit_B, network(found.x).argmax(dim=1) != start.labels_B)
    assert state.step_B.tolist() == [61] * 3


@THREATS
def test_a_state_is_kept_channels_last(threat_model: str) -> None:
    attack = Square(Network(), BALLS[threat_model], seed=0, num_queries=9)
    state = attack.begin(start_of())
    for _ in range(3):
        images = (attack.advance(state, last=False).x, state.x_nat, state.x_best)
        assert all(value.is_contiguous(memory_format=torch.channels_last) for value in images)


def test_places_and_signs_have_the_published_distribution() -> None:
    """Each place but the last is as likely, in each window; signs and coins are fair, and independent in pairs."""
    height, width, size, steps = 12, 9, 5, 2000
    drawn = windows.draw(7, torch.arange(30), [size] * 7, torch.Size((3, height, width)), steps)[:, 1:]
    columns = windows.Window(*drawn.long().flatten(0, 1).unbind(1))
    for place_N, length in (
        (columns.top_B, height),
        (columns.left_B, width),
        (columns.second_top_B, height),
        (columns.second_left_B, width),
    ):
        share = place_N.bincount() / len(place_N)
        assert len(share) == length - size
        assert share.tolist() == pytest.approx([1 / (length - size)] * (length - size), abs=0.01)
    coins_NC = torch.cat((windows.channel_signs(columns.signs_B, 15), 2 * columns.turned_B[:, None] - 1), dim=1)
    covariance = torch.cov(coins_NC.T.double())
    assert (covariance - torch.eye(16)).abs().max() < 0.02
    assert coins_NC.double().mean(dim=0).abs().max() < 0.02


@THREATS
def test_draws_differ_by_seed_and_sample(threat_model: str) -> None:
    start = start_of(size=2)
    first, other = (
        Square(Network(), BALLS[threat_model], seed=seed, num_queries=50).begin(start) for seed in (0, 1)
    )
    assert not torch.equal(first.windows_BKN, other.windows_BKN)
    assert not torch.equal(first.x_best, other.x_best)
    assert not torch.equal(first.windows_BKN[0], first.windows_BKN[1])
    for value in (0, 1):
        assert not torch.equal((first.x_best - first.x_nat)[value], (other.x_best - other.x_nat)[value])


def test_drawing_in_parts_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (torch.arange(9) + 2**33, [4, 3], torch.Size((3, 6, 6)), 40)
    whole = windows.draw(2**40, *arguments)
    monkeypatch.setattr(windows, "_IMAGES_AT_ONCE", 4)
    assert torch.equal(whole, windows.draw(2**40, *arguments))


def test_the_last_step_changes_no_image() -> None:
    attack = Square(Network(), BALLS["Linf"], seed=0, num_queries=5)
    state = attack.begin(start_of())
    attack.advance(state, last=False)
    kept = [value.clone() for value in state.tensors()]
    found = attack.advance(state, last=True)
    assert not torch.equal(found.x, state.x_best)
    kept[2] += 1
    assert all(torch.equal(one, other) for one, other in zip(kept, state.tensors(), strict=True))
    assert attack.passes(attack.steps) == PassCount(6, 0)


def test_an_image_beyond_its_last_step_does_no_harm() -> None:
    attack = Square(Network(), BALLS["L2"], seed=0, num_queries=2)
    state = attack.begin(start_of())
    for _ in range(5):
        assert attack.advance(state, last=False).finite_B.all()


def test_logits_that_are_not_finite_are_told_and_not_taken() -> None:
    network = Network()
    broken_B = torch.tensor([False, True, False, False])
    attack = Square(
        lambda images: network(images).masked_fill(broken_B[:, None], math.nan),
        BALLS["Linf"],
        seed=0,
        num_queries=4,
    )
    state = attack.begin(start_of())
    begun = state.x_best.clone()
    for _ in range(3):
        assert torch.equal(attack.advance(state, last=False).finite_B, ~broken_B)
    assert torch.equal(state.x_best[1], begun[1])
    assert state.margin_best_B.isfinite().tolist() == (~broken_B).tolist()


class Syncs(TorchDispatchMode):
    """Ops that wait for a device: values read by the host, and sizes that depend on values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        boolean = name == "aten::index" and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if boolean or name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@THREATS
def test_a_step_waits_for_no_device(threat_model: str) -> None:
    attack = Square(lambda images: images.flatten(1)[:, :5], BALLS[threat_model], seed=0, num_queries=4)
    state = attack.begin(start_of())
    with Syncs() as syncs:
        attack.advance(state, last=False)
        attack.advance(state, last=False)
    assert syncs.found == []
    with Syncs() as syncs:
        bool(state.step_B[0] > 0)
    assert syncs.found


def test_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="threat_model"):
        Square(Network(), Ball("L7", 0.1), seed=0)
    with pytest.raises(ValueError, match="x_nat: 16 channels"):
        Square(Network(), BALLS["Linf"], seed=0).begin(start_of((16, 4, 4)))
