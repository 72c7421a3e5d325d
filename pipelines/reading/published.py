"""Readers and downloads of the data sets with a name. torchvision is imported only when it is needed."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from engine.pipelines.reading.encoded import FoundSplits, listing, read_splits
from engine.pipelines.reading.folder import (
    Files,
    Wanted,
    below_single_folder,
    by_class,
    check_same_classes,
    opened,
)
from engine.pipelines.reading.tree import Tree, archive, directory
from engine.pipelines.splits import SPLIT_NAMES, Request, Split, split_validation

_CLASSES = {  # sorted, which is also the order of their labels
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "cifar100": """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
    can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
    dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
    lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter
    palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road
    rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower
    sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
    willow_tree wolf woman worm
    """,
}
CIFAR_NAMES = {  # of torchvision's folder and archive
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
}
_DIGIT_NAMES = tuple("0123456789")
_TINY_IMAGENET = "tiny-imagenet-200"
_VAL_ANNOTATIONS = "val/val_annotations.txt"


class Absent(Exception):
    """The place does not hold the data set; the message completes the sentence "it has ..."."""


def digits(request: Request) -> FoundSplits:
    """scikit-learn's 8x8 digits of 17 grey levels, enlarged to 32x32; a fixed fifth of them is the test split."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    grey_NHW = np.rint(raw.images * (255 / 16)).astype(np.uint8)
    large_NHW = np.stack([_enlarged(grey_HW) for grey_HW in grey_NHW])
    images_NHWC = torch.from_numpy(large_NHW)[..., None].repeat(1, 1, 1, 3)
    whole = Split(images_NHWC, torch.from_numpy(raw.target).long(), _DIGIT_NAMES)
    train, test = split_validation(whole, 0.2, seed=0)
    return FoundSplits(*_select(request, train, test), "embedded (scikit-learn)")


def cifar(name: str, place: Path, request: Request) -> FoundSplits:
    """CIFAR as torchvision stores it, unpacked or packed, or as an image folder with its class names."""
    unpacked, packed = (place / stored for stored in CIFAR_NAMES[name])
    if unpacked.is_dir() or packed.is_file():
        # Not before: importing torchvision takes a second, and 160 MiB.
        from torchvision.datasets.utils import check_integrity, extract_archive

        kind = _cifar_class(name)
    if unpacked.is_dir():
        return FoundSplits(*_cifar_splits(kind, place, unpacked, request), str(unpacked))
    if packed.is_file():
        if not check_integrity(packed, kind.tgz_md5):
            raise _damaged(packed)
        with TemporaryDirectory() as folder:
            extract_archive(str(packed), folder)
            return FoundSplits(*_cifar_splits(kind, Path(folder), packed, request), str(packed))
    missing = f"no {unpacked.name}, no {packed.name} and no image folder of its classes"
    with ExitStack() as stack:
        try:
            # Its test images are those that everybody tests on, and no others.
            found = stack.enter_context(opened(place, Wanted(only_test=request.only_test, may_split=False)))
        except ValueError as error:
            raise Absent(f"{missing} ({str(error).removeprefix('data: ')})") from None
        if found.train.by_class.keys() != set(_CLASSES[name].split()):
            raise Absent(missing)
        splits = _read(found.train, found.test, request, (32, 32))
        return FoundSplits(*splits, f"image folder {place} ({name} as image files)", found.notes)


def _cifar_splits(kind: Any, root: Path, shown: Path, request: Request) -> tuple[Split, Split]:
    try:
        # Compares md5 sums before it unpickles.
        parts = [kind(root, train=part == "train") for part in _parts(request)]
    except RuntimeError:
        raise _damaged(shown) from None
    train, test = (_split(part.data, np.asarray(part.targets), tuple(part.classes)) for part in parts)
    return _select(request, train, test)


def download_cifar(name: str, folder: Path) -> None:
    """Fetch and unpack CIFAR into the folder; torchvision compares its md5 sum."""
    from torchvision.datasets.utils import download_and_extract_archive

    kind = _cifar_class(name)
    download_and_extract_archive(
        kind.url, str(folder), filename=kind.filename, md5=kind.tgz_md5, remove_finished=True
    )


def _cifar_class(name: str) -> Any:
    from torchvision import datasets

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def svhn(place: Path, request: Request) -> FoundSplits:
    """The cropped house numbers as torchvision stores them, without the extra split."""
    from torchvision.datasets import SVHN

    paths = [place / SVHN.split_list[part][1] for part in _parts(request)]
    if not all(path.is_file() for path in paths):
        raise Absent(f"no {' or no '.join(path.name for path in paths)}")
    try:
        parts = [SVHN(place, part) for part in _parts(request)]
    except RuntimeError:
        raise _damaged(place / "*.mat") from None
    train, test = (_split(part.data.transpose(0, 2, 3, 1), part.labels, _DIGIT_NAMES) for part in parts)
    return FoundSplits(*_select(request, train, test), str(place))


