"""Wide ResNet (Zagoruyko & Komodakis, 2016, "Wide residual networks") for small images."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from engine.models.layers import (
    BatchNorm2d,
    Classifier,
    StemNetwork,
    conv,
    image_conv,
    init_convolutions,
    norm_act,
    stage,
)


class _Block(nn.Module):
    """x + conv(relu(bn(conv(h)))) with h = relu(bn(x)); a projection of h replaces x where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn2 = BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.convShortcut = conv(in_channels, channels, 1, stride) if in_channels != channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = norm_act(self.bn1, x)
        skip: Tensor = x if self.convShortcut is None else self.convShortcut(h)
        out: Tensor = self.conv2(norm_act(self.bn2, self.conv1(h)))
        return out + skip


def num_blocks(depth: int) -> int:
    """Blocks n of each of the three groups. Raises ValueError unless depth = 6 n + 4."""
    blocks, remainder = divmod(depth - 4, 6)
    if blocks < 1 or remainder:
        near = [6 * n + 4 for n in (blocks, blocks + 1) if n > 0]
        raise ValueError(f"a Wide ResNet has 6 n + 4 layers, such as {' or '.join(map(str, near))}, got {depth}")
    return blocks


def _group(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    # Published checkpoints put the blocks of a group under the name `layer`.
    return nn.Sequential(OrderedDict(layer=stage(_Block, in_channels, channels, blocks, stride)))


class WideResNet(StemNetwork):
    """WRN-depth-width without dropout: depth = 6 n + 4, three groups of n blocks, (16, 32, 64) * width channels.

    Initialised as the original: He-normal by fan-out, std sqrt(2 / (k^2 C_out)), for convolutions; a zero bias.
    """

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        blocks = num_blocks(depth)
        self.normalize: nn.Module = nn.Identity()
        self.conv1 = image_conv(16, 3)
        self.block1 = _group(16, 16 * width, blocks, stride=1)
        self.block2 = _group(16 * width, 32 * width, blocks, stride=2)
        self.block3 = _group(32 * width, 64 * width, blocks, stride=2)
        self.bn1 = BatchNorm2d(64 * width)
        self.fc = Classifier(64 * width, num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def rest(self, x: Tensor) -> Tensor:
        """Logits (B, C) of what the stem gives."""
        x = self.block3(self.block2(self.block1(x)))
        x = norm_act(self.bn1, x)
        logits_BC: Tensor = self.fc(x.mean((2, 3)))
        return logits_BC
