"""Facts of a run that a tool is told, and the methods that the adapter of each tool has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

Row = Mapping[str, Any]
Status = Literal["finished", "failed", "killed"]

PROJECT = "engine"
"""Project, or experiment, where the tool's own environment variable names none."""
_ESSENTIALS = (
    "engine", "commit", "command", "started", "versions", "hardware", "precision", "processes", "data", "plugins",
)  # fmt: skip


@dataclass(frozen=True)
class RunFacts:
    """A run: its directory, complete configuration (nested, and flat by KEYS' names), and record of provenance."""

    path: Path
    config: Mapping[str, Any]
    parameters: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @property
    def group(self) -> str | None:
        """Name of the directory around it, where that is a group of seeds, or the run whose teacher this is."""
        path = self.path.resolve()
        is_part = (path.parent / "config.yaml").exists() or path.name.startswith("seed-")
        return path.parent.name if is_part else None

    @property
    def name(self) -> str:
        """Name of the directory, within its group as GROUP/NAME."""
        own = self.path.resolve().name
        return own if self.group is None else f"{self.group}/{own}"

    @property
    def essentials(self) -> dict[str, Any]:
        """Versions, commit, hardware, precision and data of this session."""
        return {key: self.provenance[key] for key in _ESSENTIALS if key in self.provenance}


@dataclass(frozen=True)
class History:
    """A run and its rows so far.

    rows: reads metrics.jsonl. kept: how many rows it has as the session begins. withdrawn: those that it had after
    the checkpoint that is gone on from. summary: reads summary.json.
    """

    facts: RunFacts
    rows: Callable[[], Iterable[Row]]
    kept: int = 0
    withdrawn: Sequence[Row] = ()
    summary: Callable[[], Mapping[str, Any] | None] = lambda: None


class OpenedRun(NamedTuple):
    """A run in a tool: its id there, how many rows the store has (None: it does not say), and where it is seen."""

    id: str
    rows: int | None
    where: str


class Tool(Protocol):
    """Adapter of a tool. Its methods are called by one thread, one after the other; what they raise ends it."""

    def place(self, facts: RunFacts) -> str:
        """Return the store and project: a run is gone on with in the same one only."""

    def open(self, facts: RunFacts, name: str, known: str | None) -> OpenedRun:
        """Begin a run of that name, or go on with the one of that id."""

    def log(self, row: Row, number: int) -> None:
        """Add a row, the number-th of metrics.jsonl, counted from 1."""

    def close(self, numbers: Mapping[str, float], step: int, status: Status) -> None:
        """End the run with those results, after so many steps, and wait until all is written."""


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested dicts by their dotted names."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result