def download_svhn(folder: Path) -> None:
    """Fetch SVHN's two files into the folder; torchvision compares their md5 sums."""
    from torchvision.datasets import SVHN

    for part in SPLIT_NAMES:
        SVHN(folder, part, download=True)


def tiny_imagenet(place: Path, request: Request) -> FoundSplits:
    """Tiny-ImageNet, unpacked or zipped; its val images are the test split, as its test images have no labels.

    Both splits as published, `train/<class>/images/*` and `val/images/*` with val_annotations.txt, or by class as
    `image_folder` reads them.
    """
    candidates = (place / _TINY_IMAGENET, place / f"{_TINY_IMAGENET}.zip", place)
    with ExitStack() as stack:
        for path in candidates:
            tree = _tiny_imagenet_tree(path, stack)
            if tree is not None and {"train", "val"} - tree.tops <= ({"train"} if request.only_test else set()):
                break
        else:
            raise Absent(f"no {_TINY_IMAGENET} and no {_TINY_IMAGENET}.zip with train/ and val/")
        test = _tiny_imagenet_val(tree)
        train = test if request.only_test else by_class(tree.under("train/").listed("*", "*/*"))
        check_same_classes(train, test)
        return FoundSplits(*_read(train, test, request, (64, 64)), str(path))


def _tiny_imagenet_tree(path: Path, stack: ExitStack) -> Tree | None:
    if path.is_file():
        return below_single_folder(archive(path, stack))
    return directory(path, "*", _VAL_ANNOTATIONS) if path.is_dir() else None


def _tiny_imagenet_val(tree: Tree) -> Files:
    """The val images, by the list of their classes, else by their folders, into which many move them."""
    val = tree.under("val/").listed("*", "images/*")
    if _VAL_ANNOTATIONS not in tree.names or not val.under("images/").names:
        val = val.listed("*/*")
        return by_class(replace(val, names=[name for name in val.names if name != "images/"]))
    present = set(val.names)  # also keeps a name with ".." from leading out of the folder
    by_name: dict[str, list[str]] = {}
    for line in tree.read(_VAL_ANNOTATIONS).decode(errors="replace").splitlines():
        file, class_name = [*line.split("\t"), ""][:2]
        if f"images/{file}" not in present or not class_name:
            raise ValueError(f"data: {tree.where(_VAL_ANNOTATIONS)} names what is not there: {file} {class_name}")
        by_name.setdefault(class_name, []).append(f"images/{file}")
    return Files(val, by_name)


def known_classes(name: str) -> tuple[str, ...] | None:
    """Class names of a published data set, in the order of its labels, where they are known before it is read."""
    if name in _CLASSES:
        return tuple(_CLASSES[name].split())
    return _DIGIT_NAMES if name in ("digits", "svhn") else None


def check_classes(name: str, found: tuple[str, ...], where: str) -> None:
    """Raise ValueError where a file that is said to hold a data set has not its classes."""
    if name in _CLASSES and found != known_classes(name):
        raise ValueError(f"data: {where} does not hold the classes of {name}, but {', '.join(found[:5])}...")


def download_tiny_imagenet(folder: Path) -> None:
    """Fetch the zip archive into the folder; it is read as it is."""
    from torchvision.datasets.utils import download_url

    download_url(
        f"http://cs231n.stanford.edu/{_TINY_IMAGENET}.zip", str(folder), md5="90528d7ca1a48142e341f4ef8d21d0de"
    )


def _read(train: Files, test: Files, request: Request, shape: tuple[int, int]) -> tuple[Split, Split]:
    return read_splits(listing(train, "train", request), listing(test, "test", request), request, shape)


def _enlarged(grey_HW: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.fromarray(grey_HW).resize((32, 32), Image.Resampling.BILINEAR))


def _split(images_NHWC: npt.NDArray[np.uint8], labels_N: npt.NDArray[np.int64], names: tuple[str, ...]) -> Split:
    return Split(torch.from_numpy(np.ascontiguousarray(images_NHWC)), torch.from_numpy(labels_N).long(), names)


def _parts(request: Request) -> tuple[str, str]:
    """Splits to read as train and test. `Request.of` takes no training images where only the test is wanted."""
    return ("test", "test") if request.only_test else SPLIT_NAMES


def _select(request: Request, train: Split, test: Split) -> tuple[Split, Split]:
    return request.of("train", train), request.of("test", test)


def _damaged(path: Path) -> ValueError:
    return ValueError(f"data: {path} is damaged or incomplete (its md5 sums differ); delete it or fetch it again")
