"""The resident pipeline: what an epoch holds, and that a batch is a pure function of (seed, epoch, step)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.crop_flip import crop_flip
from engine.kernels.philox import Stream, random_words
from engine.pipelines.base import Batch, Pipeline
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Split
from engine.pipelines.tensor import TensorPipeline

IMAGES = torch.randint(0, 256, (50, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(50) % 7
WHOLE = Split(IMAGES, LABELS, tuple("abcdefg"))


def pipeline(count: int = 50, batch_size: int = 16, seed: int = 3, shuffle: bool = True) -> TensorPipeline:
    sampling = Sampling(count, batch_size, seed, "random" if shuffle else "sequential")
    return TensorPipeline(WHOLE.take(torch.arange(count)), sampling, augment=True, flip=True, device="cpu")


def order(batches: list[Batch]) -> Tensor:
    return torch.cat([batch.sample for batch in batches])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 2**63 - 1), st.integers(0, 300))
def test_an_epoch_holds_every_sample_once(count: int, batch_size: int, seed: int, epoch: int) -> None:
    data: Pipeline = pipeline(count, batch_size, seed)
    batches = list(data.epoch(epoch))
    assert order(batches).sort().values.tolist() == list(range(count))
    assert data.num_samples == count
    sizes = [len(batch.labels) for batch in batches]
    assert sizes[:-1] == [batch_size] * (data.steps_per_epoch - 1)
    assert 0 < sizes[-1] <= batch_size


def test_batches_are_the_views_of_their_samples() -> None:
    for batch in pipeline().epoch(4):
        x_nat, labels = crop_flip(IMAGES, LABELS, batch.sample, seed=3, epoch=4)
        assert torch.equal(batch.x_nat, x_nat)
        assert torch.equal(batch.labels, labels)
        assert torch.equal(batch.labels, LABELS[batch.sample])


@pytest.mark.parametrize("start_step", [0, 1, 3, 4])
def test_an_epoch_from_start_step_is_its_tail(start_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(pipeline().epoch(2))
    made: list[int] = []

    def counted(images: Tensor, labels: Tensor, sample: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        made.append(len(sample))
        return crop_flip(images, labels, sample, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("engine.pipelines.tensor.crop_flip", counted)
    tail = list(pipeline().epoch(2, start_step))
    assert len(tail) == len(made) == len(whole) - start_step
    for batch, expected in zip(tail, whole[start_step:], strict=True):
        assert torch.equal(batch.x_nat, expected.x_nat)
        assert torch.equal(batch.sample, expected.sample)


def test_samples_and_views_do_not_depend_on_the_batch_size() -> None:
    small, large = list(pipeline(batch_size=7).epoch(1)), list(pipeline(batch_size=50).epoch(1))
    assert torch.equal(order(small), order(large))
    assert torch.equal(torch.cat([batch.x_nat for batch in small]), large[0].x_nat)


def test_the_order_changes_with_epoch_and_seed_and_comes_back() -> None:
    orders = [order(list(pipeline(seed=seed).epoch(epoch))).tolist() for seed in (0, 1, 2**40) for epoch in (0, 1)]
    assert len({tuple(each) for each in orders}) == 6
    assert order(list(pipeline(seed=1).epoch(1))).tolist() == orders[3]


def test_the_order_sorts_the_words_and_ties_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    words = random_words(3, Stream.SHUFFLE, 6, torch.arange(50), 1)[:, 0].tolist()
    assert order(list(pipeline().epoch(6))).tolist() == sorted(range(50), key=lambda i: words[i])
    monkeypatch.setattr("engine.pipelines.sampling.random_words", lambda *_: torch.arange(50)[:, None] % 2)
    assert order(list(pipeline().epoch(6))).tolist() == [*range(0, 50, 2), *range(1, 50, 2)]


def test_without_shuffling_the_order_is_that_of_the_data() -> None:
    assert order(list(pipeline(shuffle=False).epoch(9))).tolist() == list(range(50))


def test_positions_of_a_sample_are_uniform_over_epochs() -> None:
    first = torch.stack([order(list(pipeline(8, 8).epoch(epoch))) for epoch in range(800)])
    counts = torch.stack([column.bincount(minlength=8) for column in first.T]).double()
    assert (counts - 100).abs().max() < 4.5 * 100**0.5


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size must be 1 or more, got {batch_size}"):
        pipeline(batch_size=batch_size)


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        pipeline(count=0)
