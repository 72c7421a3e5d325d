"""The run directory: what is in it, and how it is written so that nothing is lost.

config.yaml, provenance.json, metrics.jsonl, tensorboard/, last.pt, best.pt, summary.json, loss.png, accuracy.png,
reliability.png. Every file but the two append-only logs is written beside its place and renamed over it.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from engine.config import RunConfig, read_file
from engine.config import load as load_config
from engine.files import replacing


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by new content, or leave the old one whole: write beside it, flush to the disk, rename."""
    with replacing(path) as beside:
        beside.write_bytes(content)


def write_json(path: Path, value: object) -> None:
    """Write readable JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def write_tensors(path: Path, value: Mapping[str, Any]) -> None:
    """Write tensors and plain values for `torch.load(weights_only=True)`, atomically."""
    # Through memory: torch reports a full disk as an internal error of its zip writer, a plain file as OSError.
    buffer = io.BytesIO()
    torch.save(dict(value), buffer)
    write_atomically(path, buffer.getvalue())


def _new_folder(parent: Path, name: str) -> Path:
    """A folder named after this second, and numbered where other runs have begun in it."""
    stamped = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        path = parent / (stamped if number == 1 else f"{stamped}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            break
    return path


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
        self.summary = path / "summary.json"

    @classmethod
    def create(cls, config: RunConfig) -> RunDir:
        """A new run directory with its config.yaml. Raises ValueError where the place is taken."""
        path = Path("runs" if config.out is None else config.out)
        if config.out is not None and cls(path).config.exists():
            raise ValueError(
                f"--out {path} holds a run already; continue it with --resume {path}, or choose another"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            if config.out is None:
                path = _new_folder(path, f"{config.method}-{config.dataset}-{config.model}")
            run = cls(path)
            # Without its place: the file can be given to --config as it is.
            text = yaml.safe_dump(config.tree() | {"out": None}, sort_keys=False)
            write_atomically(run.config, text.encode())
        except OSError as error:
            raise ValueError(f"--out: cannot write to {path}: {error.strerror}") from None
        return run

    def discard(self) -> None:
        """Remove a run that never began, so that the user can mend what was wrong and start it again."""
        self.config.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: something began after all
            self.path.rmdir()

    @classmethod
    def find(cls, config: RunConfig, *, finished: bool = False) -> RunDir | None:
        """The run of that configuration to go on with: in its place, else the latest unfinished one below runs/.

        finished: below runs/ a finished one counts too.
        Raises ValueError where the place holds the run of another configuration.
        """
        wanted = config.model_copy(update={"out": None})
        if config.out is not None:
            run = cls(Path(config.out))
            if not run.config.exists():
                return None
            if (begun := cls.existing(run.path)[1]) != wanted:
                theirs, ours = begun.tree(), wanted.tree()
                keys = ", ".join(key for key in ours if theirs[key] != ours[key])
                raise ValueError(
                    f"--out {config.out} holds a run of another configuration, which differs in {keys}"
                )
            return run
        for path in sorted(
            Path("runs").glob("*/config.yaml"), key=lambda path: path.stat().st_mtime, reverse=True
        ):
            run = cls(path.parent)
            with contextlib.suppress(ValueError):  # of another version, or damaged: it is not the one
                if (finished or not run.summary.exists()) and cls.existing(run.path)[1] == wanted:
                    return run
        return None

    @classmethod
    def existing(cls, path: Path) -> tuple[RunDir, RunConfig]:
        """A run directory to continue, and its configuration. Raises ValueError where there is none."""
        run = cls(path)
        if not run.config.is_file():
            raise ValueError(f"--resume: {path} is no run directory (it has no config.yaml)")
        return run, load_config(read_file(run.config))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process. Raises ValueError where another process has it."""
        directory = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self.path} is being trained by another process") from None
            for leftover in self.path.glob(".*.tmp"):  # of a killed process, half-written
                leftover.unlink()
            yield
        finally:
            os.close(directory)

    def read_summary(self) -> dict[str, Any] | None:
        """summary.json; None where the run is not finished."""
        if not self.summary.exists():
            return None
        found: dict[str, Any] = json.loads(self.summary.read_text(encoding="utf-8"))
        return found

    def append_row(self, row: Mapping[str, object]) -> None:
        """Add one line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of metrics.jsonl so far."""
        if self.metrics.exists():
            with self.metrics.open(encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)

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
