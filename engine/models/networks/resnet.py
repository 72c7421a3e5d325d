"""ResNet (He et al., 2016, "Deep residual learning for image recognition") for small images."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from engine.models.layers import BatchNorm2d, Classifier, conv, image_conv, relu, stage


class _Block(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))), with a projection of x where its shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(conv(in_channels, channels, 1, stride), BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A CIFAR ResNet: a 3x3 stem of stride 1, no max-pool, one stage per width; the later stages halve H and W.

    Widths (64, 128, 256, 512) with two blocks a stage are the ResNet-18 of the CIFAR literature; (16, 32, 64) with
    n blocks are He et al.'s Section 4.2, depth 6 n + 2, here with projections (option B) in its shortcuts.
    Initialised as PyTorch does by default, as most published CIFAR ResNets are.
    """

    def __init__(self, widths: tuple[int, ...], num_blocks: int, num_classes: int) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.conv1 = image_conv(widths[0], 3)
        self.bn1 = BatchNorm2d(widths[0])
        self.layer1 = stage(_Block, widths[0], widths[0], num_blocks, stride=1)
        self.num_stages = len(widths)
        for index, (in_channels, channels) in enumerate(pairwise(widths), start=2):
            self.add_module(f"layer{index}", stage(_Block, in_channels, channels, num_blocks, stride=2))
        self.linear = Classifier(widths[-1], num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, C) of images in [0,1]."""
        x = self.conv1(self.normalize(x_BCHW))
        x = relu(self.bn1(x))
        for index in range(1, self.num_stages + 1):
            x = self.get_submodule(f"layer{index}")(x)
        logits_BC: Tensor = self.linear(x.mean((2, 3)))
        return logits_BC
