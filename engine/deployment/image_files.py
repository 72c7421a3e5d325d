"""Image files as users name them: files, folders, lists of paths; each decoded as the folder data set does."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from engine.pipelines.reading import tree
from engine.pipelines.reading.decoding import Pixels, pixels
from engine.pipelines.reading.folder import images_of

STDIN = "-"
"""In place of a path: a list of paths on standard input."""

_TREE = tree.files()


class ImageFiles(NamedTuple):
    """Paths of files, each once, in order. notes: sentences for the user on what was left out."""

    paths: tuple[str, ...]
    notes: tuple[str, ...]


def paths_in(stream: BinaryIO, *, null: bool = False) -> list[str]:
    """Paths on a stream, one a line, without empty ones; null: with NUL characters in place of line ends."""
    content = stream.read()
    parts = content.split(b"\0") if null else [line.removesuffix(b"\r") for line in content.split(b"\n")]
    return [os.fsdecode(part) for part in parts if part]


def image_files(places: Iterable[str]) -> ImageFiles:
    """The files at those places: a file whatever its name, a folder with all images below it, by name.

    Hidden files, and in a folder files that are no images, are left out. A file that is named twice counts once.
    Raises ValueError, one line, for a folder that holds no image or cannot be listed, and where there is nothing.
    """
    found: dict[str, str] = {}  # by absolute path
    strays: list[str] = []
    count = 0
    for place in places:
        named, others = _below(place) if Path(place).is_dir() else ([place], [])
        strays += others
        count += len(named)
        for path in named:
            found.setdefault(os.path.abspath(path), path)  # noqa: PTH100  # links stay
    if not found:
        raise ValueError("IMAGES: no file is named")
    notes = []
    if strays:
        notes.append(f"files that are no images are left out: {len(strays):,}, the first {strays[0]}")
    if twice := count - len(found):
        notes.append(f"files that are named more than once count once: {twice:,} names are left out")
    return ImageFiles(tuple(found.values()), tuple(notes))


def _below(folder: str) -> tuple[list[str], list[str]]:
    """The images below a folder, and the other files. Raises ValueError where there is no image."""
    try:
        paths = [str(path) for path in tree.files_below(Path(folder))]
    except ValueError as error:
        raise ValueError(str(error).replace("data: ", "IMAGES: ", 1)) from None
    images, strays = images_of(_TREE, {folder: paths})
    if not images[folder]:
        raise ValueError(f"IMAGES: {folder} holds no image")
    return images[folder], strays


def decode(path: str) -> Pixels:
    """The image in a file, HWC, as the folder data set reads it. Raises ValueError, with its path."""
    try:
        return pixels(_TREE, path)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("data: ")) from None
