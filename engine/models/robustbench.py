"""Networks of RobustBench's L-inf and L2 leaderboards: their architecture and normalisation, for a file of theirs.

Facts of github.com/RobustBench/robustbench, its model_zoo; none of its code is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from engine.common.lookup import check_known
from engine.models.architecture import Architecture
from engine.models.normalize import CONSTANTS, RGB, Normalize

PREFIX = "robustbench:"
EPSILON = {"cifar10:Linf": "8/255", "cifar10:L2": "0.5", "cifar100:Linf": "8/255", "imagenet:Linf": "4/255"}
"""The leaderboards, DATASET:THREAT, and their radius."""

_NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
_CIFAR100, _IMAGENET = CONSTANTS["cifar100"], CONSTANTS["imagenet"]
_ENGSTROM = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_RONY = ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
_AUGUSTIN = (
    (0.4913997551666284, 0.48215855929893703, 0.4465309133731618),
    (0.24703225141799082, 0.24348516474564, 0.26158783926049628),
)
_LONG_CIFAR100 = (
    (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
    (0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
)
_CHEN_CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_FROM_MINUS_1 = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# leaderboard -> (architecture, normalisation) -> names
_PUBLISHED: dict[str, dict[tuple[str, tuple[RGB, RGB] | None], str]] = {
    "cifar10:Linf": {
        ("resnet18", None): "Sehwag2021Proxy_R18 Addepalli2021Towards_RN18 Addepalli2022Efficient_RN18",
        ("resnet50-cifar", _ENGSTROM): "Engstrom2019Robustness",
        ("wrn28-10", None): (
            "Carmon2019Unlabeled Sehwag2020Hydra Wang2020Improving Wu2020Adversarial_extra Zhang2020Geometry "
            "Sridhar2021Robust Standard"
        ),
        ("wrn28-10", _FROM_MINUS_1): "Hendrycks2019Using",
        ("wrn34-10", None): (
            "Zhang2019Theoretically Huang2020Self Zhang2019You Zhang2020Attacks Wu2020Adversarial Sehwag2021Proxy "
            "Sitawarin2020Improving Cui2020Learnable_34_10 Addepalli2021Towards_WRN34 Chen2021LTD_WRN34_10 "
            "Jia2022LAS-AT_34_10 Addepalli2022Efficient_WRN_34_10 Cui2023Decoupled_WRN-34-10 "
            "Chen2024Data_WRN_34_10"
        ),
        ("wrn34-10", _CIFAR10): "Chen2020Efficient",
        ("wrn34-15", None): "Sridhar2021Robust_34_15",
        ("wrn34-20", None): "Cui2020Learnable_34_20 Chen2021LTD_WRN34_20 Chen2024Data_WRN_34_20",
        ("wrn34-20", _CIFAR10): "Rice2020Overfitting",
        ("wrn70-16", None): "Jia2022LAS-AT_70_16",
        ("wrn28-10-silu", _CIFAR10): (
            "Gowal2020Uncovering_28_10_extra Rebuffi2021Fixing_28_10_cutmix_ddpm Rade2021Helper_ddpm "
            "Gowal2021Improving_28_10_ddpm_100m Pang2022Robustness_WRN28_10 Wang2023Better_WRN-28-10 "
            "Xu2023Exploring_WRN-28-10 Cui2023Decoupled_WRN-28-10"
        ),
        ("wrn34-10-silu", _CIFAR10): "Rade2021Helper_extra",
        ("wrn34-20-silu", _CIFAR10): "Gowal2020Uncovering_34_20",
        ("wrn70-16-silu", _CIFAR10): (
            "Gowal2020Uncovering_70_16 Gowal2020Uncovering_70_16_extra Rebuffi2021Fixing_70_16_cutmix_ddpm "
            "Rebuffi2021Fixing_70_16_cutmix_extra Gowal2021Improving_70_16_ddpm_100m Pang2022Robustness_WRN70_16 "
            "Wang2023Better_WRN-70-16"
        ),
        ("wrn82-8-silu", _CIFAR10): "Bartoldson2024Adversarial_WRN-82-8",
        ("wrn94-16-silu", _CIFAR10): "Bartoldson2024Adversarial_WRN-94-16",
        ("wrn106-16-silu", _CIFAR10): "Rebuffi2021Fixing_106_16_cutmix_ddpm",
    },
    "cifar10:L2": {
        ("resnet18", None): "Sehwag2021Proxy_R18",
        ("resnet50-cifar", _AUGUSTIN): "Augustin2020Adversarial",
        ("resnet50-cifar", _ENGSTROM): "Engstrom2019Robustness",
        ("preactresnet18", _CIFAR10): "Rice2020Overfitting",
        ("wrn28-10", None): "Standard",
        ("wrn28-10", _RONY): "Rony2019Decoupling",
        ("wrn34-10", None): "Wu2020Adversarial Sehwag2021Proxy",
        ("wrn34-10", _AUGUSTIN): "Augustin2020Adversarial_34_10 Augustin2020Adversarial_34_10_extra",
        ("wrn28-10-silu", _CIFAR10): "Rebuffi2021Fixing_28_10_cutmix_ddpm Wang2023Better_WRN-28-10",
        ("wrn70-16-silu", _CIFAR10): (
            "Gowal2020Uncovering Gowal2020Uncovering_extra Rebuffi2021Fixing_70_16_cutmix_ddpm "
            "Rebuffi2021Fixing_70_16_cutmix_extra Wang2023Better_WRN-70-16"
        ),
    },
    "cifar100:Linf": {
        ("resnet18", None): "Addepalli2022Efficient_RN18",
        ("preactresnet18", None): "Addepalli2021Towards_PARN18",
        ("preactresnet18", _LONG_CIFAR100): "Rice2020Overfitting",
        ("wrn28-10", _FROM_MINUS_1): "Hendrycks2019Using",
        ("wrn34-10", None): (
            "Cui2020Learnable_34_10_LBGAT0 Cui2020Learnable_34_10_LBGAT6 Cui2020Learnable_34_10_LBGAT9_eps_8_255 "
            "Sehwag2021Proxy Sitawarin2020Improving Addepalli2021Towards_WRN34 Chen2021LTD_WRN34_10 "
            "Jia2022LAS-AT_34_10 Addepalli2022Efficient_WRN_34_10 Cui2023Decoupled_WRN-34-10 "
            "Cui2023Decoupled_WRN-34-10_autoaug Chen2024Data_WRN_34_10"
        ),
        ("wrn34-10", _CHEN_CIFAR100): "Chen2020Efficient",
        ("wrn34-10", _LONG_CIFAR100): "Wu2020Adversarial",
        ("wrn34-20", None): "Cui2020Learnable_34_20_LBGAT6 Jia2022LAS-AT_34_20",
        ("wrn28-10-silu", _CIFAR100): (
            "Rebuffi2021Fixing_28_10_cutmix_ddpm Pang2022Robustness_WRN28_10 Wang2023Better_WRN-28-10 "
            "Cui2023Decoupled_WRN-28-10"
        ),
        ("wrn70-16-silu", _CIFAR100): (
            "Gowal2020Uncovering Gowal2020Uncovering_extra Rebuffi2021Fixing_70_16_cutmix_ddpm "
            "Pang2022Robustness_WRN70_16 Wang2023Better_WRN-70-16"
        ),
    },
    "imagenet:Linf": {
        ("resnet50", _IMAGENET): "Wong2020Fast Engstrom2019Robustness Salman2020Do_R50 Standard_R50",
        ("resnet18-imagenet", _IMAGENET): "Salman2020Do_R18",
        ("torchvision:wide_resnet50_2", _IMAGENET): "Salman2020Do_50_2",
        ("timm:convnext_base", _IMAGENET): "Liu2023Comprehensive_ConvNeXt-B",
        ("timm:convnext_large", _IMAGENET): "Liu2023Comprehensive_ConvNeXt-L",
        ("timm:swin_base_patch4_window7_224", _IMAGENET): (
            "Liu2023Comprehensive_Swin-B Mo2022When_Swin-B RodriguezMunoz2024Characterizing_Swin-B"
        ),
        ("timm:swin_large_patch4_window7_224", _IMAGENET): (
            "Liu2023Comprehensive_Swin-L RodriguezMunoz2024Characterizing_Swin-L"
        ),
        ("timm:vit_base_patch16_224", _IMAGENET): "Mo2022When_ViT-B",
    },
}
_SILU_PREACT = "a pre-activation ResNet-18 with SiLU"
_XCIT = "XCiT for small images, of robustbench's own registry"
_RAW_SHORTCUT = "a pre-activation ResNet-18 whose shortcuts begin before the normalisation"
_MIXED, _SPARSE = "a mixture of networks", "a network whose features are made sparse"
# leaderboard -> architecture that this package has not -> names
_MISSING: dict[str, dict[str, str]] = {
    "cifar10:Linf": {
        _RAW_SHORTCUT: "Andriushchenko2020Understanding Wong2020Fast",
        _SILU_PREACT: (
            "Rebuffi2021Fixing_R18_ddpm Rade2021Helper_R18_extra Rade2021Helper_R18_ddpm "
            "Gowal2021Improving_R18_ddpm_100m"
        ),
        _XCIT: "Debenedetti2022Light_XCiT-S12 Debenedetti2022Light_XCiT-M12 Debenedetti2022Light_XCiT-L12",
        _MIXED: "Chen2020Adversarial Bai2023Improving_edm Bai2024MixedNUTS",
        _SPARSE: "Amini2024MeanSparse_Ra_WRN_70_16 Amini2024MeanSparse_S-WRN-94-16",
        "a Wide ResNet with normalised features and weights": "Pang2020Boosting",
        "a Wide ResNet-28-4 that standardises each image": "Ding2020MMA",
        "ResNeSt-152": "Sehwag2021Proxy_ResNest152",
        "a Wide ResNet of uneven widths": "Huang2021Exploring Huang2021Exploring_ema",
        "a Wide ResNet with parametric SiLU": "Dai2021Parameterizing",
        "a Wide ResNet before a differential equation": "Kang2021Stable",
        "WRN-A4": "Huang2022Revisiting_WRN-A4",
        "RaWRN-70-16": "Peng2023Robust",
    },
    "cifar10:L2": {
        _SILU_PREACT: "Rebuffi2021Fixing_R18_cutmix_ddpm Rade2021Helper_R18_ddpm",
        _SPARSE: "Amini2024MeanSparse_S-WRN-70-16",
        "a Wide ResNet-28-4 that standardises each image": "Ding2020MMA",
    },
    "cifar100:Linf": {
        _SILU_PREACT: "Rebuffi2021Fixing_R18_ddpm Rade2021Helper_R18_ddpm",
        _XCIT: "Debenedetti2022Light_XCiT-S12 Debenedetti2022Light_XCiT-M12 Debenedetti2022Light_XCiT-L12",
        _MIXED: "Bai2023Improving_edm Bai2023Improving_trades Bai2024MixedNUTS",
        _SPARSE: "Amini2024MeanSparse_S-WRN-70-16",
    },
    "imagenet:Linf": {
        "XCiT of robustbench's own registry": (
            "Debenedetti2022Light_XCiT-S12 Debenedetti2022Light_XCiT-M12 Debenedetti2022Light_XCiT-L12"
        ),
        "a network with a convolutional stem": (
            "Singh2023Revisiting_ViT-S-ConvStem Singh2023Revisiting_ViT-B-ConvStem "
            "Singh2023Revisiting_ConvNeXt-T-ConvStem Singh2023Revisiting_ConvNeXt-S-ConvStem "
            "Singh2023Revisiting_ConvNeXt-B-ConvStem Singh2023Revisiting_ConvNeXt-L-ConvStem"
        ),
        _MIXED: "Bai2024MixedNUTS",
        _SPARSE: "Amini2024MeanSparse_ConvNeXt-L Amini2024MeanSparse_Swin-L",
        "RaWRN-101-2": "Peng2023Robust",
        "Wide ResNet-50-2 without a normalisation": "Chen2024Data_WRN_50_2",
        "a Swin transformer of MIMIR's": "Xu2024MIMIR_Swin-B Xu2024MIMIR_Swin-L",
    },
}


@dataclass(frozen=True)
class Published:
    """An entry of a leaderboard, DATASET:THREAT. missing: what this package has not, in words, if anything."""

    leaderboard: str
    name: str
    architecture: str = ""
    normalization: tuple[RGB, RGB] | None = None
    missing: str = ""

    @property
    def dataset(self) -> str:
        """The data set of its leaderboard."""
        return self.leaderboard.partition(":")[0]

    @property
    def full_name(self) -> str:
        """The name that no other entry has."""
        return f"{PREFIX}{self.leaderboard}:{self.name}"


ENTRIES = tuple(
    Published(leaderboard, name, architecture, normalization)
    for leaderboard, published in _PUBLISHED.items()
    for (architecture, normalization), names in published.items()
    for name in names.split()
) + tuple(
    Published(leaderboard, name, missing=architecture)
    for leaderboard, absent in _MISSING.items()
    for architecture, names in absent.items()
    for name in names.split()
)
"""All that the leaderboards have."""


def find(name: str) -> Published:
    """The entry of a name as NAME, DATASET:NAME or DATASET:THREAT:NAME; of several data sets, of the first one.

    Raises ValueError for an unknown name, an architecture that is not here, and a name of several networks.
    """
    *where, bare = name.split(":")
    check_known("model: robustbench", bare, dict.fromkeys(each.name for each in ENTRIES))
    found = [each for each in ENTRIES if each.name == bare and each.leaderboard.split(":")[: len(where)] == where]
    if not found:
        known = ", ".join(each.full_name for each in ENTRIES if each.name == bare)
        raise ValueError(f"model: {PREFIX}{name} is on no such leaderboard; known: {known}")
    found = [each for each in found if each.dataset == found[0].dataset]
    if len({(each.architecture, each.normalization, each.missing) for each in found}) > 1:
        raise ValueError(
            f"model: {PREFIX}{name} is several networks; say which: {', '.join(each.full_name for each in found)}"
        )
    if found[0].missing:
        raise ValueError(f"model: {PREFIX}{name} is {found[0].missing}, an architecture that is not here")
    return found[0]


def member(get: Callable[[str], Architecture]) -> Callable[[re.Match[str]], Architecture]:
    """The function of `Family.member`. get: gives an architecture by its name here."""

    def architecture(match: re.Match[str]) -> Architecture:
        entry = find(match["name"])
        base = get(entry.architecture)

        def build(num_classes: int) -> nn.Module:
            network = base.builder(num_classes)
            if entry.normalization is not None:
                network.normalize = Normalize(*entry.normalization)
            return network

        summary = f"{entry.architecture}, as {entry.name} of RobustBench's {entry.leaderboard} leaderboard"
        return replace(base, summary=summary, builder=build, normalization=entry.normalization)

    return architecture


def check_classes(name: str, num_classes: int) -> None:
    """Raise ValueError where weights of so many classes are of another data set than a published network's."""
    if not name.startswith(PREFIX):
        return
    entry = find(name.removeprefix(PREFIX))
    if (published := _NUM_CLASSES[entry.dataset]) != num_classes:
        others = [each.full_name for each in ENTRIES if each.name == entry.name and each.dataset != entry.dataset]
        hint = f"; there are {', '.join(others)}" if others else ""
        raise ValueError(
            f"model: {entry.full_name} has the {published} classes of {entry.dataset}, the weights have "
            f"{num_classes}{hint}"
        )
