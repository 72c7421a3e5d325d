"""What an evaluation has measured so far, batch by batch, so that one that was stopped does not begin again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple


class Measured(NamedTuple):
    """One batch under one attack: images classified correctly, the farthest any lies outside, seconds it took."""

    correct: int
    excess: float
    seconds: float


class Ledger:
    """One growing file per process, in a folder that its owner makes, and removes when the evaluation is over.

    identity: what decides the numbers; a ledger of another identity is forgotten.
    """

    def __init__(self, folder: Path, identity: str, rank: int = 0) -> None:
        self._folder, self._identity = folder, identity
        self._file = folder / f"process-{rank}.jsonl"

    def known(self, attack: str) -> dict[int, Measured]:
        """What any process measured, by the batch's number. What a killed process wrote half is left out."""
        found: dict[int, Measured] = {}
        for path in sorted(self._folder.glob("process-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if entry["identity"] == self._identity and entry["attack"] == attack:
                    found[entry["batch"]] = Measured(entry["correct"], entry["excess"], entry["seconds"])
        return found

    def add(self, attack: str, batch: int, measured: Measured) -> None:
        """Remember a batch: on the disk when this returns."""
        entry = {"identity": self._identity, "attack": attack, "batch": batch, **measured._asdict()}
        with self._file.open("a+b") as file:
            if file.tell() and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n":
                file.write(b"\n")  # a killed process left half a line
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
