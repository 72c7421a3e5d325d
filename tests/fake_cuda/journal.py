"""Calls that reach the pretended driver, read in the process that sees it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# The call's name under "call", and what the mock notes of it: {"call": "kernel", "stream": "0", "name": ...}.
Call = dict[str, str]


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """A list that holds, once the block is left, the calls made within it."""
    driver = ctypes.CDLL("libcuda.so.1")
    driver.fake_cuda_journal.restype = ctypes.c_char_p
    driver.fake_cuda_clear()
    calls: list[Call] = []
    yield calls
    calls += [_parse(line) for line in driver.fake_cuda_journal().decode().splitlines()]


def of(kind: str, calls: list[Call]) -> list[Call]:
    return [call for call in calls if call["call"] == kind]


def _parse(line: str) -> Call:
    pairs, _, name = line.partition(" name=")
    kind, *fields = pairs.split()
    call = dict(field.split("=", 1) for field in fields)
    return {"call": kind, **call, **({"name": name} if name else {})}
