"""Arithmetic on whole numbers."""

from __future__ import annotations


def ceil_div(numerator: int, denominator: int) -> int:
    """ceil(numerator / denominator), exact: the number of parts of at most `denominator` that hold `numerator`."""
    return -(-numerator // denominator)


def check_whole(argument: str, value: object, *, least: int) -> None:
    """Raise ValueError for what is no whole number in [least, 2^63)."""
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError(f"{argument}: a whole number from {least} on is needed, got {value!r}")
