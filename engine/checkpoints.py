"""Checkpoints: everything that a resumed run needs to go on as if it had not stopped.

Random numbers are pure functions of (seed, epoch, sample) and the learning rate is one of the epoch, so
progress is all there is to remember of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

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


def save(path: Path, content: dict[str, Any], progress: Progress, **parts: object) -> None:
    """Write a checkpoint atomically. parts: further state, such as optimizer and scaler."""
    write_tensors(path, content | {"progress": asdict(progress), "metrics": progress.last} | parts)


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run. Raises ValueError where the file is damaged or of another program."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"--resume: cannot read {path}: {type(error).__name__}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or "progress" not in content:
        raise ValueError(f"--resume: {path} is no checkpoint of a run in format {FORMAT}")
    return content
