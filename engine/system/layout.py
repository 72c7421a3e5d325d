"""Channels-last end to end: the check of it that ENGINE_DEBUG=1 switches on."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def is_debug() -> bool:
    """True where ENGINE_DEBUG asks for checks that cost time."""
    return os.environ.get("ENGINE_DEBUG", "") not in ("", "0")


def check_channels_last(network: nn.Module) -> None:
    """Hook a network: its passes raise AssertionError at a convolution or BatchNorm with another layout."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | _BatchNorm):
            module.register_forward_hook(_Check(name))


class _Check:
    """Forward hook that checks input and output of a module, and the gradient of a convolution."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        self._look("input", inputs[0])
        self._look("output", out)
        # That of the last BatchNorm comes from a mean over pixels, in NCHW, and the op turns it.
        if out.requires_grad and isinstance(module, nn.Conv2d):
            out.register_hook(lambda gradient: self._look("gradient", gradient))

    def _look(self, what: str, tensor: Tensor) -> None:
        assert tensor.is_contiguous(memory_format=torch.channels_last), (
            f"{self._name}: its {what} of shape {tuple(tensor.shape)} is not channels-last: {tensor.stride()}"
        )
