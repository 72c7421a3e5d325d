"""ResNet-50 (He et al., 2016, "Deep residual learning for image recognition") for ImageNet-like images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.layers import BatchNorm2d, Classifier, conv, image_conv, relu, stage

_EXPANSION = 4


class _Bottleneck(nn.Module):
    """relu(x + bn(1x1(relu(bn(3x3(relu(bn(1x1(x)))))))), with a projection of x where its shape changes.

    The 3x3 convolution has the stride, as in published weights ("v1.5"), not the first 1x1 as in the paper.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        hidden = channels // _EXPANSION
        self.conv1 = conv(in_channels, hidden, 1)
        self.bn1 = BatchNorm2d(hidden)
        self.conv2 = conv(hidden, hidden, 3, stride)
        self.bn2 = BatchNorm2d(hidden)
        self.conv3 = conv(hidden, channels, 1)
        self.bn3 = BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(conv(in_channels, channels, 1, stride), BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        out = relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return relu(out + (x if self.downsample is None else self.downsample(x)))


class BottleneckResNet(nn.Module):
    """A ResNet of bottlenecks with the ImageNet stem: four stages of so many blocks; H and W shrink by 32.

    Blocks (3, 4, 6, 3) are ResNet-50. Names are torchvision's, whose checkpoints fit. Convolutions are initialised
    He-normal by fan-out, std sqrt(2 / (k^2 C_out)), the rest as PyTorch does by default.
    """

    def __init__(self, num_blocks: tuple[int, int, int, int], num_classes: int) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.conv1 = image_conv(64, 7, stride=2)
        self.bn1 = BatchNorm2d(64)
        self.layer1 = stage(_Bottleneck, 64, 256, num_blocks[0], stride=1)
        self.layer2 = stage(_Bottleneck, 256, 512, num_blocks[1], stride=2)
        self.layer3 = stage(_Bottleneck, 512, 1024, num_blocks[2], stride=2)
        self.layer4 = stage(_Bottleneck, 1024, 2048, num_blocks[3], stride=2)
        self.fc = Classifier(2048, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, C) of images in [0,1]."""
        x = relu(self.bn1(self.conv1(self.normalize(x_BCHW))))
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits_BC: Tensor = self.fc(x.mean((2, 3)))
        return logits_BC
