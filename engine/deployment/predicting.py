"""Predictions of a trained network for images of any kind and size. B batch, N images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from engine.attacks.evaluated import undisturbed
from engine.attacks.parts import size_of_batch
from engine.deployment.image_files import decode
from engine.deployment.views import View, view_for
from engine.models.weights import LoadedModel, Predictions
from engine.pipelines.base import check_images, unit_images
from engine.pipelines.prefetching import prefetched
from engine.pipelines.reading.decoding import Pixels, rgb

OneImage = str | os.PathLike[str] | Image.Image
"""A path, or an image of Pillow."""
Pixelled = Tensor | npt.NDArray[Any]
"""An image or several, as numbers."""
Images = OneImage | Pixelled | Sequence[OneImage] | Sequence[Pixelled]

_AHEAD = 4  # images that are decoded in advance, by thread


class Viewed(NamedTuple):
    """The view of an image, HWC, and the image's size; or None and what is wrong with it, in one line."""

    image_HWC: Pixels | None
    height: int = 0
    width: int = 0
    fault: str = ""


@dataclass(frozen=True, eq=False)
class Predictor:
    """A network as evaluation runs it, and the view that it gets. batch_size: images per forward, if chosen."""

    loaded: LoadedModel
    view: View
    batch_size: int | None = None

    @property
    def device(self) -> torch.device:
        """The network's."""
        return next(self.loaded.module.parameters(), torch.empty(0)).device

    @property
    def dtype(self) -> torch.dtype:
        """The network's."""
        return next(self.loaded.module.parameters(), torch.empty(0)).dtype

    def batches(self, images: Sequence[OneImage]) -> Iterator[list[Viewed]]:
        """Views of images in their order, in batches; those that are none count in no batch's size.

        A few are decoded in advance, by threads, however many there are. Raises ValueError where images that are
        taken as they are have two sizes.
        """
        threads = len(os.sched_getaffinity(0))
        shape, batch, good = None, list[Viewed](), 0
        with ThreadPoolExecutor(threads) as pool, ExitStack() as stack:
            stack.callback(pool.shutdown, cancel_futures=True)
            made = prefetched(pool, self._viewed, images, _AHEAD * threads)
            for image, viewed in zip(images, made, strict=True):
                batch.append(viewed)
                if viewed.image_HWC is not None:
                    good += 1
                    shape = shape or viewed.image_HWC.shape
                    _check_same(image, viewed.image_HWC.shape, shape)
                if shape is not None and good == self.images_per_forward(*shape[:2]):
                    yield batch
                    batch, good = [], 0
        if batch:
            yield batch

    def images_per_forward(self, height: int, width: int) -> int:
        """Images of a batch, as in evaluation."""
        return size_of_batch(self.batch_size, self.device, height, width)

    def inputs(self, batch: Iterable[Viewed]) -> Tensor:
        """The network's input of those that are images, float BCHW in [0, 1]."""
        views = [viewed.image_HWC for viewed in batch if viewed.image_HWC is not None]
        return unit_images(torch.from_numpy(np.stack(views)), self.device, self.dtype)

    def _viewed(self, image: OneImage) -> Viewed:
        try:
            image_HWC = _pixels_of(image)
            return Viewed(self.view.of(image_HWC, str(image)), *image_HWC.shape[:2])
        except ValueError as error:
            return Viewed(None, fault=str(error))


def _pixels_of(image: OneImage) -> Pixels:
    if not isinstance(image, Image.Image):
        return decode(os.fspath(image))
    try:
        return rgb(image)
    except Exception as error:  # a damaged file, opened and not yet read, makes Pillow raise nearly anything
        raise ValueError(f"an image of Pillow cannot be read ({error})") from None


def _check_same(image: object, found: tuple[int, ...], first: tuple[int, ...]) -> None:
    if found != first:
        raise ValueError(
            f"IMAGES: {image} is {found[1]}x{found[0]} pixels and the first image {first[1]}x{first[0]}; the "
            "checkpoint tells no size: give --image-size N to cut views of that size from images of any size"
        )


def predict(
    loaded: LoadedModel,
    images: Images,
    *,
    image_size: int | None = None,
    dataset: str | None = None,
    batch_size: int | None = None,
) -> Predictions:
    """Answers of a network to images, as an evaluation would get them: same view, full precision, no trace left.

    images: a path, an image of Pillow, uint8 (N, H, W, 3) or (H, W, 3), float (N, 3, H, W) or (3, H, W) in [0, 1],
    as tensors or arrays, or a list of such images. Tensors and arrays must have the size of a view; of paths and
    Pillow's images the view is made: see `view_for`, also of image_size and dataset.
    Raises ValueError, one line, for anything else and for files that are no images; FloatingPointError where
    logits are not finite.
    """
    view, notes = view_for(loaded, image_size, dataset)
    predictor = Predictor(loaded, view, batch_size)
    with undisturbed(loaded.module, predictor.device):
        parts, more = _answers(predictor, images)
    if not parts:
        raise ValueError("images: there is none")
    logits_NC = torch.cat([part.logits for part in parts])
    return replace(parts[0], logits=logits_NC, notes=(*notes, *more))


def _answers(predictor: Predictor, images: Images) -> tuple[list[Predictions], tuple[str, ...]]:
    """Answers batch by batch, and a note on images that were resized."""
    if isinstance(images, Tensor | np.ndarray):
        images_N = torch.as_tensor(images)
        return _of_tensor(predictor, images_N[None] if images_N.dim() == 3 else images_N), ()
    listed = [images] if isinstance(images, str | os.PathLike | Image.Image) else list(images)
    tensors = [torch.as_tensor(image) for image in listed if isinstance(image, Tensor | np.ndarray)]
    if tensors and len(tensors) == len(listed):
        return _of_tensor(predictor, _stacked(tensors)), ()
    files = [image for image in listed if isinstance(image, str | os.PathLike | Image.Image)]
    if len(files) < len(listed):
        kinds = ", ".join(sorted({type(image).__name__ for image in listed}))
        raise ValueError(f"images: a list is of paths and images of Pillow, or of tensors and arrays, got {kinds}")
    resized, parts = 0, []
    for batch in predictor.batches(files):
        if faults := [viewed.fault for viewed in batch if viewed.image_HWC is None]:
            raise ValueError(f"images: {faults[0]}")
        resized += sum(predictor.view.resizes(viewed.height, viewed.width) for viewed in batch)
        parts.append(predictor.loaded.predict(predictor.inputs(batch)))
    return parts, predictor.view.notes(resized)


def _stacked(images: list[Tensor]) -> Tensor:
    """Images of three dimensions, one size and one dtype as a batch. Raises ValueError for others."""
    kinds = {(image.dtype, tuple(image.shape)) for image in images}
    if len(kinds) > 1 or images[0].dim() != 3:
        told = ", ".join(sorted(f"{dtype} {shape}" for dtype, shape in kinds))
        raise ValueError(f"images: a list of tensors holds images (H, W, 3) or (3, H, W) of one size, got {told}")
    return torch.stack(images)


def _of_tensor(predictor: Predictor, images_N: Tensor) -> list[Predictions]:
    """Answers to images that are views already. Raises ValueError where they are none."""
    check_images("images", images_N)
    height, width = images_N.shape[1:3] if images_N.dtype == torch.uint8 else images_N.shape[2:]
    size = predictor.view.size
    if size is not None and (height, width) != (size, size):
        raise ValueError(
            f"images: the network takes {size}x{size} pixels, got {width}x{height}; files are resized"
        )
    parts = images_N.split(predictor.images_per_forward(height, width))
    return [predictor.loaded.predict(part) for part in parts]
