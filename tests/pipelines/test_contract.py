"""Contract of every pipeline, so that training cannot tell them apart: the order, the views, and the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from typing import Any

import pytest
import torch

from engine.pipelines.base import Batch, Pipeline
from engine.pipelines.sampling import Extra, Sampling, Shard
from engine.pipelines.tensor import TensorPipeline
from tests.pipelines.loaders import (
    ARRAYS,
    COUNT,
    LABELS,
    LOADERS,
    Data,
    Loader,
    equal,
    order,
    python_threads,
    require,
    threads,
    threads_end,
)


@pytest.fixture(scope="module", params=LOADERS, ids=lambda loader: loader.name)
def loader(request: pytest.FixtureRequest) -> Loader:
    require(request.param)
    chosen: Loader = request.param
    return chosen


@pytest.fixture(scope="module")
def data(loader: Loader, tmp_path_factory: pytest.TempPathFactory) -> Data:
    images = loader.make_data(tmp_path_factory.mktemp(loader.name))
    list(loader(images).epoch(0))  # what is compiled, and pools of threads that stay, are there from now on
    return images


def those(wanted: Callable[[Loader], bool]) -> pytest.MarkDecorator:
    """The loaders that a test is for."""
    chosen = [loader for loader in LOADERS if wanted(loader)]
    return pytest.mark.parametrize("loader", chosen, indirect=True, ids=[loader.name for loader in chosen])


that_load = those(lambda loader: loader.name != "tensor")


@pytest.fixture(autouse=True)
def others(data: Data) -> Iterator[list[threading.Thread]]:
    """The threads that a test begins with; it must end with no more."""
    before, others = len(threads()), threading.enumerate()
    yield others
    assert threads_end(before), (threads(), python_threads(others))


# ---------------------------------------------------------------- the stream of batches


@pytest.mark.parametrize("last", ["keep", "drop", "pad"])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_batches_of_all_ranks_are_those_of_one(loader: Loader, data: Data, last: str, world: int) -> None:
    size = 24
    whole = list(loader(data, size, last=last).epoch(1))
    ranks = [list(loader(data, size, last=last, shard=Shard(rank, world)).epoch(1)) for rank in range(world)]
    for number, expected in enumerate(whole):
        parts = [rank[number] for rank in ranks]
        assert max(len(part.sample) for part in parts) - min(len(part.sample) for part in parts) <= 1
        together = Batch(
            torch.cat([part.x_nat for part in parts]),
            torch.cat([part.labels for part in parts]),
            torch.cat([part.sample for part in parts]),
        )
        assert equal(together, expected)
    seen = order(whole)
    assert len(seen) == {"keep": COUNT, "drop": size, "pad": 2 * size}[last]
    assert seen[:COUNT].unique().numel() == min(len(seen), COUNT)
    assert len(whole) == loader(data, size, last=last).steps_per_epoch == (1 if last == "drop" else 2)


@pytest.mark.parametrize("world", [1, 3, 8])
def test_evaluation_sees_every_image_once_and_in_order(loader: Loader, data: Data, world: int) -> None:
    shards = [Shard(rank, world) for rank in range(world)]
    ranks = [list(loader(data, 24, order="sequential", augment=False, shard=shard).epoch(0)) for shard in shards]
    assert torch.cat([order([rank[step] for rank in ranks]) for step in range(2)]).tolist() == list(range(COUNT))
    if loader.whole:
        views = torch.cat([rank[step].x_nat for step in range(2) for rank in ranks])
        assert torch.equal(views * 255, ARRAYS.images.permute(0, 3, 1, 2).float())


@those(lambda loader: loader.whole)
def test_extra_images_stand_between_the_others(loader: Loader, data: Data) -> None:
    """The last 23 of the images are extra ones."""
    sampling = Sampling(20, 8, 3, extra=Extra(23, 0.5))
    options: dict[str, Any] = {"augment": False, "flip": False, "device": "cpu"}
    batches = list(loader.kind(data, sampling, **options).epoch(1))
    seen = order(batches)
    assert [int((batch.sample >= 20).sum()) for batch in batches] == [4] * 5
    assert seen[seen < 20].sort().values.tolist() == list(range(20))
    assert seen[seen >= 20].unique().numel() >= 17  # 3 of the 23 were left by the first epoch
    assert torch.equal(torch.cat([batch.labels for batch in batches]), LABELS[seen])
    views = torch.cat([batch.x_nat for batch in batches])
    assert torch.equal(views * 255, ARRAYS.images[seen].permute(0, 3, 1, 2).float())


def test_more_ranks_than_samples_leave_empty_batches(loader: Loader, data: Data) -> None:
    few = data.take(torch.arange(9))
    for rank in range(8):
        first, last = loader(few, 8, shard=Shard(rank, 8)).epoch(0)
        assert len(first.sample) == len(first.x_nat) == 1
        assert len(last.sample) == len(last.x_nat) == len(last.labels) == (rank == 0)
        assert last.x_nat.shape[1:] == first.x_nat.shape[1:]


@pytest.mark.parametrize("augment", [True, False])
def test_an_epoch_from_any_step_is_its_tail(loader: Loader, data: Data, augment: bool) -> None:
    """A new pipeline resumes in the middle of an epoch: a loader has no state that must be saved."""
    whole = list(loader(data, augment=augment).epoch(2))
    resumed = loader(data, augment=augment)
    for start_step in range(len(whole) + 1):
        tail = list(resumed.epoch(2, start_step))
        assert len(tail) == len(whole) - start_step
        assert all(map(equal, tail, whole[start_step:]))


def test_views_do_not_depend_on_the_batch_size(loader: Loader, data: Data) -> None:
    (whole,) = loader(data, COUNT).epoch(1)
    parts = list(loader(data, 5).epoch(1))
    assert torch.equal(order(parts), whole.sample)
    assert torch.equal(torch.cat([part.x_nat for part in parts]), whole.x_nat)


@that_load
@pytest.mark.parametrize("options", [{"workers": 2}, {"batches_ahead": 1}, {"batches_ahead": 5}])
def test_how_they_are_loaded_changes_no_bit(loader: Loader, data: Data, options: dict[str, int]) -> None:
    assert all(map(equal, loader(data, **options).epoch(1), loader(data).epoch(1)))


def test_epochs_and_seeds_differ_and_come_back(loader: Loader, data: Data) -> None:
    one = loader(data, COUNT, order="sequential")
    views = [next(one.epoch(epoch)).x_nat for epoch in (0, 1, 0)]
    views.append(next(loader(data, COUNT, order="sequential", seed=4).epoch(0)).x_nat)
    assert torch.equal(views[0], views[2])
    for other in (views[1], views[3]):
        changed = (views[0] != other).flatten(1).any(1)
        assert changed.double().mean() > 0.9
    assert not torch.equal(*(order(list(loader(data).epoch(epoch))) for epoch in (0, 1)))


@pytest.mark.parametrize("batches_ahead", [1, 3])
def test_a_batch_that_is_held_keeps_its_values(loader: Loader, data: Data, batches_ahead: int) -> None:
    """Across more batches than a loader makes ahead, whose buffers it uses again."""
    options = {} if loader.name == "tensor" else {"batches_ahead": batches_ahead}
    held, copies = [], []
    for batch in loader(data, 4, **options).epoch(0):
        held.append(batch)
        copies.append(Batch(batch.x_nat.clone(), batch.labels.clone(), batch.sample.clone()))
    assert len(held) == 11 > 2 * batches_ahead + 2
    assert all(map(equal, held, copies))
    assert len({batch.x_nat.data_ptr() for batch in held}) == 11


def test_two_epochs_of_one_pipeline_may_run_at_once(loader: Loader, data: Data) -> None:
    one = loader(data)
    expected = [list(one.epoch(epoch)) for epoch in (0, 1)]
    for first, second, *wanted in zip(one.epoch(0), one.epoch(1), *expected, strict=True):
        assert equal(first, wanted[0])
        assert equal(second, wanted[1])


# ---------------------------------------------------------------- the views


def test_values_layout_and_labels(loader: Loader, data: Data) -> None:
    one: Pipeline = loader(data)
    assert one.num_samples == COUNT
    size = 16 if data.any_size else 8
    for batch in one.epoch(0):
        assert batch.x_nat.dtype == torch.float32
        assert batch.x_nat.shape == (len(batch.sample), 3, size, size)
        assert batch.x_nat.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == batch.sample.dtype == torch.int64
        assert torch.equal(batch.labels, data.labels[batch.sample])
        levels = batch.x_nat * 255
        assert torch.equal(levels, levels.round())
        assert levels.min() >= 0
        assert levels.max() <= 255
        assert levels.max() > 100


@those(lambda loader: loader.whole and loader.name != "tensor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("augment", "flip"), [(True, True), (True, False), (False, True)])
def test_whole_images_are_cropped_and_flipped_to_the_bit_alike(
    loader: Loader, data: Data, augment: bool, flip: bool, dtype: torch.dtype
) -> None:
    sampling = Sampling(COUNT, 8, 3, loader.order)
    resident = TensorPipeline(ARRAYS, sampling, augment=augment, flip=flip, device="cpu", dtype=dtype)
    got = list(loader(data, augment=augment, flip=flip, dtype=dtype).epoch(5))
    expected = list(resident.epoch(5))
    assert len(got) == len(expected)
    assert all(map(equal, got, expected))
    assert all(batch.x_nat.dtype == dtype for batch in got)


def test_a_part_of_the_images_is_a_data_set_of_its_own(loader: Loader, data: Data) -> None:
    """Samples of a subset are numbered anew, as after holding some out; images and labels stay together."""
    index = torch.tensor([40, 3, 17, 5, 29])
    part = list(loader(data.take(index), 2, order="sequential", augment=False).epoch(0))
    whole = next(loader(data, COUNT, order="sequential", augment=False).epoch(0))
    assert order(part).tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(torch.cat([batch.labels for batch in part]), data.labels[index])
    assert torch.equal(torch.cat([batch.x_nat for batch in part]), whole.x_nat[index])


# ---------------------------------------------------------------- the end


def test_close_ends_what_was_left_unfinished(loader: Loader, data: Data, others: list[threading.Thread]) -> None:
    one = loader(data)
    unfinished = [one.epoch(epoch) for epoch in range(3)]
    for batches in unfinished[:2]:
        next(batches)
    one.close()
    if loader.name != "tensor":
        assert [list(batches) for batches in unfinished] == [[], [], []]
    assert python_threads(others) == []
    one.close()


def test_an_epoch_that_is_dropped_ends_by_itself(
    loader: Loader, data: Data, others: list[threading.Thread]
) -> None:
    for batch in loader(data).epoch(0):
        assert len(batch.sample) == 8
        break
    assert python_threads(others) == []


def test_an_exception_of_the_consumer_leaves_nothing(
    loader: Loader, data: Data, others: list[threading.Thread]
) -> None:
    def consume() -> None:
        with closing(loader(data)) as one:
            for _ in one.epoch(0):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert python_threads(others) == []


@that_load
@pytest.mark.parametrize("name", ["workers", "batches_ahead"])
def test_numbers_below_one_are_refused(loader: Loader, data: Data, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be 1 or more, got 0$"):
        loader(data, **{name: 0})


def test_the_order_is_quasi_random_where_asked_for(loader: Loader, data: Data) -> None:
    """So few images are a single block: their order is another permutation than the random one."""
    seen = order(list(loader(data, order="quasi-random").epoch(0)))
    assert sorted(seen.tolist()) == list(range(COUNT))
    assert any(first > second for first, second in pairwise(seen.tolist()))
