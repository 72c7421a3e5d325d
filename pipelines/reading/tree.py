"""Folders and zip archives as trees of names, checked before anything is read of them."""

from __future__ import annotations

import errno
import os
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PureWindowsPath

from engine.common.files import regular_file

_MOST_BYTES_OF_IMAGE = 1 << 28
_TAR_MARK = (257, b"ustar")
_MARKS = {  # place and bytes in a file -> the kind of archive
    (0, b"7z\xbc\xaf\x27\x1c"): "7z",
    (0, b"Rar!"): "rar",
    (0, b"\x1f\x8b"): "gzip",
    (0, b"BZh"): "bzip2",
    (0, b"\xfd7zXZ"): "xz",
    (0, b"\x28\xb5\x2f\xfd"): "zstd",
    _TAR_MARK: "tar",
}
_ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True, eq=False)
class Tree:
    """A folder or a zip archive as the visible names below it; the name of a folder ends in "/".

    matching: names that match a pattern, of a folder that was not listed to its depths. root: of a folder.
    """

    names: list[str]
    label: str  # stands before a name in a message
    read_bytes: Callable[[str], bytes]  # raises OSError
    prefix: str = ""
    matching: Callable[[str], Iterable[str]] | None = None
    root: Path | None = None

    def under(self, prefix: str) -> Tree:
        """The part of the tree below a folder "a/"."""
        below = [name.removeprefix(prefix) for name in self.names if name.startswith(prefix) and name != prefix]
        return replace(self, names=below, prefix=self.prefix + prefix)

    def listed(self, *patterns: str) -> Tree:
        """The tree with the names that match, too, each part of a pattern a name or "*"; an archive has them all.

        Raises ValueError where a folder cannot be listed.
        """
        if self.matching is None:
            return self
        more = {
            name.removeprefix(self.prefix) for pattern in patterns for name in self.matching(self.prefix + pattern)
        }
        return replace(self, names=_visible({*self.names, *more}))

    @cached_property
    def tops(self) -> set[str]:
        """The folders at the top."""
        return {name.partition("/")[0] for name in self.names if "/" in name}

    @cached_property
    def packed(self) -> list[str]:
        """The archives at the top."""
        return [name for name in self.names if "/" not in name and name.lower().endswith(_ARCHIVES)]

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises OSError, with its name, where it cannot be read."""
        return self.read_bytes(self.prefix + name)

    def where(self, name: str = "") -> str:
        """Name of a file, or of the tree itself, in a message."""
        return f"{self.label}{self.prefix}{name}".rstrip("/: ")


def directory(root: Path, *patterns: str) -> Tree:
    """The visible files and folders of a folder that match the patterns, as `Tree.listed` gives them."""
    tree = Tree(
        [],
        f"{root}/",
        lambda name: regular_file(root / name, _MOST_BYTES_OF_IMAGE).read_bytes(),
        matching=lambda pattern: _matching(root, pattern.split("/")),
        root=root,
    )
    return tree.listed(*patterns)


def files() -> Tree:
    """Files by their paths, wherever they lie: a tree that lists nothing."""
    return Tree([], "", lambda name: regular_file(Path(name), _MOST_BYTES_OF_IMAGE).read_bytes())


def files_below(root: Path) -> list[Path]:
    """Visible files below a folder at any depth, by name; what links lead to once more is listed once.

    Raises ValueError where a folder cannot be listed.
    """
    found: list[Path] = []
    waiting, known = [root], set()
    while waiting:
        path = waiting.pop()
        if not path.is_dir():
            found.append(path)
            continue
        status = path.stat()
        if (status.st_dev, status.st_ino) in known:
            continue
        known.add((status.st_dev, status.st_ino))
        try:
            inside = [below for below in path.iterdir() if not _is_hidden(below.name)]
        except OSError as error:
            raise ValueError(f"data: cannot read {path}: {error.strerror}") from None
        waiting += sorted(inside, reverse=True)
    return found


def _matching(root: Path, parts: list[str], prefix: str = "") -> Iterator[str]:
    """Names below the folder `prefix` that match; the name of a folder ends in "/"."""
    if len(parts) > 1 and parts[0] != "*":
        yield from _matching(root, parts[1:], f"{prefix}{parts[0]}/")
        return
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

    Names with backslashes, as some programs of Windows write them, are read as names with slashes.
    Raises ValueError where it is no zip archive or an entry has an absolute path or "..".
    """
    try:
        file = stack.enter_context(zipfile.ZipFile(regular_file(path)))
    except OSError as error:
        raise ValueError(f"data: {path} is not a readable zip archive ({error.strerror or error})") from None
    except Exception as error:  # a damaged one makes zipfile raise nearly anything
        if kind := _kind_of_archive(path):
            raise ValueError(f"data: {path} is a {kind} archive; unpack it and give its folder") from None
        raise ValueError(f"data: {path} is not a readable zip archive ({error})") from None
    stored = {}
    for name in file.namelist():
        windows = PureWindowsPath(name)  # knows "/", "\\" and drives
        if windows.anchor or ".." in windows.parts:
            raise ValueError(f"data: {path} has an entry that leads out of it: {name!r}")
        stored[name.replace("\\", "/")] = name
    lock = threading.Lock()  # a ZipFile counts its open readers without one

    label = f"{path}:"

    def read(name: str) -> bytes:
        with lock:
            size = file.getinfo(stored[name]).file_size  # of which zipfile unpacks no more than it says
            if size > _MOST_BYTES_OF_IMAGE:
                reason = f"{size:,} bytes unpacked, and {_MOST_BYTES_OF_IMAGE:,} are the most"
                raise OSError(errno.EFBIG, reason, f"{label}{name}")
            try:
                return file.read(stored[name])
            except OSError:
                raise
            except Exception as error:  # a damaged one makes zipfile raise nearly anything
                raise OSError(errno.EINVAL, str(error), f"{label}{name}") from None

    return Tree(_visible(stored), label, read)


def _kind_of_archive(path: Path) -> str:
    """Kind of an archive that is no zip, by its content; empty for anything else."""
    with path.open("rb") as file:
        head = file.read(_TAR_MARK[0] + len(_TAR_MARK[1]))
    return next((kind for (at, mark), kind in _MARKS.items() if head[at:].startswith(mark)), "")


def _visible(names: Iterable[str]) -> list[str]:
    """Sorted names without those that systems leave behind."""
    return sorted(name for name in set(names) if not any(map(_is_hidden, name.split("/"))))


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part in ("__MACOSX", "Thumbs.db")
