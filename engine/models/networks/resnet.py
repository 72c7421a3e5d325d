"""ResNet (He et al., 2016, "Deep residual learning for image recognition") for small images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from engine.models.layers import BatchNorm2d, Classifier, StemNetwork, conv, image_conv, norm_act, stage


def _projection(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """A 1x1 convolution and BatchNorm where the shape changes; x as it is elsewhere."""
    if stride == 1 and in_channels == channels:
        return nn.Sequential()
    return nn.Sequential(conv(in_channels, channels, 1, stride), BatchNorm2d(channels))


class BasicBlock(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))), with a projection of x where its shape changes.

    projection: its name in published weights.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, projection: str = "shortcut") -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = BatchNorm2d(channels)
        self.projection = projection
        self.add_module(projection, _projection(in_channels, channels, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = norm_act(self.bn1, self.conv1(x))
        return norm_act(self.bn2, self.conv2(out), self.get_submodule(self.projection)(x))


class Bottleneck(nn.Module):
    """relu(x + bn(1x1(relu(bn(3x3(relu(bn(1x1(x)))))))), with a projection of x where its shape changes.

    The 3x3 convolution has the stride, as in published weights ("v1.5"), not the first 1x1 as in the paper.
    projection: its name in published weights.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, projection: str = "shortcut") -> None:
        super().__init__()
        hidden = channels // self.expansion
        self.conv1 = conv(in_channels, hidden, 1)
        self.bn1 = BatchNorm2d(hidden)
        self.conv2 = conv(hidden, hidden, 3, stride)
        self.bn2 = BatchNorm2d(hidden)
        self.conv3 = conv(hidden, channels, 1)
        self.bn3 = BatchNorm2d(channels)
        self.projection = projection
        self.add_module(projection, _projection(in_channels, channels, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = norm_act(self.bn1, self.conv1(x))
        out = norm_act(self.bn2, self.conv2(out))
        return norm_act(self.bn3, self.conv3(out), self.get_submodule(self.projection)(x))


class ResNet(StemNetwork):
    """A CIFAR ResNet: a 3x3 stem, no max-pool, one stage per width; the later stages halve H and W.

    Widths (64, 128, 256, 512) with two blocks a stage are the ResNet-18 of the CIFAR literature; (16, 32, 64) with
    n blocks are He et al.'s Section 4.2, depth 6 n + 2, here with projections (option B) in its shortcuts.
    Initialised as PyTorch does by default, as most published CIFAR ResNets are.
    stem_stride: 2 halves H and W before the first stage: a quarter of the work, for a CPU.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_blocks: Sequence[int],
        num_classes: int,
        block: type[BasicBlock | Bottleneck] = BasicBlock,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.conv1 = image_conv(widths[0], 3, stem_stride)
        self.bn1 = BatchNorm2d(widths[0])
        channels = [widths[0], *(block.expansion * width for width in widths)]
        self.num_stages = len(widths)
        for index, (sides, count) in enumerate(zip(pairwise(channels), num_blocks, strict=True), start=1):
            self.add_module(f"layer{index}", stage(block, *sides, count, stride=1 if index == 1 else 2))
        self.linear = Classifier(channels[-1], num_classes)

    def rest(self, x: Tensor) -> Tensor:
        """Logits (B, C) of what the stem gives."""
        x = norm_act(self.bn1, x, inplace=False)
        for index in range(1, self.num_stages + 1):
            x = self.get_submodule(f"layer{index}")(x)
        logits_BC: Tensor = self.linear(x.mean((2, 3)))
        return logits_BC
