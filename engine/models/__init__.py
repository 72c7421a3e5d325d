"""The architectures, by name. Each maps images in [0,1] of shape (B, 3, H, W) to logits of shape (B, C)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.common.errors import printable
from engine.common.lookup import check_registered
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
    version: of a network that was registered, differs where its code may; "" of those in this package.
    """

    summary: str
    builder: Callable[[int], nn.Module]
    input_sizes: tuple[int, ...] = (32, 64)
    version: str = ""


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
    check_registered("model", name, TABLE)


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


def is_registered(name: str) -> bool:
    """True for a network of the user's: whatever is not of this package."""
    return name not in TABLE or bool(TABLE[name].version)


def build_to_fill(name: str, num_classes: int, *, normalize: bool = False) -> nn.Module:
    """The network for weights that replace its own at once; torch's global generator is left alone.

    On the meta device, without memory or random numbers; a registered one on the CPU, since it may hold values
    that are neither parameters nor buffers of its state dict. Raises ValueError as `build` does.
    """
    check(name)
    if is_registered(name):
        with torch.random.fork_rng(devices=[]):
            return build(name, num_classes, normalize=normalize)
    with torch.device("meta"):
        return build(name, num_classes, normalize=normalize)


def check_logits(name: str, network: nn.Module, images_BCHW: Tensor, num_classes: int) -> None:
    """Raise ValueError, one line, where a network gives no logits (B, C) of such images."""
    was_training = network.training
    try:
        with torch.no_grad():
            logits = network.eval()(images_BCHW)
    except Exception as error:
        raise ValueError(
            f"model: {name} fails on images {tuple(images_BCHW.shape)} in channels_last: {printable(error):.300}"
        ) from error
    finally:
        network.train(was_training)
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if got != (len(images_BCHW), num_classes):
        raise ValueError(f"model: {name} must give logits ({len(images_BCHW)}, {num_classes}), and gives {got}")


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
