"""The ops as Triton kernels, for CUDA and ROCm devices."""

from __future__ import annotations

import ctypes

# Options of a launch whose kernel asserts something: without the checks for overflow that come along.
CHECKED = {"debug": True, "sanitize_overflow": False}


def two_floats(number: float) -> tuple[float, float]:
    """A float64 as the sum of two float32 (high, low): fma(x, high, x * low) is x * number rounded about once."""
    high = ctypes.c_float(number).value
    return high, number - high
