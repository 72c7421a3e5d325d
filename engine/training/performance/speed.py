"""Speed of a training as a share of the device's peak."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from engine.models.layers import ImageConv2d
from engine.system.precision import Precision
from engine.training.plan import Passes

_SIDE = {"cpu": 1024, "cuda": 8192}


def forward_flops(network: nn.Module, image_CHW: tuple[int, ...]) -> tuple[float, float]:
    """Floating-point operations of a forward pass over one image, and of its first layer.

    A convolution has 2 C_out H_out W_out (C_in / groups) k^2 of them, a linear layer 2 C_out C_in; the rest, some
    hundredths of a residual network, is not counted.
    """
    total = first = 0.0

    def count(module: nn.Module, _: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total, first
        assert isinstance(module, nn.Conv2d | nn.Linear)
        flops = 2.0 * module.weight.numel() * out[0].numel() / module.weight.shape[0]
        total += flops
        first += flops * isinstance(module, ImageConv2d)

    weight = next(network.parameters())
    # A network that looks at its values computes nothing on the meta device.
    for device in ("meta", weight.device):
        total = first = 0.0
        copied = copy.deepcopy(network).to(device).eval()
        for module in copied.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        with torch.no_grad(), suppress(RuntimeError, NotImplementedError):
            copied(torch.zeros(1, *image_CHW, device=device, dtype=weight.dtype))
            break
    return total, first


def peak_flops_per_second(precision: Precision) -> float:
    """Operations a second of a large product of random matrices in the convolutions' format; the best of five.

    Random, since a GPU that multiplies constants draws less power and keeps a higher clock.
    """
    device, side = precision.device, _SIDE[precision.device.type]
    generator = torch.Generator(device).manual_seed(0)
    dtype = precision.amp_dtype or precision.dtype
    left, right = (torch.randn(side, side, device=device, dtype=dtype, generator=generator) for _ in range(2))
    best = float("inf")
    with _products_as_convolutions():
        for _ in range(5):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            left @ right
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
    return 2.0 * side**3 / best


@contextmanager
def _products_as_convolutions() -> Iterator[None]:
    """By default convolutions in float32 may use TF32 and products of matrices may not: here both or neither."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    try:
        yield
    finally:
        products.fp32_precision = before


class Speedometer:
    """Share of the device's peak = images / s * operations per image / peak."""

    def __init__(self, network: nn.Module, image_CHW: tuple[int, ...], precision: Precision) -> None:
        self._forward, self._first = forward_flops(network, image_CHW)
        self._peak = peak_flops_per_second(precision)

    @property
    def forward(self) -> tuple[float, float]:
        """Operations of a forward pass over one image, and of its first layer."""
        return self._forward, self._first

    def share(self, images_per_second: float, passes: Passes) -> float:
        """Share, about in [0, 1]; convolutions and matrix products count."""
        return images_per_second * passes.flops(self._forward, self._first) / self._peak
