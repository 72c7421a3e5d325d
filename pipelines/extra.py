"""Extra images beside the training images: in a folder or an .npz file, with labels or without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from engine.common.files import expand_user
from engine.pipelines.datasets import AnyDataset, AnySplit
from engine.pipelines.reading import npz
from engine.pipelines.reading.decoding import is_image, is_named_as_image
from engine.pipelines.reading.encoded import EncodedImages, Listing, encoded_splits, read_splits
from engine.pipelines.reading.tree import Tree, directory
from engine.pipelines.splits import Request, Split, Splittable

UNLABELLED = -1
"""Label of an image that has none."""

_PICKLE = b"\x80"


def find(place: str, dataset: AnyDataset, request: Request, *, with_labels: bool = True) -> AnySplit:
    """Extra images for a data set, in memory where its training images are, else in their files.

    place: an .npz file, or a folder: of folders named as the data's classes, or of images without labels. Without
    `with_labels` their labels are not looked at. request: of it `on_bad_image` and `progress` count.
    Raises ValueError, one line, where they are missing or damaged, or do not fit the data set.
    """
    path = expand_user("extra_data", place)
    if isinstance(dataset.train, EncodedImages) and dataset.train.beton is not None:
        raise ValueError(
            f"extra_data: the images of {dataset.train.beton} stay in their file, beside which no others are "
            "read; give the data as a folder"
        )
    try:
        if not path.is_dir():
            return _of_array(_read_npz(path), dataset, path, with_labels)
        return _of_folder(_listing(path, dataset.class_names, with_labels), dataset.train, request)
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


def _read_npz(path: Path) -> npz.ArrayImages:
    with path.open("rb") as file:
        if file.read(1) == _PICKLE:
            raise ValueError(
                f"extra_data: {path} is a pickle, which could run code and is not read; if you trust it, convert "
                'it: d = pickle.load(open(FILE, "rb")); numpy.savez("extra.npz", image=d["data"], '
                'label=d["extrapolated_targets"])'
            )
    return npz.read(path)


def _of_array(images: npz.ArrayImages, dataset: AnyDataset, path: Path, with_labels: bool) -> AnySplit:
    labels = images.labels if with_labels else None
    classes, count = len(dataset.class_names), len(images)
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


def _listing(path: Path, class_names: tuple[str, ...], with_labels: bool) -> Listing:
    tree = directory(path, "*", "*/*")
    files = [name for name in tree.names if not name.endswith("/")]
    images = [name for name in files if is_named_as_image(name) or is_image(tree, name)]
    folders = dict.fromkeys(name.partition("/")[0] for name in images if "/" in name)
    if not images:
        raise ValueError(f"{path} holds no images, and no folders of images")
    if folders and len(folders) != len({name.partition("/")[0] for name in images}):
        raise ValueError(f"{path} holds images beside folders of images")
    if not folders or not with_labels:
        return Listing(tree, tuple(images), torch.full((len(images),), UNLABELLED), class_names)
    place = {name: label for label, name in enumerate(class_names)}
    if unknown := [name for name in folders if name not in place]:
        known = ", ".join(class_names[:5]) + ", ..." * (len(class_names) > 5)
        raise ValueError(f"{path}: the folder {unknown[0]!r} is of no class of the data; these are {known}")
    labels = torch.tensor([place[name.partition("/")[0]] for name in images])
    return Listing(tree, tuple(images), labels, class_names)


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


def _check_shape(shape: tuple[int, int], originals: AnySplit, place: Path | str) -> None:
    if not originals.any_size and shape != originals.shape:
        raise ValueError(
            f"{place}: its images are {shape[1]}x{shape[0]} pixels and must be "
            f"{originals.shape[1]}x{originals.shape[0]} as those of the data"
        )
