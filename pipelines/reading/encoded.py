"""Labelled images as the bytes of their files, for pipelines that decode while they load. B batch, H, W."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.common.numbers import ceil_div
from engine.pipelines.crops import centre_crops
from engine.pipelines.reading.decoding import Pixels, decodes_alike, open_image, pixels
from engine.pipelines.reading.folder import Files
from engine.pipelines.reading.held_out import HeldOut
from engine.pipelines.reading.tree import Tree
from engine.pipelines.splits import SPLIT_NAMES, Progress, Request, Split

_LAST_BYTES = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_IMAGES_PER_TASK = 256
_USUAL_SIZES = (32, 64, 96, 128, 160, 224)
_LOOKED_AT = 64  # images at most, to say which size suits them
_HASHED = 1 << 14  # images at most, whose content goes into a hash of the data


@dataclass(frozen=True, eq=False)
class Listing:
    """Images in files of a tree, listed and not opened.

    names: N of them; labels: int64 N; class_names: the name of each label. skipped: the files that were left out
    because they cannot be read. beton: the file that holds them all, if one does.
    """

    tree: Tree
    names: tuple[str, ...]
    labels: Tensor
    class_names: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    beton: Path | None = None

    def __len__(self) -> int:
        return len(self.names)

    def take(self: AnyListing, index: Tensor) -> AnyListing:
        """The images of those indices, in that order."""
        return replace(self, names=tuple(self.names[i] for i in index.tolist()), labels=self.labels[index])

    def where(self, sample: int) -> str:
        """Name of a sample's file in a message."""
        return self.tree.where(self.names[sample])

    def read(self, sample: int) -> tuple[bytes, int, int]:
        """Encoded image, height and width, of a file that every decoder reads alike.

        JPEG and PNG files that are whole, RGB or grey, and stored upright are given as they are. What decoders
        read differently or do not read (CMYK, palettes, other formats) is decoded by `decode`, and given as PPM.
        Raises ValueError, naming the file, where it cannot be read or is cut off.
        """
        with suppress(Exception):  # `decode` below raises what is wrong with the file
            data = self.tree.read(self.names[sample])
            with open_image(data) as image:
                whole = data.endswith(_LAST_BYTES[image.format or ""])
                if whole and decodes_alike(image, data, upright=self.is_turned):
                    return data, image.height, image.width
        image_HWC = self.decode(sample)
        height, width = image_HWC.shape[:2]
        return b"P6 %d %d 255\n" % (width, height) + image_HWC.tobytes(), height, width

    def decode(self, sample: int) -> Pixels:
        """The image as Pillow decodes it: RGB, HWC. Raises ValueError, naming the file, where it is unreadable."""
        return pixels(self.tree, self.names[sample], upright=self.is_turned)

    @property
    def is_turned(self) -> bool:
        """Images are turned as their EXIF orientation says; in a .beton file they are as they are to be seen."""
        return self.beton is None


AnyListing = TypeVar("AnyListing", bound=Listing)


