"""The architectures, by name. Each maps images in [0,1] of shape (B, 3, H, W) to logits of shape (B, C)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.common.lookup import nearest
from engine.models.networks.mobilenetv2 import MobileNetV2
from engine.models.networks.preactresnet import PreActResNet
from engine.models.networks.resnet import ResNet
from engine.models.networks.resnet50 import BottleneckResNet
from engine.models.networks.wideresnet import WideResNet
from engine.models.normalize import Normalize, constants


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
    "preactresnet18-nobn": Architecture(
        "the same without its last BatchNorm and ReLU, as many checkpoints are",
        lambda num_classes: PreActResNet((64, 128, 256, 512), 2, num_classes, last_norm=False),
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
    Raises ValueError for an unknown name, fewer than two classes, and a network that cannot normalise.
    """
    check(name)
    if num_classes < 2:
        raise ValueError(f"num_classes: a classifier has at least 2 classes, got {num_classes}")
    model = TABLE[name].builder(num_classes)
    if normalize:
        if not _begins_with_normalize(model, min(TABLE[name].input_sizes)):
            raise ValueError(
                f"normalize: {name} does not normalise, as its forward applies no module `normalize` to the "
                "images first; let it, beginning with an nn.Identity"
            )
        model.normalize = Normalize(*constants(dataset))
    return model


class _Reached(Exception):
    """Ends a forward whose rest is of no interest."""


def _begins_with_normalize(model: nn.Module, size: int) -> bool:
    """True if the network gives the images themselves to its attribute `normalize`; then nothing else runs."""
    placeholder = getattr(model, "normalize", None)
    if not isinstance(placeholder, nn.Module):
        return False
    images = torch.zeros(1, 3, size, size, device=next((p.device for p in model.parameters()), None))
    given_images: list[bool] = []

    def reached(module: nn.Module, given: tuple[Any, ...]) -> None:
        given_images.append(given[0] is images)
        raise _Reached

    handle = placeholder.register_forward_pre_hook(reached)
    with contextlib.suppress(
        Exception
    ):  # a network that does something else before may not be made for these images
        model(images)
    handle.remove()
    return given_images == [True]
