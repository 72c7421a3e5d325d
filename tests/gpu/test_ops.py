"""The ops as parts of torch on a CUDA device: `tests/kernels/test_ops.py` with the fixtures of this folder."""

from __future__ import annotations

from tests.kernels.test_ops import *  # noqa: F403
