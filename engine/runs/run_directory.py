"""The run directory: its files, and how they are written so that nothing is lost.

config.yaml, provenance.json, test_split.json, metrics.jsonl, tensorboard/, last.pt, best.pt, good.pt,
summary.json, loss.png, accuracy.png, reliability.png. Every file but the two append-only logs is written beside
its place and renamed over it.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from engine.common import yaml_text
from engine.common.files import create, remove_leftovers, seeds_in, write_atomically
from engine.common.lookup import OBJECT
from engine.common.stopping import RunFailed
from engine.config import RunConfig, changes, differences, differing, read_file
from engine.config import load as load_config
from engine.pipelines.reading.held_out import TEST_SPLIT

# What a folder may hold before a run writes anything: its configuration, and what its launcher printed.
_BEFORE_IT_BEGINS = {"config.yaml", "logs", "log.txt"}


def _text(config: RunConfig) -> bytes:
    """config.yaml, without its place: the file can be given to --config as it is."""
    return yaml_text.write(config.tree() | {"out": None}).encode()


def new_folder(config: RunConfig) -> Path:
    """A folder below runs/ named after a configuration and this second, numbered where others have begun in it.

    Raises OSError where it cannot be made.
    """
    parent, name = Path("runs"), f"{config.method}-{config.dataset}-{config.model}".replace(OBJECT, "")
    parent.mkdir(parents=True, exist_ok=True)
    stamped = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        path = parent / (stamped if number == 1 else f"{stamped}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            break
    return path


@contextlib.contextmanager
def usable(argument: str, path: Path) -> Iterator[None]:
    """Raise what the file system refuses inside as a ValueError of one line: permissions, too long names, ..."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{argument}: cannot use {error.filename or path}: {error.strerror or error}") from None


class _Epoch(BaseModel):
    epoch: int
    natural_accuracy: float
    robust_accuracy: float
    measured_on: str


class _Result(BaseModel):
    accuracy: float
    n: int
    description: str


class _Summary(BaseModel):
    """Keys that are read of a summary.json."""

    selected_on: str
    best: _Epoch
    last: _Epoch
    test_of_best: dict[str, _Result] = {}
    test_of_last: dict[str, _Result] = {}


class _Formats(BaseModel):
    training: str


class _Provenance(BaseModel):
    """Keys that are read of a provenance.json."""

    precision: _Formats
    earlier_sessions: list[dict[str, Any]] = []