@dataclass(frozen=True, eq=False, kw_only=True)
class EncodedImages(Listing):
    """Images in files, from which views are made.

    shape: H and W of a view. any_size: views are crops of images of any size, resized; else every image is of
    that shape. is_fixed: the shape is that of a data set, which has no other.
    """

    shape: tuple[int, int]
    any_size: bool
    is_fixed: bool = False

    @property
    def images(self) -> Views:
        """Images as evaluation sees them, decoded on access."""
        return Views(self)

    def read(self, sample: int) -> tuple[bytes, int, int]:
        """`Listing.read`, which raises ValueError too where the image has not the shape that it must have."""
        data, height, width = super().read(sample)
        self._check_shape(sample, height, width)
        return data, height, width

    def view(self, sample: int, crop: Iterable[int] | None = None) -> Pixels:
        """A view by Pillow, HWC: the image, or a crop of it resized by a triangular filter.

        crop: top, left, height, width, and 1 where it is mirrored; None: the one of `centre_crops`.
        Raises ValueError as `read` does.
        """
        image_HWC = self.decode(sample)
        height, width = image_HWC.shape[:2]
        self._check_shape(sample, height, width)
        if not self.any_size:
            return image_HWC
        if crop is None:
            crop = map(int, centre_crops(torch.tensor(height), torch.tensor(width)))
        return np.asarray(cut(Image.fromarray(image_HWC), crop, self.shape))

    def update(self, digest: hashlib._Hash) -> None:
        """Add names, labels, and the files of up to 16,384 images, evenly chosen, to a hash."""
        digest.update("\0".join(self.names).encode(errors="surrogateescape"))
        digest.update(self.labels.contiguous().numpy())
        chosen = range(0, len(self), ceil_div(len(self), _HASHED) or 1)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for data in pool.map(lambda sample: self.tree.read(self.names[sample]), chosen):
                digest.update(data)

    def _check_shape(self, sample: int, height: int, width: int) -> None:
        if not self.any_size and (height, width) != self.shape:
            fault = (
                f"data: {self.where(sample)} is {width}x{height} pixels and must be "
                f"{self.shape[1]}x{self.shape[0]} as the other images"
            )
            if self.is_fixed:
                raise ValueError(fault)
            size = self._usual_size()
            raise ValueError(
                f"{fault}; give --image-size {size} to cut views of that size from images of any size"
            )

    def _usual_size(self) -> int:
        """`usual_size` by some of the images."""
        sides = []
        for sample in range(0, len(self), ceil_div(len(self), _LOOKED_AT)):
            with suppress(Exception), open_image(self.tree.read(self.names[sample])) as image:
                sides.append(min(image.size))
        return usual_size(sides)


@dataclass(frozen=True, eq=False)
class Views:
    """Images by index as evaluation sees them: by Pillow, the same pixels whichever pipeline trains."""

    encoded: EncodedImages

    def __getitem__(self, sample_B: Tensor, /) -> Tensor:
        """uint8 BHWC: whole images, or their resized `centre_crops`."""
        views_BHWC = np.empty((len(sample_B), *self.encoded.shape, 3), np.uint8)

        def fill(i: int) -> None:
            views_BHWC[i] = self.encoded.view(int(sample_B[i]))

        _for_each(len(sample_B), fill, images_per_task=8)
        return torch.from_numpy(views_BHWC)


class FoundSplits(NamedTuple):
    """A data set that was found. source: its place in words. notes, held_out: as of `ImageFolder`."""

    train: Split | EncodedImages
    test: Split | EncodedImages
    source: str
    notes: tuple[str, ...] = ()
    held_out: HeldOut | None = None


def cut(image: Image.Image, crop: Iterable[int], shape: tuple[int, int]) -> Image.Image:
    """A crop of an image, as in `EncodedImages.view`, resized to that height and width by a triangular filter."""
    top, left, height, width, flip = crop
    part = image.crop((left, top, left + width, top + height))
    resized = part.resize(shape[::-1], Image.Resampling.BILINEAR)
    return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else resized


