"""Wide ResNet (Zagoruyko & Komodakis, 2016, "Wide residual networks") for small images."""

from __future__ import annotations

from collections import OrderedDict

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
        self.convShortcut = conv(in_channels, channels, 1, stride) if in_channels != channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = relu(self.bn1(x))
        skip: Tensor = x if self.convShortcut is None else self.convShortcut(h)
        out: Tensor = self.conv2(relu(self.bn2(self.conv1(h))))
        return out + skip


def _group(in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    # Published checkpoints put the blocks of a group under the name `layer`.
    return nn.Sequential(OrderedDict(layer=stage(_Block, in_channels, channels, num_blocks, stride)))


class WideResNet(nn.Module):
    """WRN-depth-width without dropout: depth = 6 n + 4, three groups of n blocks, (16, 32, 64) * width channels.

    Initialised as the original: He-normal by fan-out, std sqrt(2 / (k^2 C_out)), for convolutions; a zero bias.
    """

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        num_blocks, remainder = divmod(depth - 4, 6)
        assert remainder == 0, "a Wide ResNet has 6 n + 4 layers"
        self.normalize: nn.Module = nn.Identity()
        self.conv1 = image_conv(16, 3)
        self.block1 = _group(16, 16 * width, num_blocks, stride=1)
        self.block2 = _group(16 * width, 32 * width, num_blocks, stride=2)
        self.block3 = _group(32 * width, 64 * width, num_blocks, stride=2)
        self.bn1 = BatchNorm2d(64 * width)
        self.fc = Classifier(64 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, C) of images in [0,1]."""
        x = self.conv1(self.normalize(x_BCHW))
        x = self.block3(self.block2(self.block1(x)))
        x = relu(self.bn1(x))
        logits_BC: Tensor = self.fc(x.mean((2, 3)))
        return logits_BC
