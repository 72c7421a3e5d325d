"""Student's t distribution: tails and quantiles at any positive degrees of freedom, fractional ones included."""

from __future__ import annotations

import math

_SMALLEST = 1e-300
_ROUNDING = 1e-16


def two_sided_p(t: float, df: float) -> float:
    """P(|T| >= |t|) = I_x(df / 2, 1 / 2), x = df / (df + t^2): the regularised incomplete beta function."""
    if math.isinf(t):
        return 0.0
    return _incomplete_beta(df / (df + t * t), t * t / (df + t * t), df / 2, 0.5)


def quantile(p: float, df: float) -> float:
    """The t >= 0 with P(T <= t) = p, for p in [1/2, 1), by bisection."""
    low, high = 0.0, 1.0
    while two_sided_p(high, df) > 2 * (1 - p):
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if two_sided_p(middle, df) > 2 * (1 - p):
            low = middle
        else:
            high = middle
    return high


def _incomplete_beta(x: float, complement: float, a: float, b: float) -> float:
    """I_x(a, b) by its continued fraction (DLMF 8.17.22), on the side where that converges fast.

    complement: 1 - x, given by itself: near x = 1 the difference would be rounded.
    """
    if x <= 0:
        return 0.0
    if complement <= 0:
        return 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(complement, x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(complement)
    return math.exp(log_front) / a * _fraction(x, a, b)


def _fraction(x: float, a: float, b: float) -> float:
    """1 / (1 + d_1 / (1 + d_2 / (1 + ...))), from the front by Lentz's algorithm."""
    c, d = 1.0, 1 / _not_zero(1 - (a + b) * x / (a + 1))
    value, m = d, 0
    while True:
        m += 1
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 / _not_zero(1 + step * d), _not_zero(1 + step / c)
            value *= c * d
        if abs(c * d - 1) <= _ROUNDING or m >= 10_000:
            return value


def _not_zero(value: float) -> float:
    return value if abs(value) > _SMALLEST else _SMALLEST
