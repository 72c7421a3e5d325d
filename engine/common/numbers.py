"""Whole numbers, and numbers in words: durations, sizes, shares."""

from __future__ import annotations


def ceil_div(numerator: int, denominator: int) -> int:
    """ceil(numerator / denominator), exact: the number of parts of at most `denominator` that hold `numerator`."""
    return -(-numerator // denominator)


def check_whole(argument: str, value: object, *, least: int) -> None:
    """Raise ValueError for what is no whole number in [least, 2^63)."""
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError(f"{argument}: a whole number from {least} on is needed, got {value!r}")


def duration(seconds: float) -> str:
    """Seconds, at least 0, in the two largest units that matter: 45 s, 3 min 20 s, 12 min, 2 h 10 min, 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return _two(whole, 60, "min", "s")
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return _two(minutes, 60, "h", "min")
    return _two(round(seconds / 3600), 24, "d", "h")


def _two(count: int, of_larger: int, larger: str, smaller: str) -> str:
    many, few = divmod(count, of_larger)
    return f"{many:,} {larger} {few} {smaller}" if few else f"{many:,} {larger}"


def gibibytes(size: int) -> str:
    """Bytes in GiB, with one decimal."""
    return f"{size / 2**30:,.1f} GiB"


def percent(share: float) -> str:
    """A share in [0, 1] in percent, with two decimals as the literature's tables have them."""
    return f"{share:.2%}"
