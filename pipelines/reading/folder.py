"""Image folders: `train/<class>/*` and `test/<class>/*` (or `val/`), as folders or in zip archives."""

from __future__ import annotations

import errno
import io
import os
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

import numpy as np
import numpy.typing as npt
from PIL import Image

from engine.common.files import regular_file

_TRAIN = ("train",)
_TEST = ("test", "val")
_MOST_BYTES_OF_IMAGE = 1 << 28

_MOST_PIXELS = 89_478_485  # of an image, from which on Pillow warns: a small file may claim any size

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are refused

Pixels = npt.NDArray[np.uint8]
"""An image: HWC, or several."""


@dataclass(frozen=True)
class Tree:
    """A folder or a zip archive as the visible names below it; the name of a folder ends in "/"."""

    names: list[str]
    label: str  # stands before a name in a message
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
        """Name of a file, or of the tree itself, in a message."""
        return f"{self.label}{self.prefix}{name}".rstrip("/: ")


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
    """The visible files and folders of a folder that match the patterns, each part of which is a name or "*".

    Raises ValueError where a folder cannot be listed.
    """
    names = [name for pattern in patterns for name in _matching(root, pattern.split("/"))]
    return Tree(
        _visible(names), f"{root}/", lambda name: regular_file(root / name, _MOST_BYTES_OF_IMAGE).read_bytes()
    )


def _matching(root: Path, parts: list[str], prefix: str = "") -> Iterator[str]:
    """Names below the folder `prefix` that match; the name of a folder ends in "/"."""
    try:
        entries = [
            (entry.name, entry.is_dir())
            for entry in os.scandir(root / prefix)
            if parts[0] in ("*", entry.name) and not _is_hidden(entry.name)
        ]
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return
        raise ValueError(f"data: cannot read {error.filename or root / prefix}: {error.strerror}") from None
    for name, is_folder in entries:
        if len(parts) == 1:
            yield f"{prefix}{name}{'/' * is_folder}"
        elif is_folder:
            yield from _matching(root, parts[1:], f"{prefix}{name}/")


def archive(path: Path, stack: ExitStack) -> Tree:
    """The visible entries of a zip archive, which stays open as long as the stack.

    Raises ValueError where it is no zip archive or an entry has an absolute path or "..".
    """
    try:
        file = stack.enter_context(zipfile.ZipFile(regular_file(path)))
    except OSError as error:
        raise ValueError(f"data: {path} is not a readable zip archive ({error.strerror or error})") from None
    except Exception as error:  # a damaged one makes zipfile raise nearly anything
        raise ValueError(f"data: {path} is not a readable zip archive ({error})") from None
    names = file.namelist()
    for name in names:
        windows = PureWindowsPath(name)  # knows "/", "\\" and drives
        if windows.anchor or ".." in windows.parts:
            raise ValueError(f"data: {path} has an entry that leads out of it: {name!r}")
    lock = threading.Lock()  # a ZipFile counts its open readers without one

    def read(name: str) -> bytes:
        with lock:
            size = file.getinfo(name).file_size  # of which zipfile unpacks no more than it says
            if size > _MOST_BYTES_OF_IMAGE:
                raise ValueError(f"{size:,} bytes unpacked, and {_MOST_BYTES_OF_IMAGE:,} are the most")
            return file.read(name)

    return Tree(_visible(names), f"{path}:", read)


def below_single_folder(tree: Tree) -> Tree:
    """The tree below the single folder at its top, as archives of a whole folder have one; else the tree."""
    tops = _tops(tree)
    return tree.under(f"{min(tops)}/") if len(tops) == 1 and not tops & {*_TRAIN, *_TEST} else tree


@contextmanager
def opened(path: Path, *, only_test: bool = False) -> Iterator[tuple[Files, Files]]:
    """`image_folder` whose archives stay open inside the context."""
    with ExitStack() as stack:
        yield _both(path, stack, only_test=only_test)


def image_folder(path: Path, *, only_test: bool = False) -> tuple[Files, Files]:
    """The train and test files of an image folder; archives stay open as long as these are used.

    path: a folder with train/ or train.zip and test/ (val/) or test.zip (val.zip), or a zip archive with both.
    A train.zip holds `train/<class>/*` or `<class>/*`. Where there is a test, val is not read.
    only_test: train need not be there; the test files are given for it, too.
    Raises ValueError in one line that names what is missing, empty or different between the two.
    """
    with ExitStack() as stack:
        files = _both(path, stack, only_test=only_test)
        stack.pop_all()  # an archive closes itself when nobody holds it
        return files


def _both(path: Path, stack: ExitStack, *, only_test: bool) -> tuple[Files, Files]:
    parts = (_TEST, _TEST) if only_test else (_TRAIN, _TEST)
    if path.is_dir():
        trees = [_split_in_directory(path, names, stack) for names in parts]
    elif path.exists():
        whole = below_single_folder(archive(path, stack))
        trees = [_split_in_archive(whole, names) for names in parts]
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
    return train, test


def open_image(content: bytes) -> Image.Image:
    """The image in the bytes of a file, not decoded yet. Raises ValueError where it claims too many pixels."""
    image = Image.open(io.BytesIO(content))
    if image.width * image.height > _MOST_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, and {_MOST_PIXELS:,} are the most")
    return image


def pixels(tree: Tree, name: str) -> Pixels:
    """An image as RGB, HWC. Raises ValueError, naming the file, where it cannot be read."""
    try:
        with open_image(tree.read(name)) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would clip them to 0..255
                raise ValueError(f"more than 8 bits a channel, mode {image.mode}")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # a damaged file makes Pillow and zipfile raise nearly anything
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = re.sub(" <_io.BytesIO object at [^>]*>", "", " ".join(text.split())) or type(error).__name__
        raise ValueError(f"data: {tree.where(name)} is not a readable image ({reason})") from None


def _visible(names: list[str]) -> list[str]:
    """Sorted names without those that systems leave behind."""
    return sorted(name for name in set(names) if not any(map(_is_hidden, name.split("/"))))


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part in ("__MACOSX", "Thumbs.db")


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
