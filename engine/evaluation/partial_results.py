"""Results of single batches on the disk, from which a stopped evaluation goes on."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors.torch
from torch import Tensor

from engine.common.stopping import RunFailed

_TRIES = 100
_LENGTH, _DIGEST = 8, 32
"""Bytes before a record of tensors: its length, and its SHA-256."""


class Measured(NamedTuple):
    """One batch under one attack.

    survived: a digit for each image, the parts of the attack it survived. predicted: the classes of the attacked
    images, numbers between spaces. excess: distance of the farthest image from the ball and from [0, 1].
    entries, zeros, not_finite: of the gradients. masked: images that kept their class although their gradient was
    mostly zero. flags: a bit for each of AutoAttack's checks.
    """

    survived: str
    predicted: str
    excess: float
    seconds: float
    entries: int
    zeros: int
    not_finite: int
    masked: int
    flags: int


class PartialResults:
    """Notes of several attacks: of each a folder, named by all that decides its numbers, with files that grow.

    Every process of an evaluation writes a file of its own. The main one holds the folders: while it does, no
    other evaluation of the same removes them.
    """

    def __init__(self, root: Path, identities: Mapping[str, str], rank: int = 0) -> None:
        """identities: of each attack, a hash of all that decides its numbers."""
        self._root = root
        self._folders = {attack: root / identity[:16] for attack, identity in identities.items()}
        self._name = f"{rank}-{secrets.token_hex(8)}"
        self._files: dict[Path, BinaryIO] = {}
        self._held: dict[Path, int] = {}

    def hold(self) -> None:
        """Make the folders, and keep others from removing them. Raises OSError where they cannot be made."""
        for folder in self._folders.values():
            if folder not in self._held:
                self._held[folder] = _held(folder)

    def others(self) -> int:
        """Evaluations with other settings that have notes here: stopped, or at work."""
        mine = {folder.name for folder in self._folders.values()}
        return sum(path.name not in mine for path in self._root.iterdir())

    def known(self, attack: str) -> dict[int, Measured]:
        """Results of all processes, by number of the batch. Notes of another form are left out."""
        whole = [note for note in self.notes(attack) if note.keys() == {"batch", *Measured._fields}]
        return {note.pop("batch"): Measured(**note) for note in whole}

    def notes(self, attack: str) -> list[dict[str, Any]]:
        """All notes of all processes. Lines that were cut off are left out."""
        found = []
        for path in sorted(self._folders[attack].glob("*.jsonl")):
            for line in path.read_bytes().split(b"\n") if path.is_file() else ():
                if (note := read_note(line)) is not None:
                    found.append(note)
        return found

    def add(self, attack: str, batch: int, measured: Measured) -> None:
        """Note a batch, as `add_note` does."""
        self.add_note(attack, {"batch": batch, **measured._asdict()})

    def add_note(self, attack: str, note: Mapping[str, Any]) -> None:
        """Put a note on the disk: it is there when this returns. Raises RunFailed where that cannot be."""
        self._append(self._folders[attack] / f"{self._name}.jsonl", note_of(note) + b"\n")

    def add_tensors(self, attack: str, tensors: Mapping[str, Tensor]) -> None:
        """Put a record of tensors on the disk, as `add_note` does."""
        content = safetensors.torch.save(dict(tensors))
        before = len(content).to_bytes(_LENGTH, "little") + hashlib.sha256(content).digest()
        self._append(self._folders[attack] / f"{self._name}.tensors", before + content)

    def tensors(self, attack: str) -> Iterator[dict[str, Tensor]]:
        """All records of tensors of all processes. One that was cut off or changed is left out."""
        for path in sorted(self._folders[attack].glob("*.tensors")):
            if path.is_file():
                yield from _records(path)

    def _append(self, path: Path, content: bytes) -> None:
        """Put bytes at the end of a file of this process: they are on the disk when this returns."""
        try:
            if path not in self._files:
                self._files[path] = path.open("ab")
            file = self._files[path]
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise RunFailed(
                f"{path.parent}: {error.strerror}; what was measured is kept: the same command goes on"
            ) from None

    def release(self, *, done: bool) -> None:
        """Let go. done: the results are safe, and so the notes are removed where no other evaluation uses them."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk, which `add` has told of
                file.close()
        for folder, descriptor in self._held.items():
            with contextlib.suppress(OSError):  # another evaluation is at work in it, or there are notes in it
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if done:
                    shutil.rmtree(folder)
                else:
                    folder.rmdir()
            os.close(descriptor)
        with contextlib.suppress(OSError):
            self._root.rmdir()
        self._files, self._held = {}, {}


def _held(folder: Path) -> int:
    """The descriptor of a folder, made where it is not there, that is locked against its removal."""
    for _ in range(_TRIES):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another evaluation has just removed it
            continue
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        os.close(descriptor)
    raise FileNotFoundError(2, os.strerror(2), str(folder))


def _records(path: Path) -> Iterator[dict[str, Tensor]]:
    """The whole records of a file."""
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size
        while left > _LENGTH + _DIGEST:
            length = int.from_bytes(file.read(_LENGTH), "little")
            digest = file.read(_DIGEST)
            left -= _LENGTH + _DIGEST + length
            if left < 0:
                return
            content = file.read(length)
            if hashlib.sha256(content).digest() == digest:
                yield safetensors.torch.load(content)


def note_of(note: Mapping[str, Any]) -> bytes:
    """The line of a note: a SHA-256, and the JSON that it is of."""
    text = json.dumps(note).encode()
    return _sha256(text) + b" " + text


def read_note(line: bytes) -> dict[str, Any] | None:
    """The note of a line; None where that was cut off or changed."""
    digest, _, text = line.partition(b" ")
    if digest != _sha256(text):
        return None
    note: dict[str, Any] = json.loads(text)
    return note


def _sha256(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()
