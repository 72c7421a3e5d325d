"""The architectures, by name. Each maps images in [0,1] of shape (B, 3, H, W) to logits of shape (B, C)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from engine.config import nearest
from engine.models.mobilenetv2 import MobileNetV2
from engine.models.normalize import Normalize, constants
from engine.models.preactresnet import PreActResNet
from engine.models.resnet import ResNet
from engine.models.resnet50 import BottleneckResNet
from engine.models.wideresnet import WideResNet


@dataclass(frozen=True)
class Architecture:
    """One entry of the table of architectures.

    builder: from the number of classes to the network. input_sizes: the heights and widths it is meant for.
    """

    summary: str
    builder: Callable[[int], nn.Module]
    input_sizes: tuple[int, ...] = (32, 64)


TABLE: dict[str, Architecture] = {
    "resnet8": Architecture(
        "small CIFAR ResNet (He et al., 2016), for a CPU",
        lambda num_classes: ResNet((16, 32, 64), 1, num_classes),
        input_sizes=(8, 32, 64),
    ),
    "resnet18": Architecture(
        "ResNet-18 with a CIFAR stem (He et al., 2016)",
        lambda num_classes: ResNet((64, 128, 256, 512), 2, num_classes),
    ),
    "preactresnet18": Architecture(
        "pre-activation ResNet-18 with a CIFAR stem (He et al., 2016)",
        lambda num_classes: PreActResNet((64, 128, 256, 512), 2, num_classes),
    ),
    "wrn34-10": Architecture(
        "Wide ResNet, depth 34, width 10 (Zagoruyko & Komodakis, 2016)",
        lambda num_classes: WideResNet(34, 10, num_classes),
    ),
    "mobilenetv2": Architecture("MobileNetV2 with a CIFAR stem (Sandler et al., 2018)", MobileNetV2),
    "resnet50": Architecture(
        "ResNet-50 for ImageNet (He et al., 2016)",
        lambda num_classes: BottleneckResNet((3, 4, 6, 3), num_classes),
        input_sizes=(224,),
    ),
}


def check(name: str) -> None:
    """Raise ValueError where there is no architecture of that name."""
    if name not in TABLE:
        raise ValueError(f"model: {name!r} is not known; {nearest(name, TABLE)}")


def build(name: str, num_classes: int, *, normalize: bool = False, dataset: str | None = None) -> nn.Module:
    """The network of that name in train mode, initialised from torch's global generator, which the caller seeds.

    normalize: subtract the mean and divide by the standard deviation of `dataset` inside the network.
    Raises ValueError for an unknown name or fewer than two classes.
    """
    check(name)
    if num_classes < 2:
        raise ValueError(f"num_classes: a classifier has at least 2 classes, got {num_classes}")
    model = TABLE[name].builder(num_classes)
    if normalize:
        model.normalize = Normalize(*constants(dataset))
    return model
