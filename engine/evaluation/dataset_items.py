"""The items of a torch Dataset as images by index, with their labels.

Shape suffixes: N all items, B batch.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

_CHANNELS = (1, 3)


class DatasetItems:
    """Items (image, label) of a Dataset, each read once to be checked and for its label, and once for each attack.

    Images are float CHW in [0, 1], or uint8 of one or three channels, CHW or HWC; all of one shape.
    Raises ValueError, naming the first item that is anything else.
    """

    def __init__(self, data: Dataset[Any]) -> None:
        if not hasattr(data, "__len__") or not hasattr(type(data), "__getitem__"):
            raise ValueError(f"data: expected a Dataset with a length and items, got {type(data).__name__}")
        if not len(data):
            raise ValueError("data: there is nothing to evaluate in 0 images")
        self._data = data
        self._shape: torch.Size | None = None
        self._dtype: torch.dtype | None = None
        self.labels = torch.tensor([self._label(number) for number in range(len(data))])
        """int64 N."""

    def __getitem__(self, sample_B: Tensor) -> Tensor:
        """Images of those items, uint8 BHWC or float BCHW."""
        return torch.stack([self._image(number, self._data[number]) for number in sample_B.tolist()])

    def _label(self, number: int) -> int:
        item = self._data[number]
        self._image(number, item)
        try:
            label = operator.index(item[1])
        except (TypeError, ValueError):
            raise ValueError(
                f"data: item {number}: expected a whole number as label, got {item[1]!r:.60}"
            ) from None
        if label < 0:
            raise ValueError(f"labels: expected 0 <= label, got {label}")
        return label

    def _image(self, number: int, item: Any) -> Tensor:
        """The image of an item in the axes that an evaluation expects. Raises ValueError where it is none."""
        if not isinstance(item, tuple | list) or len(item) != 2 or not isinstance(item[0], Tensor):
            kinds = ", ".join(type(part).__name__ for part in item) if isinstance(item, tuple | list) else None
            got = f"({kinds})" if kinds else type(item).__name__
            raise ValueError(f"data: item {number}: expected (tensor, label), got {got}")
        image: Tensor = item[0]
        if image.dim() != 3 or not (image.dtype == torch.uint8 or image.dtype.is_floating_point):
            raise ValueError(
                f"data: item {number}: expected an image float (C, H, W), or uint8 (C, H, W) or (H, W, C), "
                f"got {image.dtype} {tuple(image.shape)}"
            )
        if self._shape is None:
            self._shape, self._dtype = image.shape, image.dtype
        if (image.shape, image.dtype) != (self._shape, self._dtype):
            raise ValueError(
                f"data: item {number} is {image.dtype} {tuple(image.shape)}, and others are {self._dtype} "
                f"{tuple(self._shape)}"
            )
        return self._channels_last(image) if image.dtype == torch.uint8 else _checked(number, image)

    def _channels_last(self, image: Tensor) -> Tensor:
        first, last = (image.shape[axis] in _CHANNELS for axis in (0, 2))
        if first == last:
            raise ValueError(
                f"data: in uint8 {tuple(image.shape)} either the first or the last axis must be of 1 or 3 channels"
            )
        return image.permute(1, 2, 0) if first else image


def _checked(number: int, image: Tensor) -> Tensor:
    """The image. Raises ValueError where a value does not lie in [0, 1]."""
    low, high = (float(bound) for bound in image.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"data: item {number}: floats must lie in [0, 1], got {low:g}..{high:g}")
    return image
