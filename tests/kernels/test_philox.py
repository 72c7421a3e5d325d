"""The counter-based generator against Random123's known answers, a second implementation and statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from engine.kernels.philox import Stream, normal, random_words, uniform

WORD = st.integers(0, 2**32 - 1)
SAMPLES = torch.arange(20_000)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds on Python's integers, which do not wrap."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


# Lines "philox4x32 10" of Random123's kat_vectors: counter, key, answer.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_the_second_implementation_gives_the_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], answer: tuple[int, int, int, int]
) -> None:
    assert philox4x32(counter, key) == answer


def test_zero_counter_and_key_give_the_known_answer() -> None:
    words = random_words(0, Stream.AUGMENT, 0, torch.tensor([0]), 4)
    assert tuple(words[0].tolist()) == KNOWN_ANSWERS[0][2]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**64 - 1), st.sampled_from(Stream), WORD, st.lists(WORD, min_size=1, max_size=4), st.data())
def test_words_are_philox_of_block_sample_epoch_stream(
    seed: int, stream: Stream, epoch: int, samples: list[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, 13))
    words = random_words(seed, stream, epoch, torch.tensor(samples), count)
    for row, sample in zip(words.tolist(), samples, strict=True):
        key = (seed % 2**32, seed >> 32)
        blocks = [philox4x32((j, sample, epoch, int(stream)), key) for j in range(4)]
        assert row == [word for block in blocks for word in block][:count]


def test_of_a_sample_the_low_32_bits_count() -> None:
    words = random_words(3, Stream.ATTACK_START, 5, torch.tensor([2**32 - 2, -2, 7, 2**63 - 2**32 + 7]), 6)
    assert torch.equal(words[0], words[1])
    assert torch.equal(words[2], words[3])
    assert not torch.equal(words[0], words[2])


def test_a_sample_does_not_depend_on_its_batch() -> None:
    whole = normal(7, Stream.ATTACK_START, 3, SAMPLES, 6)
    chosen = SAMPLES[torch.tensor([19_999, 4, 4, 123])]
    assert torch.equal(normal(7, Stream.ATTACK_START, 3, chosen, 6), whole[chosen])


def test_uniform_numbers_are_uniform_and_exact() -> None:
    u = uniform(1, Stream.ATTACK_START, 0, SAMPLES, 5)
    assert u.dtype == torch.float32
    assert u.min() >= 0
    assert u.max() < 1
    scaled = u.double() * 2**24
    assert torch.equal(scaled, scaled.round())
    for column in u.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-3


def test_all_bits_are_fair() -> None:
    words = random_words(2, Stream.SHUFFLE, 5, SAMPLES, 4)
    ones = torch.stack([(words >> bit & 1).sum() for bit in range(32)])
    deviations = (ones - words.numel() / 2) / (words.numel() / 4) ** 0.5
    assert deviations.abs().max() < 4.5


def test_normal_numbers_are_normal() -> None:
    z = normal(3, Stream.ATTACK_START, 1, SAMPLES, 5)
    assert z.dtype == torch.float32
    assert bool(z.isfinite().all())
    for column in z.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-3


def test_normal_numbers_have_a_finite_tail_at_the_greatest_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    greatest = torch.full((1, 2), 1 - 2.0**-24)
    monkeypatch.setattr("engine.kernels.philox.uniform", lambda *_: greatest)
    radius = normal(0, Stream.ATTACK_START, 0, torch.tensor([0]), 2).norm()
    assert float(radius) == pytest.approx((2 * 24 * 0.6931471805599453) ** 0.5, rel=1e-6)


def test_words_samples_epochs_streams_and_seeds_are_uncorrelated() -> None:
    base = normal(0, Stream.AUGMENT, 0, SAMPLES, 4)
    columns = [
        *base.T,
        base[:, 0].roll(1),
        normal(0, Stream.AUGMENT, 1, SAMPLES, 1)[:, 0],
        normal(0, Stream.SHUFFLE, 0, SAMPLES, 1)[:, 0],
        normal(1, Stream.AUGMENT, 0, SAMPLES, 1)[:, 0],
        normal(2**32, Stream.AUGMENT, 0, SAMPLES, 1)[:, 0],
    ]
    correlation = torch.corrcoef(torch.stack(columns).double()) - torch.eye(len(columns), dtype=torch.float64)
    assert correlation.abs().max() < 4.5 / len(SAMPLES) ** 0.5
