"""Views of images of any size, as evaluation gives them to a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine import models
from engine.config import LARGEST_IMAGE, explicit
from engine.deployment.opening import Artefact
from engine.models.weights import LoadedModel
from engine.pipelines import datasets
from engine.pipelines.crops import centre_crops
from engine.pipelines.datasets import DATASETS
from engine.pipelines.reading.decoding import Pixels
from engine.pipelines.reading.encoded import cut


@dataclass(frozen=True)
class View:
    """Way from an image of any size to the network's input.

    size: of its sides; None: as the image is. is_crop: every image is cut to its `centre_crops` and resized, as
    images of any size are in training with `image_size`; else images of another size alone are, to their central
    square.
    """

    size: int | None
    is_crop: bool = False

    def resizes(self, height: int, width: int) -> bool:
        """True if an image of that size is cut and resized although those of the training were not."""
        return not self.is_crop and self.size is not None and (height, width) != (self.size, self.size)

    def of(self, image_HWC: Pixels, name: str) -> Pixels:
        """The view of an image, uint8 HWC, resized by a triangular filter. Raises ValueError for a huge one."""
        height, width = image_HWC.shape[:2]
        if self.size is None:
            if max(height, width) > LARGEST_IMAGE:
                raise ValueError(
                    f"{name}: {width}x{height} pixels, and without --image-size {LARGEST_IMAGE:,} a side are the "
                    "most"
                )
            return image_HWC
        if self.is_crop:
            crop = [int(part) for part in centre_crops(torch.tensor(height), torch.tensor(width))]
        elif self.resizes(height, width):
            side = min(height, width)
            crop = [(height - side) // 2, (width - side) // 2, side, side, 0]
        else:
            return image_HWC
        return np.asarray(cut(Image.fromarray(image_HWC), crop, (self.size, self.size)))

    def notes(self, resized: int) -> tuple[str, ...]:
        """A note for the user on so many images that `resizes` is true of."""
        if not resized:
            return ()
        one = "image is" if resized == 1 else "images are"
        told = f"{resized:,} {one} not of {self.size}x{self.size} pixels, as in training"
        return (f"{told}: cut to the central square and resized to that",)

    def describe(self) -> str:
        """The way in words."""
        if self.size is None:
            return "images as they are"
        if self.is_crop:
            return f"central square of 224/256 of the shorter side, resized to {self.size}x{self.size}"
        return f"{self.size}x{self.size}; images of another size: central square, resized to that"


def view_for(
    loaded: LoadedModel, image_size: int | None = None, dataset: str | None = None
) -> tuple[View, tuple[str, ...]]:
    """The view that evaluation gives a network, and notes on it for the user.

    image_size: of crops, in place of what the file tells. dataset: whose images it takes, where the file does not
    tell. Raises ValueError where these do not fit what is known.
    """
    if image_size is not None and not 1 <= image_size <= LARGEST_IMAGE:
        raise ValueError(f"image_size must be 1 to {LARGEST_IMAGE:,}, got {image_size}")
    named = _dataset_of(loaded, dataset)
    fixed = DATASETS[named].image_size if named in DATASETS else None
    if fixed is not None and image_size is not None:
        raise ValueError(f"image_size: all images of {named} are of one size, {fixed}x{fixed}; drop it")
    trained = training_of(loaded).get("image_size")
    if image_size is not None:
        if trained not in (None, image_size):
            return View(image_size, is_crop=True), (f"views of {image_size} pixels; in training {trained}",)
        return View(image_size, is_crop=True), ()
    if trained is not None:
        return View(int(trained), is_crop=True), ()
    if fixed is not None:
        return View(fixed), ()
    if isinstance(loaded, Artefact):
        return _as_exported(loaded)
    sizes = models.get(loaded.name).input_sizes
    if named is None and len(sizes) == 1:
        note = f"the file tells no size of images: views are of {sizes[0]}, that of {loaded.name} (--image-size)"
        return View(sizes[0], is_crop=True), (note,)
    return View(None), ("the file tells no size of images: they are taken as they are (else: --image-size)",)


def _as_exported(loaded: Artefact) -> tuple[View, tuple[str, ...]]:
    """The view that an exported file tells of, if it does."""
    if loaded.facts is None:
        return View(None), ("another program's file: images are taken as they are (else: --image-size)",)
    height, width = loaded.facts.image_size
    return View(height if height == width else None), ()


def training_of(loaded: LoadedModel) -> Mapping[str, Any]:
    """Keys of the network's training that differ from their defaults. Raises ValueError for wrong ones."""
    try:
        return explicit(loaded.config) if loaded.config else {}
    except ValueError as error:
        raise ValueError(f"{loaded.path}: the key 'config': {error}") from None


def _dataset_of(loaded: LoadedModel, given: str | None) -> str | None:
    """Name of the data set whose images it takes. Raises ValueError for another than that of its training."""
    if given is None:
        return loaded.dataset
    datasets.check(given)
    if loaded.dataset not in (None, given):
        raise ValueError(f"dataset: {loaded.path} was trained on {loaded.dataset}, got {given!r}")
    return given
