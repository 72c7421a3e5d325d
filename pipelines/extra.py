"""Extra images beside the training images: in a folder or an .npz file, with labels or without."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from engine.common.files import expand_user
from engine.pipelines.datasets import AnyDataset, AnySplit
from engine.pipelines.reading import npz
from engine.pipelines.reading.encoded import EncodedImages, Listing, encoded_splits, read_splits
from engine.pipelines.reading.folder import Files, images_of, notes
from engine.pipelines.reading.held_out import portable
from engine.pipelines.reading.tree import Tree, directory
from engine.pipelines.splits import Request, Split, Splittable

UNLABELLED = -1
"""Label of an image that has none."""

_PICKLE = b"\x80"


class ExtraImages(NamedTuple):
    """Extra images, and sentences for the user on files that are left out."""

    images: AnySplit
    notes: tuple[str, ...] = ()


def find(place: str, dataset: AnyDataset, request: Request, *, with_labels: bool = True) -> ExtraImages:
    """Extra images for a data set, in memory where its training images are, else in their files.

    place: an .npz file, or a folder: of folders named as the data's classes, or of images without labels. Without
    `with_labels` their labels are not looked at. request: of it `on_bad_image` and `progress` count.
    Raises ValueError, one line, where they are missing or damaged, do not fit the data set, or are in it: one of
    its test images, or none but training images.
    """
    path = expand_user("extra_data", place)
    if isinstance(dataset.train, EncodedImages) and dataset.train.beton is not None:
        raise ValueError(
            f"extra_data: the images of {dataset.train.beton} stay in their file, beside which no others are "
            "read; give the data as a folder"
        )
    try:
        if path.is_dir():
            listed, said = _listing(path, dataset.class_names, with_labels)
            found = ExtraImages(_of_folder(listed, dataset.train, request), said)
        else:
            found = ExtraImages(_of_array(_read_npz(path, with_labels), dataset, path))
        if isinstance(found.images, Split) and isinstance(dataset.train, Split):  # `join` copies both
            together = found.images.images.nbytes + dataset.train.images.nbytes
            npz.check_memory(together, len(found.images) + len(dataset.train))
        _check_new(found.images, dataset, path)
        return found
    except OSError as error:
        raise ValueError(f"extra_data: cannot read {error.filename or path}: {error.strerror or error}") from None
    except ValueError as error:
        text = str(error).removeprefix("data: ")
        raise ValueError(text if text.startswith("extra_data: ") else f"extra_data: {text}") from None


def are_labelled(images: Splittable) -> bool:
    """True if the images have labels."""
    return bool((images.labels != UNLABELLED).all())


def join(originals: AnySplit, extra: AnySplit) -> AnySplit:
    """Training images, with the extra ones after them."""
    labels = torch.cat((originals.labels, extra.labels))
    if isinstance(originals, Split):
        assert isinstance(extra, Split), extra
        return replace(originals, images=torch.cat((originals.images, extra.images)), labels=labels)
    assert isinstance(extra, EncodedImages), extra
    names = tuple(
        f"{part.tree.label}{part.tree.prefix}{name}" for part in (originals, extra) for name in part.names
    )
    return replace(originals, tree=_joined(originals.tree, extra.tree), names=names, labels=labels)


def _joined(*trees: Tree) -> Tree:
    """A tree of full names, as they stand in messages."""
    longest_first = sorted(trees, key=lambda tree: len(tree.label), reverse=True)

    def read(name: str) -> bytes:
        tree = next(tree for tree in longest_first if name.startswith(tree.label))
        return tree.read_bytes(name.removeprefix(tree.label))

    return Tree([], "", read)


def _read_npz(path: Path, with_labels: bool) -> npz.ArrayImages:
    with path.open("rb") as file:
        if file.read(1) == _PICKLE:
            raise ValueError(
                f"extra_data: {path} is a pickle, which could run code and is not read; if you trust it, convert "
                'it: d = pickle.load(open(FILE, "rb")); numpy.savez("extra.npz", image=d["data"], '
                'label=d["extrapolated_targets"])'
            )
    return npz.read(path, with_labels=with_labels)


def _of_array(images: npz.ArrayImages, dataset: AnyDataset, path: Path) -> AnySplit:
    labels, classes, count = images.labels, len(dataset.class_names), len(images)
    if labels is None:
        labels = torch.full((count,), UNLABELLED)
    elif not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"{path}: its labels are {labels.min()} to {labels.max()}, and those of the data 0 to {classes - 1}"
        )
    _check_shape(images.shape, dataset.train, path)
    if isinstance(dataset.train, Split):
        return Split(images.tensor(), labels, dataset.class_names)
    height, width = images.shape

    def read(name: str) -> bytes:
        number = int(name)
        return b"P6 %d %d 255\n" % (width, height) + images[number : number + 1].tobytes()

    names = tuple(map(str, range(count)))
    tree = Tree([], f"{path}: image ", read)
    shape, any_size = dataset.train.shape, dataset.train.any_size
    return EncodedImages(tree, names, labels, dataset.class_names, shape=shape, any_size=any_size)


def _listing(path: Path, class_names: tuple[str, ...], with_labels: bool) -> tuple[Listing, tuple[str, ...]]:
    """The images of a folder, and sentences on the files that are left out."""
    tree = directory(path, "*", "*/*")
    files: dict[str, list[str]] = {}  # the name of a folder, "" of the path itself -> its files
    for name in tree.names:
        folder, _, file = name.rpartition("/")
        if file:
            files.setdefault(folder, []).append(name)
        elif "/" in folder:
            raise ValueError(f"{tree.where(name)}: a folder of images must hold no other folder")
    found, strays = images_of(tree, files)
    by_folder = {folder: names for folder, names in found.items() if names}
    if not by_folder:
        raise ValueError(f"{path} holds no images, and no folders of images")
    if len(by_folder) > 1 and "" in by_folder:
        raise ValueError(f"{path} holds images beside folders of images")
    labels = [UNLABELLED for _ in by_folder]
    if with_labels and "" not in by_folder:
        label_of = {name: label for label, name in enumerate(class_names)}
        if unknown := [folder for folder in by_folder if portable(folder) not in label_of]:
            known = ", ".join(class_names[:5]) + ", ..." * (len(class_names) > 5)
            raise ValueError(f"{path}: the folder {unknown[0]!r} is of no class of the data; these are {known}")
        labels = [label_of[portable(folder)] for folder in by_folder]
    counts = torch.tensor([len(names) for names in by_folder.values()])
    listed = tuple(name for names in by_folder.values() for name in names)
    said = notes(Files(tree, by_folder, tuple(strays)))
    return Listing(tree, listed, torch.tensor(labels).repeat_interleave(counts), class_names), said


def _of_folder(found: Listing, originals: AnySplit, request: Request) -> AnySplit:
    has_labels = are_labelled(found)
    files = found if has_labels else replace(found, labels=torch.zeros_like(found.labels))
    none = files.take(torch.arange(0))
    images: AnySplit
    if isinstance(originals, Split):
        height, width = originals.shape
        npz.check_memory(len(files) * height * width * 3, len(files))
        images, _ = read_splits(files, none, request, originals.shape)
    else:
        size = originals.shape[0] if originals.any_size else None
        images, _ = encoded_splits(files, none, replace(request, image_size=size))
        _check_shape(images.shape, originals, files.where(0))
    return images if has_labels else replace(images, labels=torch.full_like(images.labels, UNLABELLED))


def _check_new(images: AnySplit, dataset: AnyDataset, path: Path) -> None:
    """Raise ValueError where an extra image is a test image of the data, or all of them are training images."""
    test, train = (set(_identities(split)) for split in (dataset.test, dataset.train))
    known = [sample for sample, identity in enumerate(_identities(images)) if identity in test]
    if known:
        raise ValueError(
            f"{len(known):,} of the {len(images):,} images of {path} are test images of the data, and must not be "
            f"trained on; the first: {images.where(known[0])}"
        )
    if all(identity in train for identity in _identities(images)):
        raise ValueError(f"the images of {path} are training images of the data, all of them")


def _identities(images: AnySplit) -> Iterator[bytes | str]:
    """A mark of each image: in memory a hash of its pixels, else its place, whichever links lead there."""
    if isinstance(images, Split):
        for image_HWC in images.images.numpy():
            yield hashlib.sha256(image_HWC.tobytes()).digest()
        return
    root, resolved = images.tree.root, functools.cache(os.path.realpath)
    for sample, name in enumerate(images.names):
        folder, _, file = f"{images.tree.prefix}{name}".rpartition("/")
        yield images.where(sample) if root is None else f"{resolved(root / folder)}/{file}"


def _check_shape(shape: tuple[int, int], originals: AnySplit, place: Path | str) -> None:
    if not originals.any_size and shape != originals.shape:
        raise ValueError(
            f"{place}: its images are {shape[1]}x{shape[0]} pixels and must be "
            f"{originals.shape[1]}x{originals.shape[0]} as those of the data"
        )
