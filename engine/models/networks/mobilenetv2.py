"""MobileNetV2 (Sandler et al., 2018, "Inverted residuals and linear bottlenecks") for small images."""

from __future__ import annotations

from torch import Tensor, nn

from engine.models.layers import BatchNorm2d, Classifier, StemNetwork, conv, image_conv, norm_act

# Expansion, channels, blocks and first stride, as in the paper's Table 2 but for the second row's stride,
# which is 1 here: the stem and this row keep the resolution of a 32x32 image.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class _Block(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 reduction; x, or its projection, is added at stride 1."""

    def __init__(self, in_channels: int, channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.stride = stride
        self.conv1 = conv(in_channels, hidden, 1)
        self.bn1 = BatchNorm2d(hidden)
        self.conv2 = conv(hidden, hidden, 3, stride, groups=hidden)
        self.bn2 = BatchNorm2d(hidden)
        self.conv3 = conv(hidden, channels, 1)
        self.bn3 = BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride == 1 and in_channels != channels:
            self.shortcut = nn.Sequential(conv(in_channels, channels, 1), BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        h = norm_act(self.bn1, self.conv1(x))
        h = norm_act(self.bn2, self.conv2(h))
        skip = self.shortcut(x) if self.stride == 1 else None
        return norm_act(self.bn3, self.conv3(h), skip, relu=False)


class MobileNetV2(StemNetwork):
    """The CIFAR variant: a stem of stride 1, three halvings of H and W in all, ReLU, projections in the shortcuts.

    Initialised as PyTorch does by default.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.conv1 = image_conv(32, 3)
        self.bn1 = BatchNorm2d(32)
        blocks: list[nn.Module] = []
        in_channels = 32
        for expansion, channels, num_blocks, first_stride in STAGES:
            for index in range(num_blocks):
                stride = first_stride if index == 0 else 1
                blocks.append(_Block(in_channels, channels, expansion, stride))
                in_channels = channels
        self.layers = nn.Sequential(*blocks)
        self.conv2 = conv(in_channels, 1280, 1)
        self.bn2 = BatchNorm2d(1280)
        self.linear = Classifier(1280, num_classes)

    def rest(self, x: Tensor) -> Tensor:
        """Logits (B, C) of what the stem gives."""
        x = norm_act(self.bn1, x, inplace=False)
        x = norm_act(self.bn2, self.conv2(self.layers(x)))
        logits_BC: Tensor = self.linear(x.mean((2, 3)))
        return logits_BC