def usual_size(sides: Sequence[int]) -> int:
    """The largest usual size of views that half of the images' shorter sides reach; of none, the smallest."""
    middle = sorted(sides)[len(sides) // 2] if sides else 0
    return max((size for size in _USUAL_SIZES if size <= middle), default=_USUAL_SIZES[0])


def listing(files: Files, part: str, request: Request) -> Listing:
    """The images wanted of "train" or "test"."""
    by_label = [files.by_class[class_name] for class_name in files.class_names]
    labels_N = torch.arange(len(by_label)).repeat_interleave(torch.tensor([len(names) for names in by_label]))
    names = tuple(name for names in by_label for name in names)
    return request.of(part, Listing(files.tree, names, labels_N, files.class_names))


def encoded_splits(train: Listing, test: Listing, request: Request) -> tuple[EncodedImages, EncodedImages]:
    """Train and test images that stay in their files. Raises ValueError where no image of a class is left.

    With `on_bad_image` "fail" only the first file is read here, and an epoch that meets a bad one ends with its
    name. With "skip" every file is read, once, and those that cannot be read are left out, the same ones on every
    rank; damage that only decoding shows still ends the epoch.
    """
    train, test = _without_bad(train, test, request, Listing.read)
    size = request.image_size
    shape = (size, size) if size else (train if len(train) else test).read(0)[1:]
    return _encoded(train, shape, size is not None), _encoded(test, shape, size is not None)


def read_splits(
    train: Listing, test: Listing, request: Request, shape: tuple[int, int] | None = None
) -> tuple[Split, Split]:
    """Train and test images decoded into memory. shape: H and W that every one must have; None: the first one's.

    Raises ValueError, naming the file, where an image is of another shape, or cannot be read and is not skipped.
    """
    train, test = _without_bad(train, test, request, Listing.decode)
    is_fixed = shape is not None
    shape = shape or (train if len(train) else test).read(0)[1:]
    splits = []
    for part, listed in zip(SPLIT_NAMES, (train, test), strict=True):
        images = replace(_encoded(listed, shape, False), is_fixed=is_fixed)
        images_NHWC = np.empty((len(images), *shape, 3), np.uint8)

        def fill(i: int, images: EncodedImages = images, images_NHWC: Pixels = images_NHWC) -> None:
            images_NHWC[i] = images.view(i)

        _for_each(len(images), fill, part, request.progress)
        splits.append(Split(torch.from_numpy(images_NHWC), images.labels, images.class_names, images.skipped))
    return splits[0], splits[1]


def _encoded(images: Listing, shape: tuple[int, int], any_size: bool) -> EncodedImages:
    known = {field.name: getattr(images, field.name) for field in fields(Listing)}
    return EncodedImages(**known, shape=shape, any_size=any_size)


def _without_bad(
    train: Listing, test: Listing, request: Request, look: Callable[[Listing, int], object]
) -> tuple[Listing, Listing]:
    """Both splits without the images that `look` finds unreadable, if these are to be skipped."""
    if not request.skips_bad_images:
        return train, test
    return _readable(train, "train", request.progress, look), _readable(test, "test", request.progress, look)


def _readable(
    images: Listing, part: str, progress: Progress | None, look: Callable[[Listing, int], object]
) -> Listing:
    good_N = torch.ones(len(images), dtype=torch.bool)

    def check(i: int) -> None:
        try:
            look(images, i)
        except ValueError:
            good_N[i] = False

    _for_each(len(images), check, part, progress)
    had_C, has_C = (
        labels.bincount(minlength=len(images.class_names)) for labels in (images.labels, images.labels[good_N])
    )
    for label in ((had_C > 0) & (has_C == 0)).nonzero()[:, 0].tolist():
        name, place = images.class_names[label], images.tree.where()
        raise ValueError(f"data: no image of the class {name!r} in {place} can be read")
    good, bad = (index.nonzero()[:, 0].tolist() for index in (good_N, ~good_N))
    names = tuple(images.names[i] for i in good)
    return replace(images, names=names, labels=images.labels[good_N], skipped=tuple(map(images.where, bad)))


def _for_each(
    count: int,
    do: Callable[[int], None],
    part: str = "",
    progress: Progress | None = None,
    images_per_task: int = _IMAGES_PER_TASK,
) -> None:
    """Call `do` with 0 to count - 1, by threads; of several exceptions the first one in that order is raised."""

    def task(start: int) -> int:
        end = min(start + images_per_task, count)
        for i in range(start, end):
            do(i)
        return end

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for done in pool.map(task, range(0, count, images_per_task)):
                if progress is not None:
                    progress(part, done, count)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
