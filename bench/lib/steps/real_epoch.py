"""Two whole epochs of a method by the trainer, of which the second counts; in a process of its own.

`python -m bench.lib.steps.real_epoch KEYS ANSWER`: the configuration's KEYS in JSON, a file for an `RealEpoch`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.lib.memory import Meter, Peaks, Smi, reserved
from engine import config, models
from engine.common import host_memory
from engine.common.console import Reporter
from engine.common.files import write_json
from engine.common.tensor_files import write_tensors
from engine.pipelines.datasets import DATASETS
from engine.runs.lifecycle import train
from engine.system import precision

EPOCHS = 2
TEST_IMAGES = 1000
TEACHERS = ("teacher", "teacher_st")


@dataclass(frozen=True)
class RealEpoch:
    """Figures of the last epoch. seconds: of its training. evaluation_s: of all that is measured after it."""

    images: int
    steps: int
    seconds: float
    evaluation_s: float
    peaks: Peaks


def timed(keys: Mapping[str, Any], timeout: float | None) -> RealEpoch:
    """Second epoch of a method, in a process and in a folder of its own.

    Raises ChildProcessError, one line, where it fails or does not end in so many seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "epoch.json"
        command = [sys.executable, "-m", "bench.lib.steps.real_epoch", json.dumps(dict(keys)), str(answer)]
        try:
            code = subprocess.run(command, check=False, timeout=timeout).returncode  # noqa: S603  # no shell
        except subprocess.TimeoutExpired:
            raise ChildProcessError(f"it did not end within the {timeout:.0f} s that were left") from None
        if code:
            raise ChildProcessError(f"its process ended with exit code {code}")
        found = json.loads(answer.read_text(encoding="utf-8"))
    return RealEpoch(**found | {"peaks": Peaks(**found["peaks"])})


def check(keys: Mapping[str, Any]) -> None:
    """Raise ValueError for a run that cannot be made: such keys, or a data set of which too little is known."""
    known = [name for name, entry in DATASETS.items() if entry.num_classes]
    if keys["dataset"] not in known:
        raise ValueError(f"--dataset {keys['dataset']}: known here: {', '.join(known)}")
    precision.choose(config.load(keys))


class Watch(Reporter):
    """Takes the numbers of the last epoch where the trainer tells of its progress."""

    def __init__(self, device: torch.device) -> None:
        self.epochs: list[RealEpoch] = []
        self._device, self._smi, self._meter = device, Smi(), Meter(device)
        self._trained, self._allocated, self._steps = 0.0, 0.0, 0

    def step(self, row: Mapping[str, Any]) -> None:
        """The last one of an epoch is at the end of its training, when the device has done all of it."""
        self._trained, self._allocated = time.perf_counter(), self._meter.peak()

    def epoch(self, row: Mapping[str, Any], epochs: int, measured: str) -> None:
        evaluation_s = time.perf_counter() - self._trained
        peaks = Peaks(self._allocated, reserved(self._device), self._smi.mebibytes(self._device))
        images = round(row["images_per_second"] * row["seconds"])
        self.epochs.append(RealEpoch(images, row["step"] - self._steps, row["seconds"], evaluation_s, peaks))
        self._steps = row["step"]
        self._meter.forget()


def run(keys: Mapping[str, Any], folder: Path) -> RealEpoch:
    """Train as `engine train` does, after the warm-up, with random teachers: they cost what others cost."""
    teachers = {section: {"checkpoint": str(_random_teacher(keys, section, folder))} for section in TEACHERS}
    settled = {
        "epochs": EPOCHS,
        "loss": {"warmup": 0},
        "validation": 0,  # an epoch of all training images, as in the paper
        "eval": {"final": []},
        "out": str(folder / "run"),
    }
    complete = config.load({"limit_test": TEST_IMAGES}, keys, teachers, settled)
    host_memory.keep_freed_memory()
    watch = Watch(precision.choose(complete).device)
    train(complete, watch)
    return watch.epochs[-1]


def _random_teacher(keys: Mapping[str, Any], section: str, folder: Path) -> Path:
    path = folder / f"{section}.pt"
    classes = DATASETS[keys["dataset"]].num_classes
    assert classes is not None, "checked before"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1 + TEACHERS.index(section))
        write_tensors(path, models.build(keys["model"], classes).state_dict())
    return path


def main(keys: str, answer: str) -> None:
    """Write the numbers of the last epoch; a folder beside them holds the run."""
    path = Path(answer)
    write_json(path, asdict(run(json.loads(keys), path.parent)))


if __name__ == "__main__":
    main(*sys.argv[1:])
