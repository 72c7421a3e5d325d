"""An architecture, and a family of architectures whose names tell their sizes or the library that has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.models.normalize import RGB


@dataclass(frozen=True)
class Architecture:
    """A network by name.

    builder: from the number of classes to the network. input_sizes: the heights and widths it is meant for.
    version: of a network whose code is not in this package, differs where that may; "" of those in this package.
    normalization: mean and standard deviation by which the network always normalises its images, if it does.
    renamed: of the network and the tensors of a file of its library, the same under the names of today's version.
    """

    summary: str
    builder: Callable[[int], nn.Module]
    input_sizes: tuple[int, ...] = (32, 64)
    version: str = ""
    normalization: tuple[RGB, RGB] | None = None
    renamed: Callable[[nn.Module, dict[str, Tensor]], Mapping[str, Tensor]] | None = None


@dataclass(frozen=True)
class Family:
    """Architectures without a row each.

    pattern: of their names. member: the architecture of a name that matches; raises ValueError where there is
    none. images: their sizes, in words. told_by: names of the members that may have tensors of such shapes.
    """

    summary: str
    pattern: re.Pattern[str]
    member: Callable[[re.Match[str]], Architecture]
    images: str
    told_by: Callable[[Mapping[str, torch.Size]], Iterable[str]] = lambda shapes: ()
