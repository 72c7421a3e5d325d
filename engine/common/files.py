"""Atomic writes, files that can be read without waiting, the cache folder, and the hash of the code."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import secrets
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HALF_WRITTEN = ".tmp"
_CONFIG = "config.yaml"  # in every run directory
_SEED = re.compile(r"seed-(0|[1-9][0-9]*)")
# Only outside of strings does a line break stand in JSON.
_LINES_OF_INTEGERS = re.compile(r"\[\n\s*(?:(?:-?[0-9]+|null),\n\s*)*(?:-?[0-9]+|null)\n\s*\]")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context with a path beside the given one; at its end that file is flushed and renamed over the given one.

    After an exception it is removed, and the old file stays. Raises OSError as `regular_file` does.
    """
    if path.exists():
        regular_file(path)  # a device or a FIFO must not be replaced
    with _beside(path) as beside:
        yield beside
        _flush(beside)
        beside.replace(path)
    _flush_folder(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the content of a file, or leave the old one whole: write beside it, flush to the disk, rename."""
    with replacing(path) as beside:
        beside.write_bytes(content)


def write_json(path: Path, value: object) -> None:
    """Write readable JSON, atomically: a line for each entry, but one for a whole list of integers."""
    text = _LINES_OF_INTEGERS.sub(_on_one_line, json.dumps(value, indent=2))
    write_atomically(path, (text + "\n").encode())


def _on_one_line(lines: re.Match[str]) -> str:
    return re.sub(r"\s+", " ", lines[0]).replace("[ ", "[").replace(" ]", "]")


def create(path: Path, content: bytes) -> None:
    """Write a new file, whole or not at all. Raises FileExistsError where there is one, or comes one meanwhile."""
    with _beside(path) as beside:
        beside.write_bytes(content)
        _flush(beside)
        try:
            os.link(beside, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with path.open("xb") as file:
                file.write(content)
    _flush_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove half-written files of processes that were killed; files that are being written stay."""
    for path in folder.glob(f".*{_HALF_WRITTEN}"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A new file beside a path, with a name of its own, removed at the end if it is still there.

    It is locked meanwhile, by which `remove_leftovers` knows that its process lives, in whatever container.
    """
    while True:
        beside = path.with_name(f".{secrets.token_hex(8)}{_HALF_WRITTEN}")
        with beside.open("xb") as held:
            with contextlib.suppress(OSError):  # a file system without locks: no leftover is removed there
                fcntl.flock(held, fcntl.LOCK_EX)
            if not os.fstat(held.fileno()).st_nlink:  # removed as a leftover before it was locked
                continue
            try:
                yield beside
            finally:
                beside.unlink(missing_ok=True)
        return


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Flush a folder, so that a new name in it survives a power failure."""
    if os.name == "posix":
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def expand_user(argument: str, path: str | Path) -> Path:
    """The path with ~ and ~user replaced. Raises ValueError, naming the argument, where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{argument}: {path} begins with a user who has no home here") from None


def regular_file(path: Path, most: int | None = None) -> Path:
    """The path itself, if it is of a regular file, which is read without waiting, of at most so many bytes.

    Raises OSError, with the path, for a FIFO, a device, a socket or a folder, and for a larger file.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "a FIFO, a device or a socket, and no file", str(path))
    if most is not None and status.st_size > most:
        raise OSError(errno.EFBIG, f"{status.st_size:,} bytes, and {most:,} are the most", str(path))
    return path


def checkpoint_of(name: str) -> Path:
    """A file, or the best checkpoint of a run directory. Raises ValueError where that cannot be looked up."""
    try:
        return Path(name) / "best.pt" if Path(name).is_dir() else Path(name)
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None


def seeds_in(folder: Path) -> dict[int, Path]:
    """Run directories of a group, seed-0, seed-1, ..., by seed in ascending order; none where it is no group.

    A run directory itself is no group, whatever is in it; nor is what cannot be looked up: who opens it tells why.
    """
    try:
        if not folder.is_dir() or (folder / _CONFIG).is_file():
            return {}
        found = {int(name[1]): path for path in folder.iterdir() if (name := _SEED.fullmatch(path.name))}
        return {seed: found[seed] for seed in sorted(found) if (found[seed] / _CONFIG).is_file()}
    except OSError:
        return {}


def checkpoints_of(name: str) -> list[Path]:
    """A file, the best checkpoint of a run directory, or those of a group's runs.

    Raises ValueError where that cannot be looked up, and where a run of the group has none yet.
    """
    found = [checkpoint_of(str(path)) for path in seeds_in(Path(name)).values()]
    if absent := [path for path in found if not path.exists()]:
        raise ValueError(f"{name}: {absent[0]} is not there yet: engine train --resume {shlex.quote(name)}")
    return found or [checkpoint_of(name)]


def cache_dir() -> Path:
    """$ENGINE_CACHE, else iad-engine in $XDG_CACHE_HOME or ~/.cache."""
    if given := os.environ.get("ENGINE_CACHE"):
        return expand_user("ENGINE_CACHE", given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iad-engine"


@functools.cache
def code_hash() -> str:
    """SHA-256 of the files that run: the version of an edited source tree does not tell."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    paths = {path for room in (root, root / "kernels", root / "pipelines") for path in room.rglob("*")}
    for path in sorted(path for path in paths if path.suffix in (".py", ".so")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
