"""Checks of the arguments of `evaluate`, each refused in one line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from engine.attacks import table
from engine.evaluation.dataset_items import DatasetItems
from engine.pipelines.base import check_images
from engine.pipelines.splits import Indexable


class LabelledImages(Protocol):
    """Images with their labels, as the splits of `engine.pipelines`."""

    @property
    def images(self) -> Tensor | Indexable:
        """uint8 NHWC, in memory or not; or float NCHW in [0, 1]."""

    @property
    def labels(self) -> Tensor:
        """Integers, N."""


Data = LabelledImages | tuple[Tensor, Tensor] | Dataset[Any]
"""A Dataset gives pairs (image, label): images float CHW in [0, 1], or uint8 CHW or HWC."""


def check_names(attacks: Iterable[str]) -> list[str]:
    """The names, each once. Raises ValueError for an unknown one, and where what an attack needs is not there."""
    return [attack.name for attack in table.resolve(attacks)]


def check_data(data: Data) -> tuple[Tensor | Indexable, Tensor]:
    """Images as they are, and labels as int64 on the CPU. Raises ValueError where they do not fit."""
    if isinstance(data, Dataset):
        items = DatasetItems(data)
        return items, items.labels
    pair: Any = data if isinstance(data, tuple) else (getattr(data, "images", None), getattr(data, "labels", None))
    if len(pair) != 2 or any(part is None for part in pair):
        raise ValueError(
            "data: expected (images, labels), a torch Dataset, or an object with .images and .labels, "
            f"got {type(data).__name__}"
        )
    images, labels = pair
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels: expected integers of shape (N,) in a tensor, got {type(labels).__name__}")
    if labels.dim() != 1 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected integers of shape (N,), got {labels.dtype} {tuple(labels.shape)}")
    labels = labels.long().cpu()
    if isinstance(images, Tensor):
        _check_images(images, len(labels))
    elif not len(labels):
        raise ValueError("data: there is nothing to evaluate in 0 images")
    else:
        try:
            first = images[torch.zeros(1, dtype=torch.int64)]
        except (TypeError, IndexError, KeyError):
            first = None
        if not isinstance(first, Tensor) or first.dim() != 4:
            raise ValueError(f"images: expected a tensor, or tensors by index, got {type(images).__name__}")
    if int(labels.min()) < 0:
        raise ValueError(f"labels: expected 0 <= label, got {int(labels.min())}")
    return images, labels


def _check_images(images: Tensor, count: int) -> None:
    if images.dim() == 4 and not images.numel():
        raise ValueError(f"data: there is nothing to evaluate in images of shape {tuple(images.shape)}")
    check_images("images", images)
    if len(images) != count:
        raise ValueError(f"data: {len(images)} images and {count} labels")


def check_place(model: nn.Module, device: torch.device | str | None) -> tuple[torch.device, torch.dtype]:
    """Device, the model's where None is given, and dtype of an evaluation. Raises ValueError where it has none."""
    parameter = next(model.parameters(), torch.empty(0))
    try:
        where = parameter.device if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: {device!r} is not known; known: cpu, cuda, cuda:N") from None
    if parameter.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"model: evaluation runs in float32 or float64, and its parameters are {parameter.dtype}")
    return where, parameter.dtype


def count_classes(model: nn.Module, x_1: Tensor, labels_N: Tensor) -> int:
    """C of the model's logits, by an image. Raises ValueError where its output or the labels do not fit."""
    logits = model(x_1)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model: expected logits of shape (B, C), got {got}")
    if int(labels_N.max()) >= logits.shape[1]:
        raise ValueError(f"labels: up to {int(labels_N.max())}, and the model has {logits.shape[1]} classes")
    return logits.shape[1]
