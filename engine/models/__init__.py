"""The architectures, by name. Each maps images in [0,1] of shape (B, 3, H, W) to logits of shape (B, C)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.common.errors import printable
from engine.common.lookup import check_registered
from engine.models import libraries, robustbench
from engine.models.architecture import Architecture, Family
from engine.models.layers import head_of as head_of
from engine.models.networks.imagenet_resnet import ImageNetResNet
from engine.models.networks.mobilenetv2 import MobileNetV2
from engine.models.networks.preactresnet import PreActBottleneck, PreActResNet
from engine.models.networks.resnet import BasicBlock, Bottleneck, ResNet
from engine.models.networks.silu_wideresnet import SiLUWideResNet
from engine.models.networks.wideresnet import WideResNet, num_blocks
from engine.models.normalize import Normalize, constants

_CIFAR_WIDTHS = (64, 128, 256, 512)

TABLE: dict[str, Architecture] = {
    "resnet8": Architecture(
        "small CIFAR ResNet (He et al., 2016), for a CPU",
        lambda num_classes: ResNet((16, 32, 64), (1, 1, 1), num_classes),
        input_sizes=(8, 32, 64),
    ),
    "resnet18": Architecture(
        "ResNet-18 with a CIFAR stem (He et al., 2016)",
        lambda num_classes: ResNet(_CIFAR_WIDTHS, (2, 2, 2, 2), num_classes),
    ),
    "resnet34-cifar": Architecture(
        "ResNet-34 with a CIFAR stem",
        lambda num_classes: ResNet(_CIFAR_WIDTHS, (3, 4, 6, 3), num_classes),
    ),
    "resnet50-cifar": Architecture(
        "ResNet-50 with a CIFAR stem",
        lambda num_classes: ResNet(_CIFAR_WIDTHS, (3, 4, 6, 3), num_classes, Bottleneck),
    ),
    "resnet101-cifar": Architecture(
        "ResNet-101 with a CIFAR stem",
        lambda num_classes: ResNet(_CIFAR_WIDTHS, (3, 4, 23, 3), num_classes, Bottleneck),
    ),
    "preactresnet18": Architecture(
        "pre-activation ResNet-18 with a CIFAR stem (He et al., 2016)",
        lambda num_classes: PreActResNet(_CIFAR_WIDTHS, (2, 2, 2, 2), num_classes),
    ),
    "preactresnet18-nobn": Architecture(
        "the same without its last BatchNorm and ReLU, as many checkpoints are",
        lambda num_classes: PreActResNet(_CIFAR_WIDTHS, (2, 2, 2, 2), num_classes, last_norm=False),
    ),
    "preactresnet34": Architecture(
        "pre-activation ResNet-34 with a CIFAR stem",
        lambda num_classes: PreActResNet(_CIFAR_WIDTHS, (3, 4, 6, 3), num_classes),
    ),
    "preactresnet50": Architecture(
        "pre-activation ResNet-50 with a CIFAR stem",
        lambda num_classes: PreActResNet(_CIFAR_WIDTHS, (3, 4, 6, 3), num_classes, PreActBottleneck),
    ),
    "wrn34-10": Architecture(
        "Wide ResNet, depth 34, width 10 (Zagoruyko & Komodakis, 2016)",
        lambda num_classes: WideResNet(34, 10, num_classes),
    ),
    "mobilenetv2": Architecture("MobileNetV2 with a CIFAR stem (Sandler et al., 2018)", MobileNetV2),
    "resnet18-imagenet": Architecture(
        "ResNet-18 for ImageNet (He et al., 2016)",
        lambda num_classes: ImageNetResNet((2, 2, 2, 2), num_classes, BasicBlock),
        input_sizes=(224,),
    ),
    "resnet34-imagenet": Architecture(
        "ResNet-34 for ImageNet",
        lambda num_classes: ImageNetResNet((3, 4, 6, 3), num_classes, BasicBlock),
        input_sizes=(224,),
    ),
    "resnet50": Architecture(
        "ResNet-50 for ImageNet",
        lambda num_classes: ImageNetResNet((3, 4, 6, 3), num_classes, Bottleneck),
        input_sizes=(224,),
    ),
    "resnet101-imagenet": Architecture(
        "ResNet-101 for ImageNet",
        lambda num_classes: ImageNetResNet((3, 4, 23, 3), num_classes, Bottleneck),
        input_sizes=(224,),
    ),
}


def _wide(found: re.Match[str]) -> Architecture:
    depth, width = int(found["depth"]), int(found["width"])
    try:
        num_blocks(depth)
    except ValueError as error:
        raise ValueError(f"model: {found[0]!r}: {error}") from None
    network = SiLUWideResNet if found["silu"] else WideResNet
    return Architecture(
        f"Wide ResNet, depth {depth}, width {width}", lambda num_classes: network(depth, width, num_classes)
    )


def _strided(found: re.Match[str]) -> Architecture:
    width = int(found["width"])
    return Architecture(
        f"ResNet-8 with a stem of stride 2 and {width} channels",
        lambda num_classes: ResNet((width, 2 * width, 4 * width), (1, 1, 1), num_classes, stem_stride=2),
    )


def _told_by(layer: str, suffix: str = "") -> Callable[[Mapping[str, torch.Size]], Iterator[str]]:
    """Finds a Wide ResNet by the first convolution of each of its blocks. layer: a pattern of their names."""

    def names(shapes: Mapping[str, torch.Size]) -> Iterator[str]:
        blocks = [shape for key, shape in shapes.items() if re.search(rf"(^|\.){layer}\.weight$", key)]
        width = blocks[0][0] // 16 if blocks and len(blocks[0]) == 4 else 0
        name = f"wrn{6 * len(blocks) + 4}-{width}{suffix}"
        if find_family(name) is not None:
            yield name

    return names


FAMILIES: dict[str, Family] = {
    "wrnD-W": Family(
        "Wide ResNet of depth D and width W, e.g. wrn28-10 (Zagoruyko & Komodakis, 2016)",
        re.compile(r"wrn(?P<depth>[1-9]\d{0,2})-(?P<width>[1-9]\d{0,2})(?P<silu>)"),
        _wide,
        images="32x32, 64x64",
        told_by=_told_by(r"block1\.layer\.\d+\.conv1"),
    ),
    "wrnD-W-silu": Family(
        "the same with SiLU, e.g. wrn70-16-silu (Gowal et al., 2020; Wang et al., 2023)",
        re.compile(r"wrn(?P<depth>[1-9]\d{0,2})-(?P<width>[1-9]\d{0,2})(?P<silu>-silu)"),
        _wide,
        images="32x32, 64x64",
        told_by=_told_by(r"layer\.0\.block\.\d+\.conv_0", "-silu"),
    ),
    "resnet8-strided-W": Family(
        "ResNet-8 with a stem of stride 2, and W, 2 W and 4 W channels, for a CPU; e.g. resnet8-strided-32",
        re.compile(r"resnet8-strided-(?P<width>[1-9]\d{0,2})"),
        _strided,
        images="32x32, 64x64",
    ),
    "timm:NAME": Family(
        "a classifier of timm, e.g. timm:convnext_tiny; pip install 'iad-engine[timm]'",
        re.compile(r"timm:(?P<name>.+)"),
        libraries.timm,
        images="any, or resized",
    ),
    "torchvision:NAME": Family(
        "a classifier of torchvision, e.g. torchvision:resnext50_32x4d",
        re.compile(r"torchvision:(?P<name>.+)"),
        libraries.torchvision,
        images="any, or resized",
    ),
    "robustbench:NAME": Family(
        "an entry of RobustBench's leaderboards, for its file, e.g. robustbench:Wang2023Better_WRN-28-10",
        re.compile(r"robustbench:(?P<name>.+)"),
        robustbench.member(lambda name: get(name)),
        images="as its architecture",
    ),
}
"""Forms of names without a row each. A name that `TABLE` has is the row's."""


