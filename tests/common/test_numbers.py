"""Division that rounds up."""

from __future__ import annotations

import math
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from engine.common.numbers import ceil_div


@given(st.integers(-(10**18), 10**18), st.integers(1, 10**9))
def test_division_rounds_up(numerator: int, denominator: int) -> None:
    assert ceil_div(numerator, denominator) == math.ceil(Fraction(numerator, denominator))
