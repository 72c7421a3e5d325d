"""The host's memory: how much is available, and what glibc does with freed memory: a tenth of a training step."""

from __future__ import annotations

import ctypes
from pathlib import Path

# glibc's names in malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_MAX_INT = 2**31 - 1


def available() -> int:
    """Bytes that new data may take, as Linux estimates them; elsewhere more than there can be."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 1 << 62


def keep_freed_memory() -> bool:
    """Keep freed memory of the process for its next tensors. Returns False where the C library is not glibc.

    By default glibc maps each large array anew, and the kernel fills its pages with zeros, in every pass.
    The peak of a training stays about the same: every step needs what the step before has freed.
    """
    return _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: _MAX_INT})


def return_freed_memory() -> bool:
    """Undo `keep_freed_memory`: glibc as it is after arrays of 32 MiB were freed, mapping larger ones anew."""
    return _set({_MMAP_MAX: 65536, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}, trim=True)


def _set(options: dict[int, int], *, trim: bool = False) -> bool:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    accepted = [libc.mallopt(option, value) for option, value in options.items()]
    if trim:
        libc.malloc_trim(0)
    return all(accepted)
