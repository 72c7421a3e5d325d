"""Protocol of an accuracy benchmark, read from YAML: what all runs share, and the rows that differ.

A cell is a row with a seed: one training, evaluated. A table compares rows with its baseline. A row that stands in
several tables is trained once: its keys stand in the first one, and the others name it with nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine import config
from engine.attacks import table as attacks
from engine.common import yaml_text
from engine.common.files import regular_file
from engine.common.lookup import look_up
from engine.config import RunConfig, recipes
from engine.config.sections import Tree
from engine.runs.assemble import method_of, teacher_sections
from engine.runs.run_directory import first_fault

PROTOCOLS = Path(__file__).resolve().parents[2] / "protocols"
SECTIONS = ("teacher", "teacher_st")
"""Parts of a configuration that a protocol's teachers may be of."""
QUICK_KEYS: Tree = {
    "dataset": "digits",
    "model": "resnet8",
    "epochs": 2,
    "limit_train": 100,
    "limit_test": 40,
    "amp": False,
    "attack": {"num_steps": 2},
    "eval": {"attack": "pgd2", "probe_size": 20},
}
"""Keys of every training of a quick protocol, which win over its own."""
_QUICK_IMAGES = 20
_QUICK = {"aa": "aa-fast"}  # instead of attacks that take a minute on a few images too
_NAME = re.compile(r"[a-z0-9]+(?:[-.][a-z0-9]+)*")
_PLACE = ("out", "device", *SECTIONS)  # keys that are no part of a cell's settings: of teachers the weights are
_OWN = ("seed", "data", *_PLACE)  # keys that are no row's to choose


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ProtocolTable(_Part):
    """Rows beside a baseline. attacks: test images by attack. rows: keys that differ, None of another table's row.

    recipes: those with the paper's numbers, by row; all of one table of the paper with the same teacher.
    """

    title: str
    baseline: str
    attacks: dict[str, int] = Field(min_length=1)
    rows: dict[str, dict[str, Any] | None] = Field(min_length=1)
    recipes: dict[str, str] = Field(default_factory=dict)


class AccuracyProtocol(_Part):
    """Settings that all cells share, and the tables.

    images: remark on them. threads: of torch on a CPU: sums depend on them. seeds: of the students. common:
    keys of every training, those of teachers too. teachers: by section, their own keys. evaluation_seed: of the
    attacks.
    """

    name: str = ""
    title: str
    images: str = ""
    threads: int = Field(ge=1)
    seeds: list[int] = Field(min_length=1)
    evaluation_seed: int = Field(default=0, ge=0)
    common: dict[str, Any]
    teachers: dict[str, dict[str, Any]]
    tables: dict[str, ProtocolTable] = Field(min_length=1)

    def quick(self) -> AccuracyProtocol:
        """The same rows at tiny sizes and of one seed, to see that everything works; its figures mean nothing."""
        tables = {
            title: table.model_copy(
                update={
                    "attacks": dict.fromkeys((_QUICK.get(name, name) for name in table.attacks), _QUICK_IMAGES),
                    "rows": {row: keys and config.merge(keys, QUICK_KEYS) for row, keys in table.rows.items()},
                }
            )
            for title, table in self.tables.items()
        }
        teachers = {section: config.merge(keys, QUICK_KEYS) for section, keys in self.teachers.items()}
        told = {
            "name": f"{self.name}-quick",
            "title": f"Tiny sizes, of which no figure means anything: {self.title}",
        }
        return self.model_copy(
            update={**told, "images": "", "seeds": self.seeds[:1], "teachers": teachers, "tables": tables}
        )

    def rows(self) -> dict[str, Tree]:
        """Keys of every row, by name."""
        return {
            name: keys for table in self.tables.values() for name, keys in table.rows.items() if keys is not None
        }

    def attacks_of(self, row: str) -> dict[str, int]:
        """Test images by attack, of all tables that have the row: of each attack the most that one asks for."""
        found: dict[str, int] = {}
        for table in self.tables.values():
            if row in table.rows:
                for attack, images in table.attacks.items():
                    found[attack] = max(images, found.get(attack, 0))
        return found

    def config_of(self, row: str, seed: int) -> RunConfig:
        """Configuration of a cell, without teachers and place. Raises ValueError for keys that cannot be."""
        return config.load(self.common, self.rows()[row], {"seed": seed})

    def teacher_config(self, section: str) -> RunConfig:
        """Configuration of the training of a teacher, without a place."""
        return config.load(self.common, self.teachers[section])


@dataclass(frozen=True)
class Cell:
    """One training, and the settings that decide its numbers. teachers: SHA-256 of their weights, by section."""

    row: str
    seed: int
    attacks: Mapping[str, int]
    keys: Mapping[str, Any]
    teachers: Mapping[str, str]
    threads: int
    evaluation_seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.row}-seed{self.seed}"

    @property
    def settings(self) -> str:
        """Digest of all that is chosen for its training; attacks may be added."""
        return digest(self.keys, self.teachers, self.threads)


