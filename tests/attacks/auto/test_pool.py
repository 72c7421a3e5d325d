"""Slots: the lowest rank that is a hit wins, whatever the order, the number of slots and the neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.attacks.auto import pool
from engine.attacks.auto.apgd import Apgd
from engine.attacks.auto.fab import FabT
from engine.attacks.auto.pool import FEWEST_SLOTS, ImageOutcome, attack_all, slots_for
from engine.attacks.auto.search import AttackState, Ball, PassCount, Search, Start, StepResult
from engine.attacks.auto.slots import Item
from engine.attacks.auto.square import Square
from engine.kernels.philox import Stream

TABLE_STEPS = 7
Hits = dict[tuple[int, int], tuple[int, ...]]
"""(image, rank) -> steps at which an image is found"""


@dataclass
class TableState(AttackState):
    """sample: the image. rank: of the target."""

    sample_B: Tensor
    rank_B: Tensor


class Table(Search[TableState]):
    """Hits that are written down. What is found tells of the image, the rank and the step."""

    def __init__(self, hits: Hits, lost: Sequence[tuple[int, int, int]] = ()) -> None:
        self.steps, self._hits, self._lost = TABLE_STEPS, hits, set(lost)
        self.sizes: list[int] = []
        self.lasts: list[bool] = []
        self.begun: list[tuple[int, int]] = []

    def begin(self, start: Start) -> TableState:
        self.begun += zip(start.sample_B.tolist(), start.rank_B.tolist(), strict=True)
        zeros = torch.zeros_like(start.labels_B)
        return TableState(start.x_nat, start.labels_B, zeros, start.sample_B.clone(), start.rank_B.clone())

    def advance(self, state: TableState, *, last: bool) -> StepResult:
        rows = list(zip(*(each.tolist() for each in (state.sample_B, state.rank_B, state.step_B)), strict=True))
        self.sizes.append(len(rows))
        self.lasts.append(last)
        hit = [step in self._hits.get((image, rank), ()) for image, rank, step in rows]
        found = torch.tensor([[image, rank, step] for image, rank, step in rows]).double()[:, :, None, None]
        finite = [row not in self._lost for row in rows]
        state.step_B += 1
        return StepResult(torch.tensor(hit), found, torch.tensor(finite))

    def passes(self, steps: int) -> PassCount:
        return PassCount(10 * steps, steps)


def start_of(items: Sequence[Item]) -> Start:
    image_R, rank_R = torch.tensor(items).unbind(1)
    return Start(torch.zeros(len(items), 3, 1, 1, dtype=torch.float64), image_R, image_R, rank_R, rank_R)


class Judge:
    """Confirms all but some of what is found, and moves it by a half."""

    def __init__(self, refused: Sequence[tuple[int, int, int]] = ()) -> None:
        self._refused = set(refused)

    def __call__(self, items: Sequence[Item], found: Tensor) -> tuple[Tensor, Tensor]:
        what = [tuple(int(value) for value in row) for row in found.flatten(1).tolist()]
        assert [Item(image, rank) for image, rank, _ in what] == list(items)
        return found + 0.5, torch.tensor([row not in self._refused for row in what])


def run(
    search: Table, items: Sequence[Item], size: int = 64, refused: Sequence[tuple[int, int, int]] = ()
) -> dict[int, ImageOutcome]:
    outcomes = list(attack_all(search, start_of, items, size, Judge(refused), lambda: None))
    found = {outcome.image: outcome for outcome in outcomes}
    assert len(found) == len(outcomes)
    return found


def items_of(images: Sequence[int], ranks: Sequence[int]) -> list[Item]:
    return [Item(image, rank) for rank in ranks for image in images]


def expected(
    hits: Hits, image: int, ranks: Sequence[int], refused: Sequence[tuple[int, int, int]] = ()
) -> tuple[int | None, int | None, PassCount]:
    """Rank and step of the first hit, rank by rank, and what it took."""
    steps = 0
    for rank in ranks:
        confirmed = [step for step in sorted(hits.get((image, rank), ())) if (image, rank, step) not in refused]
        if confirmed:
            steps += confirmed[0] + 1
            return rank, confirmed[0], PassCount(10 * steps, steps)
        steps += TABLE_STEPS
    return None, None, PassCount(10 * steps, steps)


def check(outcome: ImageOutcome, image: int, wanted: tuple[int | None, int | None, PassCount]) -> None:
    rank, step, passes = wanted
    assert (outcome.rank, outcome.passes) == (rank, passes)
    if rank is None or step is None:
        assert outcome.x_adv is None
    else:
        assert outcome.x_adv is not None
        assert outcome.x_adv.flatten().tolist() == [image + 0.5, rank + 0.5, step + 0.5]


TABLES = st.dictionaries(
    st.tuples(st.integers(0, 99), st.integers(2, 5)),
    st.lists(st.integers(0, TABLE_STEPS - 1), min_size=1, max_size=3).map(tuple),
    max_size=120,
)


@settings(max_examples=60, deadline=None)
@given(
    hits=TABLES,
    count=st.integers(1, 100),
    ranks=st.integers(1, 4),
    size=st.sampled_from([1, 7, 64, 65, 100, 250]),
    order=st.randoms(use_true_random=False),
    looks=st.sampled_from([1, 3, 16]),
    data=st.data(),
)
def test_the_lowest_rank_that_is_a_hit_wins(
    hits: Hits, count: int, ranks: int, size: int, order: Any, looks: int, data: st.DataObject
) -> None:
    images, wanted = list(range(count)), list(range(2, 2 + ranks))
    order.shuffle(images)
    found = [(image, rank, step) for (image, rank), steps in hits.items() for step in steps]
    # Between two looks only the first hit is kept, so that one that is refused hides others.
    refused = data.draw(st.lists(st.sampled_from(found), max_size=10)) if found and looks == 1 else []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pool, "_STEPS_BETWEEN_LOOKS", {"cpu": looks})
        search = Table(hits)
        outcomes = run(search, items_of(images, wanted), size, refused)
    assert outcomes.keys() == set(images)
    for image, outcome in outcomes.items():
        check(outcome, image, expected(hits, image, wanted, refused))
    assert min(search.sizes) >= min(size, FEWEST_SLOTS)
    assert max(search.sizes) <= size


def test_slots_are_refilled_and_then_fewer() -> None:
    """150 images, of which the even ones fall at once: their slots go to others in the middle of the attack."""
    hits: Hits = {(image, 2): (0,) for image in range(0, 150, 2)}
    search = Table(hits)
    run(search, items_of(range(150), [2]), 250)
    assert search.sizes[0] == 150
    assert search.sizes[1:] == [75] * (TABLE_STEPS - 1)
    search = Table(hits)
    run(search, items_of(range(150), [2]), 75)
    assert search.sizes[:TABLE_STEPS] == [75] * TABLE_STEPS
    # An even image leaves its slot to the next odd one, whose seven steps begin there.
    assert len(search.sizes) == 2 * TABLE_STEPS
    assert search.sizes == sorted(search.sizes, reverse=True)
    assert search.sizes[-1] < 0.75 * 75


def test_a_hit_ends_the_higher_ranks_of_its_image() -> None:
    """Those that wait are never begun, and those at work leave their slots at once."""
    hits: Hits = {(image, 2): (2,) for image in range(64)}
    search = Table(hits)
    outcomes = run(search, items_of(range(64), range(2, 11)), 64)
    assert len(search.sizes) == 3
    assert {rank for _, rank in search.begun} == {2}
    assert {outcome.passes for outcome in outcomes.values()} == {PassCount(30, 3)}
    search = Table(hits)
    run(search, items_of(range(64), range(2, 6)), 256)
    assert search.sizes == [256] * 3


def test_a_higher_rank_that_hits_first_waits_for_the_lower_ones() -> None:
    hits: Hits = {(0, 4): (0,), (0, 3): (5,)}
    search = Table(hits)
    outcome = run(search, items_of([0], range(2, 6)))[0]
    check(outcome, 0, (3, 5, PassCount(10 * (TABLE_STEPS + 6), TABLE_STEPS + 6)))
    check(run(Table({(0, 4): (0,)}), items_of([0], range(2, 6)))[0], 0, (4, 0, PassCount(150, 15)))


def test_a_hit_that_is_not_confirmed_goes_on() -> None:
    hits: Hits = {(3, 2): (1, 4), (5, 2): (2,)}
    outcomes = run(Table(hits), items_of(range(6), [2]), refused=[(3, 2, 1), (5, 2, 2)])
    check(outcomes[3], 3, (2, 4, PassCount(50, 5)))
    check(outcomes[5], 5, (None, None, PassCount(70, 7)))


def test_only_the_last_step_of_all_is_the_last() -> None:
    search = Table({})
    run(search, items_of(range(70), [2]))
    assert search.lasts.count(True) >= 1
    assert not any(search.lasts[: TABLE_STEPS - 1])
    assert search.lasts[-1]


def test_logits_that_are_not_finite_end_everything() -> None:
    with pytest.raises(FloatingPointError, match="the logits of 2 images under attack are NaN or infinite"):
        run(Table({}, [(4, 2, 3), (9, 2, 3), (8, 2, 5)]), items_of(range(70), [2]))
    # Not those of an image that has fallen before, nor of one that fills a slot.
    run(Table({(4, 2): (1,)}, [(4, 2, 3)]), items_of(range(70), [2]))


@given(count=st.integers(0, 3000), size=st.integers(1, 500))
def test_slots_are_as_many_as_fit_in_fills_of_one_size(count: int, size: int) -> None:
    slots = slots_for(count, size)
    assert (slots == 0) == (count == 0)
    if count:
        fills = -(-count // size)
        assert slots <= size
        assert slots * fills >= count > (slots - 1) * fills


def test_nothing_to_attack() -> None:
    assert run(Table({}), []) == {}


# ---------------------------------------------------------------- the real attacks


def small_network() -> nn.Module:
    torch.manual_seed(2)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 5)]
    network = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    return network.eval().requires_grad_(False)


NETWORK = small_network()
X_NAT = torch.rand(130, 3, 8, 8, generator=torch.Generator().manual_seed(3)).to(memory_format=torch.channels_last)
ORDER_BC = NETWORK(X_NAT).argsort(dim=1, descending=True)
SEARCHES: dict[str, Callable[[Ball], Search[Any]]] = {
    "apgd-ce": lambda ball: Apgd(NETWORK, "ce", ball, seed=1, stream=Stream.APGD_CE, num_steps=25),
    "apgd-t": lambda ball: Apgd(NETWORK, "dlr-targeted", ball, seed=1, stream=Stream.APGD_T, num_steps=25),
    "fab-t": lambda ball: FabT(NETWORK, ball, num_steps=15),
    "square": lambda ball: Square(NETWORK, ball, seed=1, num_queries=150),
}
EPSILONS = {"Linf": 0.016, "L2": 0.16}


def real_start(items: Sequence[Item]) -> Start:
    image_R, rank_R = torch.tensor(items).unbind(1)
    target_R = ORDER_BC[image_R].gather(1, rank_R[:, None] - 1).squeeze(1)
    return Start(X_NAT[image_R], ORDER_BC[image_R, 0], image_R + 5000, rank_R, target_R)


def real(
    name: str, threat_model: str, images: Sequence[int], size: int
) -> dict[int, tuple[int | None, PassCount, list[float] | None]]:
    """Rank that broke each image, its passes, and its pixels."""

    def confirm(items: Sequence[Item], found: Tensor) -> tuple[Tensor, Tensor]:
        return found, torch.ones(len(items), dtype=torch.bool)

    search: Search[Any] = SEARCHES[name](Ball(threat_model, EPSILONS[threat_model]))
    ranks = range(2, 5) if name in ("apgd-t", "fab-t") else [2]
    return {
        image: (rank, passes, None if x_adv is None else x_adv.flatten().tolist())
        for image, x_adv, rank, passes in attack_all(
            search, real_start, items_of(images, ranks), size, confirm, lambda: None
        )
    }


@pytest.mark.parametrize("threat_model", sorted(EPSILONS))
@pytest.mark.parametrize("name", sorted(SEARCHES))
def test_an_image_s_outcome_is_its_own_to_the_last_bit(name: str, threat_model: str) -> None:
    whole = real(name, threat_model, range(130), 64)
    fell = sum(rank is not None for rank, _, _ in whole.values())
    assert 2 < fell < 128
    for size in (100, 250):
        assert real(name, threat_model, range(130), size) == whole
    shuffled = torch.randperm(130, generator=torch.Generator().manual_seed(4)).tolist()
    assert real(name, threat_model, shuffled, 100) == whole
    for image in (0, 77):
        assert real(name, threat_model, [image], 250) == {image: whole[image]}
