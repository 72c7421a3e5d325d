"""Peak memory of the resident pipeline over CIFAR-10: `python -m bench.lib.memory` prints MiB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def mebibytes(key: str) -> float:
    """A size of this process that Linux tells: VmRSS now, VmHWM at most."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """VmHWM begins again at what the process has now."""
    Path("/proc/self/clear_refs").write_text("5")


def growth() -> float:
    """What reading CIFAR-10 and an epoch of its 50,000 images take at most, above an interpreter with torch."""
    import torch  # noqa: F401

    before = mebibytes("VmRSS")
    from engine.pipelines import datasets
    from engine.pipelines.sampling import Sampling
    from engine.pipelines.tensor import TensorPipeline

    train = datasets.load("cifar10").train
    for _ in TensorPipeline(train, Sampling(len(train), 128), augment=True, flip=True, device="cpu").epoch(0):
        pass
    return mebibytes("VmHWM") - before


def growth_of_a_process() -> float:
    """The same, measured by a new process."""
    command = [sys.executable, "-m", "bench.lib.memory"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603  # no shell


if __name__ == "__main__":
    print(f"{growth():.1f}")  # noqa: T201
