"""Division that rounds up, and numbers in words."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.common.numbers import ceil_div, duration, gibibytes, percent


@given(st.integers(-(10**18), 10**18), st.integers(1, 10**9))
def test_division_rounds_up(numerator: int, denominator: int) -> None:
    assert ceil_div(numerator, denominator) == math.ceil(Fraction(numerator, denominator))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"), (0.4, "0 s"), (45.2, "45 s"), (59.6, "1 min"), (60, "1 min"), (200, "3 min 20 s"),
        (599.4, "9 min 59 s"), (599.6, "10 min"), (754, "13 min"), (3599, "1 h"), (7800, "2 h 10 min"),
        (86_399, "1 d"), (86_400 * 3 + 4 * 3600, "3 d 4 h"), (86_400 * 1200, "1,200 d"),
    ],
)  # fmt: skip
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@given(st.floats(0, 1e9))
def test_a_duration_in_words_is_within_a_part_in_sixty(seconds: float) -> None:
    units = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
    words = duration(seconds).replace(",", "").split()
    told = sum(int(count) * units[unit] for count, unit in zip(words[::2], words[1::2], strict=True))
    assert abs(told - seconds) <= max(0.5, seconds / 19)  # of ten minutes on whole minutes, of a day on hours


def test_sizes_and_shares_have_as_many_digits_everywhere() -> None:
    assert (gibibytes(24 * 2**30), gibibytes(2**40), gibibytes(10)) == ("24.0 GiB", "1,024.0 GiB", "0.0 GiB")
    assert (percent(0.8413), percent(1), percent(0.00004)) == ("84.13%", "100.00%", "0.00%")
