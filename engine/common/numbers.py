"""Arithmetic on whole numbers."""

from __future__ import annotations


def ceil_div(numerator: int, denominator: int) -> int:
    """ceil(numerator / denominator), exact: the number of parts of at most `denominator` that hold `numerator`."""
    return -(-numerator // denominator)
