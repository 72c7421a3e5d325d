"""Checkpoints: everything that a resumed run needs to go on as if it had not stopped.

Random numbers are pure functions of (seed, epoch, sample) and the learning rate is one of the epoch, so
progress is all there is to remember of them.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import RunConfig
from engine.rundir import write_tensors
from engine.telemetry import Totals
from engine.weights import FORMAT


@dataclass
class Progress:
    """How far a run has come.

    epoch and step_in_epoch name the next batch; step counts all batches so far. Where step_in_epoch equals the
    number of steps of an epoch, the epoch is trained and its evaluation is due.
    totals: telemetry of this epoch, read so far. best and last: epoch rows, {} before the first.
    rows_size: length of metrics.jsonl that belongs to this state.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    totals: Totals = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    rows_size: int = 0


def student_part(student: nn.Module, config: RunConfig, class_names: tuple[str, ...]) -> dict[str, Any]:
    """What every checkpoint holds: the weights under `student`, and what is needed to build the network."""
    return {
        "format": FORMAT,
        "model": {"name": config.model, "num_classes": len(class_names), "normalize": config.normalize},
        "dataset": config.dataset,
        "class_names": list(class_names),
        "config": config.tree(),
        "student": student.state_dict(),
    }


def content(part: dict[str, Any], progress: Progress, **parts: object) -> dict[str, Any]:
    """What a file holds. part: see `student_part`; parts: further state, such as optimizer and scaler."""
    return part | {"progress": asdict(progress), "metrics": progress.last} | parts


class Saver:
    """Writes checkpoints beside the training, one after the other, each atomically.

    A context: at its end everything is written. What goes wrong in writing is raised by the next call.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None

    def save(self, *files: tuple[Path, dict[str, Any]]) -> None:
        """Copy the contents to the host's memory, and have them written in that order; returns before they are.

        Waits only for what the call before gave.
        """
        self.wait()
        copies = [(path, _copy(content)) for path, content in files]

        def write() -> None:
            for path, content in copies:
                write_tensors(path, content)

        self._writing = self._thread.submit(write)

    def wait(self) -> None:
        """Return when everything is written. Raises OSError where it could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except OSError:
            if kind is None:  # else what happened before is told
                raise
        finally:
            self._thread.shutdown()


def _copy(value: Any) -> Any:
    """Nested values with their tensors copied to the host's memory."""
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(inner) for inner in value)
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run. Raises ValueError where the file is damaged or of another program."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"--resume: cannot read {path}: {type(error).__name__}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or "progress" not in content:
        raise ValueError(f"--resume: {path} is no checkpoint of a run in format {FORMAT}")
    return content
