"""Wide ResNet with SiLU (Gowal et al., 2020, "Uncovering the limits of adversarial training") for small images.

Of Wang et al. (2023, DM-Improves-AT) and Bartoldson et al. (2024), too. It differs from `WideResNet` in more than
the activation: a convolution of stride 2 pads the right and the lower edge alone, as TensorFlow's "SAME" does.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.layers import BatchNorm2d, Classifier, StemNetwork, conv, image_conv, init_convolutions, stage
from engine.models.networks.wideresnet import num_blocks

MOMENTUM = 0.01
"""Of BatchNorm's running statistics, as published: a decay of 0.99."""


def _norm(channels: int) -> BatchNorm2d:
    return BatchNorm2d(channels, momentum=MOMENTUM)


class _Block(nn.Module):
    """x + conv(silu(bn(conv(h)))) with h = silu(bn(x)); a projection of h replaces x where channels change."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.batchnorm_0 = _norm(in_channels)
        self.conv_0 = conv(in_channels, channels, 3, stride)
        if stride == 2:
            self.conv_0.padding = (0, 0)
        self.batchnorm_1 = _norm(channels)
        self.conv_1 = conv(channels, channels, 3)
        self.shortcut = conv(in_channels, channels, 1, stride) if in_channels != channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.batchnorm_0(x))
        skip: Tensor = x if self.shortcut is None else self.shortcut(h)
        if self.conv_0.padding == (0, 0):
            h = F.pad(h, (0, 1, 0, 1))
        out: Tensor = self.conv_1(F.silu(self.batchnorm_1(self.conv_0(h))))
        return out + skip


def _group(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    # Published checkpoints put the blocks of a group under the name `block`.
    return nn.Sequential(OrderedDict(block=stage(_Block, in_channels, channels, blocks, stride)))


class SiLUWideResNet(StemNetwork):
    """WRN-depth-width of the DeepMind works: depth = 6 n + 4, three groups of n blocks.

    Names are those of published checkpoints. Initialised as `WideResNet`.
    """

    first = "init_conv"

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        blocks = num_blocks(depth)
        self.normalize: nn.Module = nn.Identity()
        self.init_conv = image_conv(16, 3)
        self.layer = nn.Sequential(
            _group(16, 16 * width, blocks, stride=1),
            _group(16 * width, 32 * width, blocks, stride=2),
            _group(32 * width, 64 * width, blocks, stride=2),
        )
        self.batchnorm = _norm(64 * width)
        self.logits = Classifier(64 * width, num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.logits.bias)

    def rest(self, x: Tensor) -> Tensor:
        """Logits (B, C) of what the stem gives."""
        x = self.layer(x)
        x = F.silu(self.batchnorm(x))
        logits_BC: Tensor = self.logits(x.mean((2, 3)))
        return logits_BC