def find_family(name: str) -> Family | None:
    """The family that a name has the form of, if any; no library is asked."""
    return next((family for family in FAMILIES.values() if family.pattern.fullmatch(name)), None)


def get(name: str, imports: Sequence[str] = ()) -> Architecture:
    """The architecture of that name. imports: what was imported where the name comes from, for the error.

    Raises ValueError for an unknown name, and where the library that should have it does not, or is not installed.
    """
    if name in TABLE:
        return TABLE[name]
    for family in FAMILIES.values():
        if found := family.pattern.fullmatch(name):
            return family.member(found)
    check_registered("model", name, (*TABLE, *FAMILIES), imports)
    raise ValueError(f"model: {name!r} is a form, and no name")


def check(name: str) -> None:
    """Raise ValueError where there is no architecture of that name."""
    get(name)


def candidates(shapes: Mapping[str, torch.Size]) -> list[str]:
    """Names of the architectures that tensors of such names and shapes may be of.

    All rows of `TABLE`, and the members of families whose sizes the tensors tell, under whatever prefix.
    """
    told = (name for family in FAMILIES.values() for name in family.told_by(shapes))
    return list(dict.fromkeys((*TABLE, *told)))


def build(name: str, num_classes: int, *, normalize: bool = False, dataset: str | None = None) -> nn.Module:
    """The network of that name in train mode, initialised from torch's global generator, which the caller seeds.

    normalize: subtract the mean and divide by the standard deviation of `dataset` inside the network.
    Raises ValueError for an unknown name, fewer than two classes, and a network that cannot normalise.
    """
    entry = get(name)
    if num_classes < 2:
        raise ValueError(f"num_classes: a classifier has at least 2 classes, got {num_classes}")
    if normalize and entry.normalization is not None:
        raise ValueError(f"normalize: {name} normalises its images already; set it to false")
    model = entry.builder(num_classes)
    if normalize:
        if not _begins_with_normalize(model, min(entry.input_sizes)):
            raise ValueError(
                f"normalize: {name} does not normalise, as its forward applies no module `normalize` to the "
                "images first; let it, beginning with an nn.Identity"
            )
        model.normalize = Normalize(*constants(dataset))
    return model


def is_registered(name: str) -> bool:
    """True for a network of the user's: whatever is neither of this package nor of a library."""
    return bool(TABLE[name].version) if name in TABLE else find_family(name) is None


def build_to_fill(name: str, num_classes: int, *, normalize: bool = False) -> nn.Module:
    """The network for weights that replace its own at once; torch's global generator is left alone.

    On the meta device, without memory or random numbers; on the CPU where it holds tensors that its state dict has
    not, and a registered one always, since it may hold them anywhere. Raises ValueError as `build` does, but not
    for `normalize` of a network that normalises anyway.
    """
    entry = get(name)
    normalize = normalize and entry.normalization is None
    with torch.random.fork_rng(devices=[]):
        if not is_registered(name):
            # What a library does while it builds may need numbers.
            with contextlib.suppress(RuntimeError), torch.device("meta"):
                network = build(name, num_classes, normalize=normalize)
                if not _holds_more(network):
                    return network
        return build(name, num_classes, normalize=normalize)


def _holds_more(network: nn.Module) -> bool:
    """True if modules have tensors that are not in the state dict."""
    return any(
        module._non_persistent_buffers_set or any(isinstance(value, Tensor) for value in vars(module).values())
        for module in network.modules()
    )


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
