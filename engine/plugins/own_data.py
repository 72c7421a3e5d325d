"""Data sets of users in the form of the engine's own: uint8 images in memory, hashed by their content."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from engine.common.errors import printable
from engine.evaluation.dataset_items import DatasetItems
from engine.pipelines.datasets import FoundSplits
from engine.pipelines.splits import SPLIT_NAMES, Request, Split
from engine.plugins.guests import named

_GREY_LEVEL = 1 / 255
_TOLERANCE = 1e-3  # of a grey level: float32's rounding of k / 255 is a hundredth of it


def finder(
    name: str, loader: Callable[..., Any], class_names: Sequence[str] | None, source: str
) -> Callable[[str | None, Request], FoundSplits]:
    """The function of `Entry.find` for a loader. class_names: None: those that the training images tell."""
    load = named(f"dataset {name!r}", loader)
    takes_place = _has_parameter(loader)

    def find(data: str | None, request: Request) -> FoundSplits:
        if data is not None and not takes_place:
            raise ValueError(f"data: the dataset {name} is read from no path, got {data!r}")
        found = load(data) if takes_place else load()
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise ValueError(
                f"dataset {name!r}: its loader gives {type(found).__name__}, and no pair (train, test)"
            )
        train, test = splits(f"dataset {name!r}", found[0], found[1], class_names)
        place = source if data is None else f"{source}, {data}"
        return FoundSplits(request.of("train", train), request.of("test", test), place)

    return find


def splits(what: str, train: Any, test: Any, class_names: Sequence[str] | None = None) -> tuple[Split, Split]:
    """Both parts of a data set, in memory. Raises ValueError, one line, where they do not make one."""
    images = [as_images(f"{what}: {part}", given) for part, given in zip(SPLIT_NAMES, (train, test), strict=True)]
    largest = max(int(labels_N.max()) for _, labels_N in images)
    names = tuple(map(str, class_names or getattr(train, "classes", None) or range(largest + 1)))
    if largest >= len(names):
        raise ValueError(f"{what}: there is a label {largest}, and there are {len(names)} class names")
    if len(names) < 2 or len(set(names)) != len(names):
        raise ValueError(
            f"{what}: at least two classes of different names are expected, got {printable(names):.200}"
        )
    shapes = [images_N.shape[1:3] for images_N, _ in images]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{what}: train and test images are of two sizes, {tuple(shapes[0])} and {tuple(shapes[1])}"
        )
    first, second = (Split(images_N, labels_N, names) for images_N, labels_N in images)
    return first, second


def as_images(what: str, given: Any) -> tuple[Tensor, Tensor]:
    """Images, uint8 (N, H, W, 3), and labels, int64 (N,), of a torch Dataset or a pair of tensors.

    Tensors of images are uint8 of one or three channels, channels first or last, or float (N, C, H, W) in [0, 1]
    of whole grey levels, k / 255. Raises ValueError, one line that begins with `what`, for anything else.
    """
    try:
        if _is_pair(given):
            images_N, labels_N = given
        else:
            items = DatasetItems(given)
            images_N, labels_N = items[torch.arange(len(items.labels))], items.labels
            again_N = items[few_N := torch.arange(min(8, len(items.labels)))]
            if not torch.equal(again_N, images_N[few_N]):
                raise ValueError("an item is another one each time; leave random changes to `augment`")
        labels_N = _labels(labels_N, len(images_N))
        return _channels_last(_in_grey_levels(images_N)), labels_N
    except ValueError as error:
        raise ValueError(f"{what}: {str(error).removeprefix('data: ')}") from None


def _is_pair(given: Any) -> TypeGuard[tuple[Tensor, Tensor]]:
    return isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(part, Tensor) for part in given)


def _labels(labels_N: Tensor, count: int) -> Tensor:
    if labels_N.shape != (count,) or labels_N.is_floating_point() or labels_N.is_complex():
        raise ValueError(
            f"{count} whole numbers are expected as labels, got {labels_N.dtype} {tuple(labels_N.shape)}"
        )
    if not count or int(labels_N.min()) < 0:
        raise ValueError("labels from 0 on are expected, got " + (str(int(labels_N.min())) if count else "none"))
    return labels_N.detach().cpu().to(torch.int64).clone()


def _in_grey_levels(images_N: Tensor) -> Tensor:
    """uint8 images. Raises ValueError for floats that are none of 256 grey levels: rounding would change them."""
    images_N = images_N.detach().cpu()
    if images_N.dtype == torch.uint8:
        return images_N
    if not images_N.is_floating_point():
        raise ValueError(f"images are uint8, or floats in [0, 1], got {images_N.dtype}")
    levels_N = images_N / _GREY_LEVEL
    rounded_N = levels_N.round()
    if not ((levels_N - rounded_N).abs() <= _TOLERANCE).all() or rounded_N.min() < 0 or rounded_N.max() > 255:
        raise ValueError(
            "float images must be grey levels k / 255 in [0, 1], neither normalised nor augmented; round them "
            f"yourself: (255 * images).round().to(torch.uint8); got {images_N.min():g} to {images_N.max():g}"
        )
    return rounded_N.to(torch.uint8)


def _channels_last(images_N: Tensor) -> Tensor:
    """(N, H, W, 3), a grey image in all three channels."""
    shape = tuple(images_N.shape)
    first, last = (len(shape) == 4 and shape[axis] in (1, 3) for axis in (1, 3))
    if first == last:
        raise ValueError(f"images have one or three channels, first or last, got {shape}")
    images_N = images_N.permute(0, 2, 3, 1) if first else images_N
    return images_N.expand(-1, -1, -1, 3).contiguous()


def _has_parameter(loader: Callable[..., Any]) -> bool:
    try:
        inspect.signature(loader).bind(None)
    except (TypeError, ValueError):
        return False
    return True