def first_fault(error: ValidationError) -> str:
    """The first fault of a content of another shape, with its place."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{f'{where}: ' if where else ''}{first['msg']}"


def _read_json(path: Path, shape: type[BaseModel]) -> dict[str, Any] | None:
    """A file that a run wrote, None where there is none. Raises ValueError where it is of another shape."""
    with usable("run directory", path):
        if not path.exists():
            return None
        text = path.read_bytes()
    try:
        shape.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{path} is damaged: {first_fault(error)}") from None
    found: dict[str, Any] = json.loads(text)
    return found


@dataclass(frozen=True)
class PreparedRun:
    """A run to be trained, found or made.

    changes: keys that are given anew, see `engine.runs.resuming`. is_new: the call that returns it has made its
    config.yaml. made_folder: and its folder.
    """

    run: RunDir
    changes: Mapping[str, Any] = field(default_factory=dict)
    is_new: bool = False
    made_folder: bool = False

    @contextlib.contextmanager
    def removed_on_failure(self) -> Iterator[None]:
        """Call `remove_if_unused` where the work inside fails."""
        try:
            yield
        except (ValueError, RunFailed):
            self.remove_if_unused()
            raise

    @property
    def is_unused(self) -> bool:
        """True while nothing was written by a training."""
        return {path.name for path in self.run.path.iterdir()} <= _BEFORE_IT_BEGINS

    def remove_if_unused(self, *files: str) -> None:
        """Remove a new directory in which nothing was written yet: the mended command can be given again.

        Not where another process trains it. files: further ones that count as nothing, and are removed too.
        """
        if not self.is_new:
            return
        with contextlib.suppress(ValueError, OSError), self.run.locked():
            if self.is_unused:
                for name in (self.run.config.name, *files):
                    (self.run.path / name).unlink(missing_ok=True)
                if self.made_folder:
                    self.run.path.rmdir()


class RunDir:
    """Paths of a run directory and its append-only log of rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.provenance = path / "provenance.json"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.last = path / "last.pt"
        self.best = path / "best.pt"
        self.good = path / "good.pt"
        self.summary = path / "summary.json"
        self.snapshots = path / "snapshots"
        self.test_split = path / TEST_SPLIT

    @classmethod
    def create(cls, config: RunConfig) -> PreparedRun:
        """A new run directory with its config.yaml. Raises ValueError where the place is taken."""
        path = Path("runs" if config.out is None else config.out)
        with usable("--out", path):
            made_folder = not path.exists()
            if config.out is None:
                path, made_folder = new_folder(config), True
            path.mkdir(parents=True, exist_ok=True)
            if seeds_in(path):
                raise ValueError(f"--out {path} holds a group of seeds; choose another place for a single run")
            run = cls(path)
            try:
                create(run.config, _text(config))
            except FileExistsError:
                raise ValueError(
                    f"--out {path} holds a run already; continue it with --resume {path}, or choose another"
                ) from None
        return PreparedRun(run, is_new=True, made_folder=made_folder)

    def update(self, config: RunConfig) -> None:
        """Make config.yaml that of a run which goes on with other keys.

        A summary of fewer epochs is kept under another name: the run is not finished any more.
        """
        if self.existing(self.path)[1] == config.model_copy(update={"out": None}):
            return
        if (summary := self.read_summary()) and (epochs := summary["last"]["epoch"]) < config.epochs:
            self.summary.replace(self.summary.with_name(f"summary-{epochs}.json"))
        write_atomically(self.config, _text(config))

    @classmethod
    def find(cls, config: RunConfig, *, finished: bool = False) -> PreparedRun | None:
        """The run of that configuration to go on with: in its place, else the latest unfinished one below runs/.

        In its place it may differ in what may change when a run goes on, but its epochs.
        finished: below runs/ a finished one counts too.
        Raises ValueError where the place holds the run of another configuration.
        """
        if config.out is not None:
            run = cls(Path(config.out))
            with usable("--out", run.path):
                if not run.config.exists():
                    return None
            begun = cls.existing(run.path)[1]
            if keys := differing(begun, config):
                raise ValueError(
                    f"--out {config.out} holds a run of another configuration, which differs in {', '.join(keys)}"
                )
            return PreparedRun(run, changes(begun, config))
        with usable("runs", Path("runs")):
            files = sorted(Path("runs").glob("*/config.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in files:
            run = cls(path.parent)
            with contextlib.suppress(ValueError):  # of another version, or damaged: it is not the one
                if (finished or not run.summary.exists()) and not differences(cls.existing(run.path)[1], config):
                    return PreparedRun(run)
        return None

    @classmethod
    def existing(cls, path: Path) -> tuple[RunDir, RunConfig]:
        """A run directory to continue, and its configuration. Raises ValueError where there is none."""
        run = cls(path)
        with usable("--resume", path):
            if not run.config.is_file():
                raise ValueError(f"--resume: {path} is no run directory (it has no config.yaml)")
        return run, load_config(read_file(run.config))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process. Raises ValueError where another process has it or removed it."""
        with usable("--resume", self.path):
            directory = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self.path} is being trained by another process") from None
            if not self.config.exists():
                raise ValueError(f"--resume: {self.path} is no run directory (it has no config.yaml)")
            for folder in (self.path, self.snapshots):
                remove_leftovers(folder)
            yield
        finally:
            os.close(directory)

    def read_summary(self) -> dict[str, Any] | None:
        """summary.json; None where the run is not finished. Raises ValueError where it is damaged."""
        return _read_json(self.summary, _Summary)

    def result(self, config: RunConfig) -> dict[str, Any] | None:
        """summary.json of a run that has all its epochs; None where some are left."""
        summary = self.read_summary()
        return summary if summary and summary["last"]["epoch"] >= config.epochs else None

    def sessions(self) -> list[dict[str, Any]]:
        """The records of provenance.json, the oldest first. Raises ValueError where it is damaged."""
        last = _read_json(self.provenance, _Provenance)
        return [] if last is None else [*last.pop("earlier_sessions", []), last]

    def append_row(self, row: Mapping[str, object]) -> None:
        """Add one line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of metrics.jsonl so far, but one that is being written. Raises ValueError where it is damaged."""
        with usable("run directory", self.metrics):
            lines = self.metrics.read_bytes().split(b"\n") if self.metrics.exists() else [b""]
        for number, line in enumerate(lines[:-1], 1):
            try:
                yield dict(json.loads(line))
            except (ValueError, TypeError):
                raise ValueError(f"{self.metrics} is damaged: line {number} is no row") from None

    def rows_after(self, size: int) -> list[dict[str, Any]]:
        """Rows beyond that many bytes of metrics.jsonl, up to the first that is not whole."""
        found: list[dict[str, Any]] = []
        if self.metrics.exists():
            with contextlib.suppress(ValueError, TypeError):
                for line in self.metrics.read_bytes()[size:].split(b"\n")[:-1]:
                    found.append(dict(json.loads(line)))
        return found

    def rows_size(self) -> int:
        """Length of metrics.jsonl in bytes, safely on the disk: a checkpoint remembers it."""
        if not self.metrics.exists():
            return 0
        with self.metrics.open("rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def truncate_rows(self, size: int) -> None:
        """Drop rows written after the checkpoint that is resumed: the same steps will write them again.

        Raises ValueError where rows of before are missing.
        """
        if self.rows_size() < size:
            raise ValueError(f"--resume: {self.metrics} is shorter than when {self.last} was written")
        if self.metrics.exists():
            os.truncate(self.metrics, size)
