"""Pre-activation ResNet (He et al., 2016, "Identity mappings in deep residual networks") for small images."""

from __future__ import annotations

from torch import Tensor, nn

from engine.models.layers import BatchNorm2d, Classifier, conv, image_conv, relu, stage


class _Block(nn.Module):
    """x + conv(relu(bn(conv(h)))) with h = relu(bn(x)); a projection of h replaces x where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn2 = BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(conv(in_channels, channels, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        h = relu(self.bn1(x))
        skip: Tensor = x if self.shortcut is None else self.shortcut(h)
        out: Tensor = self.conv2(relu(self.bn2(self.conv1(h))))
        return out + skip


class PreActResNet(nn.Module):
    """A pre-activation CIFAR ResNet: a 3x3 stem of stride 1, four stages, a last BatchNorm and ReLU.

    The last BatchNorm, `bn`, is He et al.'s and that of the robust-training literature (Rice et al., 2020; AWP);
    a widespread variant leaves it and its ReLU out: last_norm False.
    Initialised as PyTorch does by default.
    """

    def __init__(
        self, widths: tuple[int, int, int, int], num_blocks: int, num_classes: int, *, last_norm: bool = True
    ) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.conv1 = image_conv(widths[0], 3)
        self.layer1 = stage(_Block, widths[0], widths[0], num_blocks, stride=1)
        self.layer2 = stage(_Block, widths[0], widths[1], num_blocks, stride=2)
        self.layer3 = stage(_Block, widths[1], widths[2], num_blocks, stride=2)
        self.layer4 = stage(_Block, widths[2], widths[3], num_blocks, stride=2)
        self.bn = BatchNorm2d(widths[3]) if last_norm else None
        self.linear = Classifier(widths[3], num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, C) of images in [0,1]."""
        x = self.conv1(self.normalize(x_BCHW))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        if self.bn is not None:
            x = relu(self.bn(x))
        logits_BC: Tensor = self.linear(x.mean((2, 3)))
        return logits_BC
