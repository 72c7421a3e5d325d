"""What the architectures share."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

Block = Callable[[int, int, int], nn.Module]
"""Makes a residual block from (in_channels, channels, stride)."""


def conv(in_channels: int, channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Convolution that keeps H and W at stride 1, without the bias that a BatchNorm would cancel or repeat."""
    padding = kernel_size // 2
    return nn.Conv2d(in_channels, channels, kernel_size, stride, padding, groups=groups, bias=False)


def stage(block: Block, in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    """Residual blocks in a row, of which the first changes channels and resolution."""
    rest = (block(channels, channels, 1) for _ in range(num_blocks - 1))
    return nn.Sequential(block(in_channels, channels, stride), *rest)
