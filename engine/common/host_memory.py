"""What the C library does with memory that was freed. It decides a tenth of a training step on a CPU."""

from __future__ import annotations

import ctypes

# glibc's names in malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_MAX_INT = 2**31 - 1


def keep_freed() -> bool:
    """Keep freed memory for the next tensor, for the whole process; whether the C library is glibc, which can.

    As it is, glibc maps each large array anew and the kernel fills its pages with zeros, in every pass.
    The peak of a training stays about the same: every step needs what the step before has freed.
    """
    return _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: _MAX_INT})


def give_back_freed() -> bool:
    """What glibc does in a process that has freed arrays of 32 MiB: larger ones are mapped and unmapped."""
    return _set({_MMAP_MAX: 65536, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}, trim=True)


def _set(options: dict[int, int], *, trim: bool = False) -> bool:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    accepted = [libc.mallopt(option, value) for option, value in options.items()]
    if trim:
        libc.malloc_trim(0)
    return all(accepted)
