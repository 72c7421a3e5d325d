"""Pre-activation ResNet (He et al., 2016, "Identity mappings in deep residual networks") for small images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from engine.models.layers import BatchNorm2d, Classifier, StemNetwork, conv, image_conv, norm_act, stage


def _projection(in_channels: int, channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(conv(in_channels, channels, 1, stride))


class PreActBlock(nn.Module):
    """x + conv(relu(bn(conv(h)))) with h = relu(bn(x)); a projection of h replaces x where the shape changes."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn2 = BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.shortcut = _projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = norm_act(self.bn1, x)
        skip: Tensor = x if self.shortcut is None else self.shortcut(h)
        out: Tensor = self.conv2(norm_act(self.bn2, self.conv1(h)))
        return out + skip


class PreActBottleneck(nn.Module):
    """x + 1x1(relu(bn(3x3(relu(bn(1x1(h))))))) with h = relu(bn(x)); a projection of h as in `PreActBlock`."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        hidden = channels // self.expansion
        self.bn1 = BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, hidden, 1)
        self.bn2 = BatchNorm2d(hidden)
        self.conv2 = conv(hidden, hidden, 3, stride)
        self.bn3 = BatchNorm2d(hidden)
        self.conv3 = conv(hidden, channels, 1)
        self.shortcut = _projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = norm_act(self.bn1, x)
        skip: Tensor = x if self.shortcut is None else self.shortcut(h)
        out: Tensor = self.conv2(norm_act(self.bn2, self.conv1(h)))
        out = self.conv3(norm_act(self.bn3, out))
        return out + skip


class PreActResNet(StemNetwork):
    """A pre-activation CIFAR ResNet: a 3x3 stem of stride 1, four stages, a last BatchNorm and ReLU.

    The last BatchNorm, `bn`, is He et al.'s and that of the robust-training literature (Rice et al., 2020; AWP);
    a widespread variant leaves it and its ReLU out: last_norm False.
    Initialised as PyTorch does by default.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_blocks: Sequence[int],
        num_classes: int,
        block: type[PreActBlock | PreActBottleneck] = PreActBlock,
        *,
        last_norm: bool = True,
    ) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.conv1 = image_conv(widths[0], 3)
        channels = [widths[0], *(block.expansion * width for width in widths)]
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            stage(block, *sides, count, stride)
            for sides, count, stride in zip(pairwise(channels), num_blocks, (1, 2, 2, 2), strict=True)
        )
        self.bn = BatchNorm2d(channels[-1]) if last_norm else None
        self.linear = Classifier(channels[-1], num_classes)

    def rest(self, x: Tensor) -> Tensor:
        """Logits (B, C) of what the stem gives."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        if self.bn is not None:
            x = norm_act(self.bn, x)
        logits_BC: Tensor = self.linear(x.mean((2, 3)))
        return logits_BC
