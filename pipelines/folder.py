"""Image folders: `train/<class>/*` and `test/<class>/*` (or `val/`), as folders or in zip archives."""

from __future__ import annotations

import io
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from engine.pipelines.splits import Progress, Request, Split

_TRAIN = ("train",)
_TEST = ("test", "val")
_IMAGES_PER_TASK = 256


@dataclass(frozen=True)
class Tree:
    """A folder or a zip archive as the visible names below it; the name of a folder ends in "/"."""

    names: list[str]
    label: str  # what stands before a name in a message
    read_bytes: Callable[[str], bytes]
    prefix: str = ""

    def under(self, prefix: str) -> Tree:
        """The part of the tree below a folder "a/"."""
        below = [name.removeprefix(prefix) for name in self.names if name.startswith(prefix) and name != prefix]
        return replace(self, names=below, prefix=self.prefix + prefix)

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        return self.read_bytes(self.prefix + name)

    def where(self, name: str = "") -> str:
        """How a message calls a file, or the tree itself."""
        return f"{self.label}{self.prefix}{name}".rstrip("/:")


@dataclass(frozen=True)
class Files:
    """The image files of one split: for each class, sorted names in the tree."""

    tree: Tree
    by_class: dict[str, list[str]]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label: sorted."""
        return tuple(sorted(self.by_class))


def directory(root: Path, *patterns: str) -> Tree:
    """The visible files and folders of a folder that match the patterns."""
    paths = [path for pattern in patterns for path in root.glob(pattern)]
    names = [path.relative_to(root).as_posix() + ("/" if path.is_dir() else "") for path in paths]
    return Tree(_visible(names), f"{root}/", lambda name: (root / name).read_bytes())


def archive(path: Path, stack: ExitStack) -> Tree:
    """The visible entries of a zip archive that stays open as long as the stack.

    Raises ValueError where it is no zip archive or an entry has an absolute path or "..".
    """
    try:
        file = stack.enter_context(zipfile.ZipFile(path))
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"data: {path} is not a readable zip archive ({error})") from None
    names = file.namelist()
    for name in names:
        windows = PureWindowsPath(name)  # knows "/", "\\" and drives
        if windows.anchor or ".." in windows.parts:
            raise ValueError(f"data: {path} has an entry that leads out of it: {name!r}")
    lock = threading.Lock()  # a ZipFile counts its open readers without one

    def read(name: str) -> bytes:
        with lock:
            return file.read(name)

    return Tree(_visible(names), f"{path}:", read)


def below_single_folder(tree: Tree) -> Tree:
    """The tree without the one folder that holds all of it, as an archive of a whole folder has; else the tree."""
    tops = _tops(tree)
    return tree.under(f"{min(tops)}/") if len(tops) == 1 and not tops & {*_TRAIN, *_TEST} else tree


@contextmanager
def opened(path: Path) -> Iterator[tuple[Files, Files]]:
    """The train and test files of an image folder; archives stay open inside the context.

    path: a folder with train/ or train.zip and test/ (val/) or test.zip (val.zip), or a zip archive with both.
    A train.zip holds `train/<class>/*` or `<class>/*`. Where there is a test, val is not read.
    Raises ValueError in one line that names what is missing, empty or different between the two.
    """
    with ExitStack() as stack:
        if path.is_dir():
            trees = [_split_in_directory(path, names, stack) for names in (_TRAIN, _TEST)]
        elif path.exists():
            whole = below_single_folder(archive(path, stack))
            trees = [_split_in_archive(whole, names) for names in (_TRAIN, _TEST)]
        else:
            raise ValueError(f"data: {path} does not exist")
        train, test = (_by_class(tree) for tree in trees)
        only = [
            f"only in {files.tree.where()}: {', '.join(sorted(extra)[:5])}{', ...' if len(extra) > 5 else ''}"
            for files, other in ((train, test), (test, train))
            if (extra := files.by_class.keys() - other.by_class.keys())
        ]
        if only:
            raise ValueError(f"data: train and test must have the same classes; {'; '.join(only)}")
        yield train, test


def read_splits(
    train: Files, test: Files, request: Request, size: tuple[int, int] | None = None
) -> tuple[Split, Split]:
    """Decode the images wanted as RGB.

    size: (height, width) that every image must have; None: that of the first.
    Raises ValueError, naming the file, where an image cannot be read or is of another size.
    """
    splits = []
    for part, files in (("train", train), ("test", test)):
        chosen, labels_N = wanted(files, part, request)
        height, width = size = size or pixels(files.tree, chosen[0]).shape[:2]
        images_NHWC = np.empty((len(chosen), height, width, 3), np.uint8)
        _decode(files.tree, chosen, images_NHWC, part, request.progress)
        splits.append(Split(torch.from_numpy(images_NHWC), labels_N, files.class_names))
    return splits[0], splits[1]


def wanted(files: Files, part: str, request: Request) -> tuple[list[str], Tensor]:
    """Names and labels (int64) of the images wanted of "train" or "test"."""
    by_label = [files.by_class[class_name] for class_name in files.class_names]
    labels_N = torch.arange(len(by_label)).repeat_interleave(torch.tensor([len(names) for names in by_label]))
    index = request.select(part, labels_N)
    names = [name for names in by_label for name in names]
    return [names[i] for i in index.tolist()], labels_N[index]


def _decode(
    tree: Tree, names: list[str], images_NHWC: npt.NDArray[np.uint8], part: str, progress: Progress | None
) -> None:
    """Fill the array by threads; of several bad images the first one is reported."""
    height, width = images_NHWC.shape[1:3]

    def fill(start: int) -> int:
        end = min(start + _IMAGES_PER_TASK, len(names))
        for i in range(start, end):
            image_HWC = pixels(tree, names[i])
            if image_HWC.shape[:2] != (height, width):
                raise ValueError(
                    f"data: {tree.where(names[i])} is {image_HWC.shape[1]}x{image_HWC.shape[0]} pixels "
                    f"and must be {width}x{height} as the other images"
                )
            images_NHWC[i] = image_HWC
        return end

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(fill, range(0, len(names), _IMAGES_PER_TASK)):
            if progress is not None:
                progress(part, done, len(names))


def pixels(tree: Tree, name: str) -> npt.NDArray[np.uint8]:
    """An image as RGB, HWC. Raises ValueError, naming the file, where it cannot be read."""
    try:
        with Image.open(io.BytesIO(tree.read(name))) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would clip them to 0..255
                raise ValueError(f"more than 8 bits a channel, mode {image.mode}")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # a damaged file makes Pillow and zipfile raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"data: {tree.where(name)} is not a readable image ({reason})") from None


def _visible(names: list[str]) -> list[str]:
    """Sorted names without those that systems leave behind."""
    return sorted(
        name
        for name in set(names)
        if not any(part.startswith(".") or part in ("__MACOSX", "Thumbs.db") for part in name.split("/"))
    )


def _tops(tree: Tree) -> set[str]:
    """The folders at the top."""
    return {name.partition("/")[0] for name in tree.names if "/" in name}


def _split_in_directory(path: Path, names: tuple[str, ...], stack: ExitStack) -> Tree:
    for name in names:
        if (path / name).is_dir():
            return directory(path / name, "*", "*/*")
        if (path / f"{name}.zip").is_file():
            tree = archive(path / f"{name}.zip", stack)
            # Only if no folder stands beside it: "train" may be a class.
            return tree.under(f"{name}/") if _tops(tree) == {name} else tree
    raise ValueError(f"data: {path} holds no {' and no '.join(f'{name}/ or {name}.zip' for name in names)}")


def _split_in_archive(tree: Tree, names: tuple[str, ...]) -> Tree:
    for name in names:
        if name in _tops(tree):
            return tree.under(f"{name}/")
    raise ValueError(f"data: {tree.where()} holds no {' and no '.join(f'{name}/' for name in names)}")


def _by_class(tree: Tree) -> Files:
    """Group `<class>/<file>`; files beside the class folders belong to no class and are left out."""
    by_class: dict[str, list[str]] = {}
    for name in tree.names:
        class_name, slash, file = name.partition("/")
        if "/" in file:
            raise ValueError(f"data: {tree.where(name)}: a class folder must hold images only, and no folder")
        if slash:
            by_class.setdefault(class_name, []).extend([name] if file else [])
    if len(by_class) < 2:
        found = f"only the class {min(by_class)!r}" if by_class else "no class folder"
        raise ValueError(f"data: {tree.where()} holds {found}; two classes or more are needed")
    for class_name, files in by_class.items():
        if not files:
            raise ValueError(f"data: {tree.where(class_name)} holds no image")
    return Files(tree, by_class)
