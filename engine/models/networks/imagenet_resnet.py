"""ResNet (He et al., 2016, "Deep residual learning for image recognition") for ImageNet-like images."""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.layers import (
    BatchNorm2d,
    Classifier,
    StemNetwork,
    image_conv,
    init_convolutions,
    norm_act,
    stage,
)
from engine.models.networks.resnet import BasicBlock, Bottleneck


class ImageNetResNet(StemNetwork):
    """A ResNet with the ImageNet stem: four stages of so many blocks; H and W shrink by 32.

    Blocks (3, 4, 6, 3) are ResNet-34, of bottlenecks ResNet-50. Names are torchvision's, whose checkpoints fit.
    Convolutions are initialised He-normal by fan-out, std sqrt(2 / (k^2 C_out)), the rest as PyTorch does by
    default.
    """

    def __init__(
        self, num_blocks: tuple[int, int, int, int], num_classes: int, block: type[BasicBlock | Bottleneck]
    ) -> None:
        super().__init__()
        one, two, three, four = (block.expansion * width for width in (64, 128, 256, 512))
        make = functools.partial(block, projection="downsample")
        self.normalize: nn.Module = nn.Identity()
        self.conv1 = image_conv(64, 7, stride=2)
        self.bn1 = BatchNorm2d(64)
        self.layer1 = stage(make, 64, one, num_blocks[0], stride=1)
        self.layer2 = stage(make, one, two, num_blocks[1], stride=2)
        self.layer3 = stage(make, two, three, num_blocks[2], stride=2)
        self.layer4 = stage(make, three, four, num_blocks[3], stride=2)
        self.fc = Classifier(four, num_classes)
        init_convolutions(self)

    def rest(self, x: Tensor) -> Tensor:
        """Logits (B, C) of what the stem gives."""
        x = norm_act(self.bn1, x, inplace=False)
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits_BC: Tensor = self.fc(x.mean((2, 3)))
        return logits_BC
