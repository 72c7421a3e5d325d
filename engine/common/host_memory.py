"""The host's memory: how much there is, and what glibc does with freed memory: a tenth of a training step."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

# glibc's names in malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_MAX_INT = 2**31 - 1


def available() -> int:
    """Bytes that new data may take, as Linux estimates them; elsewhere more than there can be."""
    found = _kibibytes(Path("/proc/meminfo"), "MemAvailable:")
    return 1 << 62 if found is None else found


def total() -> int | None:
    """Bytes of memory that the process may have: of the machine, or of its control group; None: not known."""
    limits = [_kibibytes(Path("/proc/meminfo"), "MemTotal:")]
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min((limit for limit in limits if limit is not None), default=None)


def peak() -> int | None:
    """Bytes that the process has had in memory at most; None: not known."""
    return _kibibytes(Path("/proc/self/status"), "VmHWM:")


def _kibibytes(path: Path, name: str) -> int | None:
    """The number of KiB that Linux tells there by that name, in bytes."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return None


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
