"""`conv3x3` on a CUDA device: torch's convolution serves, and its numbers are those of float64."""

from __future__ import annotations

import pytest

from engine.system.precision import full_precision
from tests.kernels.test_conv3x3 import assert_exact, case, serves


@pytest.mark.parametrize(("shape", "channels"), [((4, 64, 16, 16), 64), ((17, 16, 7, 5), 32)])
def test_it_is_torchs_convolution_there(device: str, shape: tuple[int, ...], channels: int) -> None:
    images, weight, bias, upstream = (tensor.to(device) for tensor in case(shape, channels))
    assert not serves(images, weight)
    with full_precision():
        assert_exact(images, weight, bias, upstream)
