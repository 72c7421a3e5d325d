"""The test split of images that come without one: a part of each class, by the names of the files alone."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.common.files import write_json

TEST_SPLIT = "test_split.json"
"""The file of a run directory that names the test images, where a rule chose them."""

FRACTION = 0.2
_SEED = 0  # of the data, whatever the seed of a run: a teacher must not have seen its student's test images
_RULE = (
    "of the n images of a class, the max(1, round(fraction * n)) whose SHA-256 of 'SEED/CLASS/FILE', in UTF-8 and "
    "NFC, is smallest"
)


@dataclass(frozen=True)
class HeldOut:
    """Test images that were chosen by the rule. names: "CLASS/FILE"; total: images with those that remain."""

    names: tuple[str, ...]
    total: int

    def write(self, path: Path) -> None:
        """Write the names, and the rule that chose them, as JSON."""
        known = {"rule": _RULE, "fraction": FRACTION, "seed": _SEED, "of_images": self.total}
        write_json(path, known | {"test": list(self.names)})

    def difference(self, path: Path) -> str:
        """A warning where a training that wrote that file may have seen some of these images, else nothing."""
        try:
            known: Any = json.loads(path.read_bytes())
            new = set(self.names) - set(known["test"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        if not new:
            return ""
        return (
            f"{len(new):,} of {len(self.names):,} test images were no test images of the training, the first: "
            f"{min(new)}; the folder has changed since, and the network may have been trained on them ({path})"
        )


def portable(name: str) -> str:
    """A name as every operating system spells it: macOS stores letters and accents apart (NFD)."""
    return unicodedata.normalize("NFC", name)


def hold_out(by_class: Mapping[str, Sequence[str]], where: str) -> set[str]:
    """The names, of files by class, that are for testing. Raises ValueError where a class has a single image."""
    chosen: set[str] = set()
    for class_name, names in by_class.items():
        if len(names) < 2:
            raise ValueError(
                f"data: {where} has no test images, and its class {class_name!r} has a single image, too few to "
                f"hold one out"
            )
        ranked = sorted(names, key=partial(_digest, class_name))
        chosen.update(ranked[: max(1, round(FRACTION * len(names)))])
    return chosen


def label_of(class_name: str, name: str) -> str:
    """The class and the own name of a file, CLASS/FILE, in whatever folder of the class it lies."""
    return f"{class_name}/{portable(name.rpartition('/')[2])}"


def _digest(class_name: str, name: str) -> bytes:
    return hashlib.sha256(f"{_SEED}/{label_of(class_name, name)}".encode(errors="surrogateescape")).digest()
