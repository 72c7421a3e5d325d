"""Every sample once, the same batches on any number of ranks, and from any step on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.pipelines.sampling import Extra, Sampling, Shard

ORDERS = ("random", "quasi-random", "sequential")


@pytest.mark.parametrize("last", ["keep", "drop", "pad"])
@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.integers(30, 700),
    per_rank=st.integers(1, 3),
    world=st.sampled_from([1, 2, 3, 8]),
    order=st.sampled_from(ORDERS),
    epoch=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_the_ranks_together_see_the_epoch_of_one(
    last: str, num_samples: int, per_rank: int, world: int, order: str, epoch: int, data: st.DataObject
) -> None:
    size = per_rank * world
    ranks = [Sampling(num_samples, size, 5, order, last, Shard(rank, world)) for rank in range(world)]
    one = Sampling(num_samples, size, 5, order, last)
    start = data.draw(st.integers(0, one.steps_per_epoch))
    whole = one.batches(epoch)
    assert len(whole) == one.steps_per_epoch
    parts = [rank.batches(epoch, start) for rank in ranks]
    for step, batch in enumerate(whole[start:]):
        assert torch.equal(torch.cat([part[step] for part in parts]), batch)
    seen = torch.cat(whole)
    full = num_samples // size * size
    expected = {"keep": num_samples, "drop": full, "pad": one.steps_per_epoch * size}[last]
    assert len(seen) == expected
    assert len(seen.unique()) == min(expected, num_samples)
    assert int(seen.max()) < num_samples


@pytest.mark.parametrize("order", ["random", "quasi-random"])
def test_an_order_is_shuffled_anew_in_every_epoch_and_for_every_seed(order: str) -> None:
    first = Sampling(5000, 50, 1, order).samples(0)
    assert torch.equal(first, Sampling(5000, 50, 1, order).samples(0))
    for other in (Sampling(5000, 50, 1, order).samples(1), Sampling(5000, 50, 2, order).samples(0)):
        assert (first == other).float().mean() < 0.01


def test_quasi_random_order_stays_within_a_window_of_blocks() -> None:
    blocks = Sampling(256 * 64, 64, 0, "quasi-random").samples(3).view(4, -1) // 256
    assert [len(window.unique()) for window in blocks] == [16] * 4


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"order": "odd"}, "order"),
        ({"last": "lose"}, "last"),
        ({"num_samples": 0}, "at least one image"),
        ({"batch_size": 0}, "batch_size"),
        ({"shard": Shard(0, 3)}, "multiple"),
        ({"last": "drop", "batch_size": 20}, "dropped"),
    ],
)
def test_what_does_not_fit_is_refused(keys: dict[str, object], named: str) -> None:
    arguments: dict[str, object] = {"num_samples": 10, "batch_size": 4} | keys
    with pytest.raises(ValueError, match=named):
        Sampling(**arguments)  # type: ignore[arg-type]


# ---------------------------------------------------------------- extra images


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 60),
    extra=st.integers(1, 90),
    percent=st.integers(1, 95),
    batch_size=st.integers(1, 40),
    order=st.sampled_from(sorted(ORDERS)),
    seed=st.integers(0, 2**63 - 1),
)
def test_an_epoch_has_every_sample_once_and_its_share_of_extra_ones(
    samples: int, extra: int, percent: int, batch_size: int, order: str, seed: int
) -> None:
    """Over the epochs every extra image comes as often as any other, give or take one."""
    sampling = Sampling(samples, batch_size, seed, order, extra=Extra(extra, percent / 100))
    count = (2 * samples * percent + (100 - percent)) // (2 * (100 - percent))  # rounded, halves up
    assert sampling.epoch_size == samples + count
    assert sampling.num_images == samples + extra
    seen = torch.zeros(samples + extra, dtype=torch.int64)
    for epoch in range(4):
        batches = sampling.batches(epoch)
        assert len(batches) == sampling.steps_per_epoch
        assert [len(batch) for batch in batches] == [sampling.size_of(step) for step in range(len(batches))]
        for batch in batches:
            in_batch = int((batch >= samples).sum())
            assert abs(in_batch - len(batch) * percent / 100) < 1 + 1e-9
        seen += torch.cat(batches).bincount(minlength=samples + extra)
        assert (seen[:samples] == epoch + 1).all()
        assert int(seen[samples:].sum()) == (epoch + 1) * count
        assert int(seen[samples:].max() - seen[samples:].min()) <= 1


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_has_its_share_of_extra_images(world: int) -> None:
    whole = Sampling(50, 6 * world, extra=Extra(1000, 0.5))
    ranks = [replace(whole, shard=Shard(rank, world)).batches(2, 1) for rank in range(world)]
    for step, expected in enumerate(whole.batches(2)[1:]):
        assert torch.equal(torch.cat([rank[step] for rank in ranks]), expected)
        for rank in ranks:
            assert abs(int((rank[step] >= 50).sum()) - len(rank[step]) / 2) <= 1


@pytest.mark.parametrize(
    ("images", "fraction", "named"),
    [(0, 0.5, "data"), (5, 0.0, "fraction"), (5, 1.0, "fraction"), (5, 1e-9, "fraction")],
)
def test_no_extra_images_and_no_fraction_are_refused(images: int, fraction: float, named: str) -> None:
    with pytest.raises(ValueError, match=f"^extra_{named}"):
        Extra(images, fraction)