def cells(
    protocol: AccuracyProtocol, teachers: Mapping[str, str], tables: Sequence[str] | None = None
) -> Iterator[Cell]:
    """Cells of these tables, None for all, with all rows of a seed before the next: so they can be compared early.

    teachers: SHA-256 of the weights of the protocol's, by section; a cell has those that its method reads.
    Raises ValueError for a table that the protocol does not have.
    """
    seen = set()
    for name in protocol.tables if tables is None else tables:
        for seed in protocol.seeds:
            for row in look_up("table", name, protocol.tables).rows:
                if (row, seed) not in seen:
                    seen.add((row, seed))
                    yield cell_of(protocol, row, seed, teachers)


def cell_of(protocol: AccuracyProtocol, row: str, seed: int, teachers: Mapping[str, str]) -> Cell:
    """The cell of a row and a seed. Raises ValueError for a row that the protocol does not have."""
    look_up("row", row, protocol.rows())
    keys = protocol.config_of(row, seed)
    return Cell(
        row,
        seed,
        protocol.attacks_of(row),
        chosen_keys(keys),
        {section: teachers[section] for section in teacher_sections(keys)},
        protocol.threads,
        protocol.evaluation_seed,
    )


def digest(keys: Mapping[str, Any], teachers: Mapping[str, str], threads: int) -> str:
    """Digest of what is chosen for a training."""
    chosen = {"keys": keys, "teachers": teachers, "threads": threads}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]


def chosen_keys(keys: RunConfig) -> Tree:
    """The keys of a training but those of its place, device and teachers."""
    return {name: value for name, value in keys.tree().items() if name not in _PLACE}


def path_of(name: str) -> Path:
    """File of a protocol: one in `PROTOCOLS`, or the path itself. Raises ValueError for an unknown name."""
    known = {path.stem: path for path in sorted(PROTOCOLS.glob("*.yaml"))}
    return Path(name) if name.endswith(".yaml") else look_up("protocol", name, known)


def read(name: str, *, quick: bool = False) -> AccuracyProtocol:
    """The protocol of that name in `PROTOCOLS`, or in a file. quick: in `AccuracyProtocol.quick`'s sizes.

    Raises ValueError, one line, for what is no protocol, and for keys that a training refuses.
    """
    path = path_of(name)
    try:
        content = yaml_text.read(regular_file(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"protocol: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"protocol: {path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"protocol: {path} has no keys")
    try:
        found = AccuracyProtocol.model_validate(content | {"name": path.stem})
    except ValidationError as error:
        raise ValueError(f"protocol: {path}: {first_fault(error)}") from None
    try:
        _check(found)
    except ValueError as error:
        raise ValueError(f"protocol: {path}: {error}") from None
    return found.quick() if quick else found


def _check(protocol: AccuracyProtocol) -> None:
    """Raise ValueError for what no cell could be made of."""
    rows: set[str] = set()
    for name, table in protocol.tables.items():
        here = f"tables.{name}"
        for row, keys in table.rows.items():
            if not _NAME.fullmatch(row):
                raise ValueError(f"{here}: {row!r} is no name of a row: small letters, digits, - and .")
            if (keys is None) != (row in rows):
                missing = "has no keys" if keys is None else "has keys in another table already"
                raise ValueError(f"{here}: row {row!r} {missing}")
            rows.add(row)
        look_up(f"{here}.baseline", table.baseline, table.rows)
        for attack, images in table.attacks.items():
            attacks.resolve([attack])
            if images < 1:
                raise ValueError(f"{here}.attacks.{attack}: at least 1 image is expected, got {images}")
        for row, recipe in table.recipes.items():
            look_up(f"{here}.recipes", row, table.rows)
            recipes.paper_row(recipe)
        if table.recipes and table.baseline not in table.recipes:
            raise ValueError(f"{here}.recipes: the baseline {table.baseline!r} needs one too")
    if len(set(protocol.seeds)) < len(protocol.seeds):
        raise ValueError(f"seeds: each once, got {protocol.seeds}")
    for section in protocol.teachers:
        look_up("teachers", section, dict.fromkeys(SECTIONS))
        method_of(protocol.teacher_config(section))
    for name, keys in {"common": protocol.common, **protocol.rows()}.items():
        if own := [key for key in _OWN if key in keys]:
            raise ValueError(f"{name}: {own[0]!r} is the protocol's to decide")
    for row in protocol.rows():
        for section in teacher_sections(protocol.config_of(row, protocol.seeds[0])):
            if section not in protocol.teachers:
                raise ValueError(f"teachers: row {row!r} reads {section!r}, which is not there")
