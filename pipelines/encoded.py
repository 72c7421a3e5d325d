"""Labelled images as the bytes of their files, for pipelines that decode while they load."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from engine.pipelines.folder import Files, Tree, pixels, wanted
from engine.pipelines.splits import Progress, Request

_LAST_BYTES = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_IMAGES_PER_TASK = 256


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Images in files of a tree. names: N of them; labels: int64 N; class_names: the name of each label.

    skipped: the files that were left out because they cannot be read.
    """

    tree: Tree
    names: tuple[str, ...]
    labels: Tensor
    class_names: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: Tensor) -> EncodedImages:
        """The images of those indices, in that order."""
        return replace(self, names=tuple(self.names[i] for i in index.tolist()), labels=self.labels[index])

    def where(self, sample: int) -> str:
        """How a message calls the file of a sample."""
        return self.tree.where(self.names[sample])

    def read(self, sample: int) -> tuple[bytes, int, int]:
        """Encoded image, height and width, as any decoder finds them.

        JPEG and PNG files that are whole, RGB or grey, are given as they are. What decoders read differently or do
        not read (CMYK, palettes, other formats) is decoded here, as `folder` does it, and given as PPM.
        Raises ValueError, naming the file, where it cannot be read, is cut off, or has more than 8 bits a channel.
        """
        with suppress(Exception):  # whatever is wrong with the file, `pixels` says it
            data = self.tree.read(self.names[sample])
            with Image.open(io.BytesIO(data)) as image:
                if image.mode in ("RGB", "L") and data.endswith(_LAST_BYTES[image.format or ""]):
                    return data, image.height, image.width
        image_HWC = pixels(self.tree, self.names[sample])
        height, width = image_HWC.shape[:2]
        return b"P6 %d %d 255\n" % (width, height) + image_HWC.tobytes(), height, width


def encoded_splits(
    train: Files, test: Files, request: Request, *, on_bad_image: str = "fail"
) -> tuple[EncodedImages, EncodedImages]:
    """The images wanted, not yet decoded.

    on_bad_image: what becomes of images that cannot be read. "fail": no file is read here, and an epoch that meets
    one ends with its name. "skip": every file is read here, once, and those images are left out, the same on every
    rank; damage that only decoding shows still ends the epoch.
    Raises ValueError for another policy, or where no image of a class is left.
    """
    if on_bad_image not in ("fail", "skip"):
        raise ValueError(f"on_bad_image: {on_bad_image!r} is unknown; known are fail, skip")
    splits = []
    for part, files in (("train", train), ("test", test)):
        names, labels_N = wanted(files, part, request)
        images = EncodedImages(files.tree, tuple(names), labels_N, files.class_names)
        splits.append(_readable(images, part, request.progress) if on_bad_image == "skip" else images)
    return splits[0], splits[1]


def _readable(images: EncodedImages, part: str, progress: Progress | None) -> EncodedImages:
    good_N = torch.empty(len(images), dtype=torch.bool)

    def check(start: int) -> int:
        end = min(start + _IMAGES_PER_TASK, len(images))
        for sample in range(start, end):
            try:
                images.read(sample)
            except ValueError:
                good_N[sample] = False
            else:
                good_N[sample] = True
        return end

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(check, range(0, len(images), _IMAGES_PER_TASK)):
            if progress is not None:
                progress(part, done, len(images))
    for label in images.labels.unique().tolist():
        if not good_N[images.labels == label].any():
            raise ValueError(f"data: {images.tree.where(images.class_names[label])} holds no readable image")
    skipped = tuple(images.where(sample) for sample in (~good_N).nonzero()[:, 0].tolist())
    return replace(images.take(good_N.nonzero()[:, 0]), skipped=skipped)
