"""Stratified parts: disjoint, complete, every class by its share, the same for the same seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.pipelines.splits import Split, balanced, limited, split_validation

SIZES = st.lists(st.integers(2, 60), min_size=2, max_size=6)
SEED = st.integers(0, 2**63 - 1)


def make_split(sizes: list[int]) -> Split:
    """Images whose first two bytes are their index, and shuffled labels with so many of each class."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    index = torch.arange(len(labels))
    images = torch.zeros(len(labels), 2, 2, 3, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = index // 256, index % 256
    return Split(images, labels, tuple(f"class {c}" for c in range(len(sizes))))


def indices(split: Split) -> list[int]:
    pixels = split.images[:, 0, 0].long()
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


@settings(max_examples=60, deadline=None)
@given(SIZES, st.floats(0.001, 0.999), SEED)
def test_validation_is_disjoint_complete_and_stratified(sizes: list[int], fraction: float, seed: int) -> None:
    whole = make_split(sizes)
    train, validation = split_validation(whole, fraction, seed)
    assert sorted(indices(train) + indices(validation)) == list(range(len(whole)))
    for part in (train, validation):
        assert torch.equal(part.labels, whole.labels[indices(part)])
        assert part.class_names == whole.class_names
    held = validation.labels.bincount(minlength=len(sizes)).tolist()
    assert all(1 <= count < size for count, size in zip(held, sizes, strict=True))
    free = all(int(fraction * size) >= 1 and fraction * size + 1 < size for size in sizes)
    if free:  # no class is kept from its share
        assert sum(held) == round(fraction * sum(sizes))
        assert all(abs(count - fraction * size) < 1 for count, size in zip(held, sizes, strict=True))


def test_the_largest_remainders_round_up() -> None:
    _, validation = split_validation(make_split([14, 16, 18, 12]), 0.1)  # shares 1.4, 1.6, 1.8, 1.2 of 6
    assert validation.labels.bincount().tolist() == [1, 2, 2, 1]


def test_a_small_class_keeps_one_image_in_each_part() -> None:
    _, validation = split_validation(make_split([60, 2]), 0.03)  # shares 1.8, 0.06 of 2
    assert validation.labels.bincount().tolist() == [1, 1]
    train, _ = split_validation(make_split([60, 2]), 0.97)
    assert train.labels.bincount().tolist() == [1, 1]
    _, validation = split_validation(make_split([60, 2, 2, 2]), 0.05)  # shares 3, 0.1, 0.1, 0.1; 4 in all
    assert validation.labels.bincount().tolist() == [1, 1, 1, 1]


def test_the_choice_follows_the_seed_alone() -> None:
    whole = make_split([50, 50])
    first, again, other = (indices(split_validation(whole, 0.2, seed)[1]) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_every_image_is_held_out_equally_often() -> None:
    held = torch.zeros(40)
    for seed in range(1000):
        held[indices(split_validation(make_split([20, 20]), 0.25, seed)[1])] += 1
    assert (held - 250).abs().max() < 4.5 * (1000 * 0.25 * 0.75) ** 0.5


def test_fraction_zero_holds_nothing_out() -> None:
    whole = make_split([1, 3])
    train, validation = split_validation(whole, 0)
    assert indices(train) == [0, 1, 2, 3]
    assert len(validation) == 0
    assert validation.images.shape == (0, 2, 2, 3)


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_a_fraction_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(
        ValueError, match=r"validation: a fraction from 0 to below 1 is expected, got (-0\.1|1|1\.5|nan)"
    ):
        split_validation(make_split([4, 4]), fraction)


def test_a_class_of_a_single_image_is_refused() -> None:
    with pytest.raises(ValueError, match="validation: class 'class 1' has a single image"):
        split_validation(make_split([4, 1]), 0.1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=6), SEED, st.data())
def test_a_limit_is_balanced_as_far_as_the_classes_reach(sizes: list[int], seed: int, data: st.DataObject) -> None:
    labels = make_split(sizes).labels
    limit = data.draw(st.integers(1, len(labels)))
    index = limited(labels, limit, seed, "limit_train")
    assert len(index) == limit
    assert torch.equal(index, index.unique())
    counts = labels[index].bincount(minlength=len(sizes)).tolist()
    most = max(counts)
    assert all(count == size or count >= most - 1 for count, size in zip(counts, sizes, strict=True))


def test_a_limit_of_none_or_above_the_size_is_the_whole() -> None:
    labels = torch.tensor([1, 0, 1])
    for limit in (None, 3, 100):
        assert limited(labels, limit, 0, "limit_test").tolist() == [0, 1, 2]


def test_a_limit_below_the_number_of_classes_takes_one_of_each_of_the_first() -> None:
    labels = torch.tensor([2, 1, 2, 0, 1, 0])
    assert labels[limited(labels, 2, 0, "limit_test")].sort().values.tolist() == [0, 1]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=f"^limit_test must be 1 or more, got {limit}$"):
        limited(torch.tensor([0, 1]), limit, 0, "limit_test")


def test_a_balanced_part_has_its_own_images_and_labels() -> None:
    whole = make_split([30, 30])
    part = balanced(whole, 10)
    assert part.labels.bincount().tolist() == [5, 5]
    assert torch.equal(part.labels, whole.labels[indices(part)])
    assert balanced(whole, 1).labels.tolist() == [0]


def test_limits_and_validation_choose_independently() -> None:
    whole = make_split([200, 200])
    limit = set(limited(whole.labels, 200, 0, "limit_train").tolist())
    held = indices(split_validation(whole, 0.5, 0)[1])
    shared = sum(index in limit for index in held)
    assert abs(shared - 100) < 4.5 * 50**0.5
