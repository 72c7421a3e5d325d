"""Peak memory of a process: by its tensors, by torch's allocator, and by nvidia-smi.

`python -m bench.lib.memory` prints the MiB of the resident pipeline over CIFAR-10.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def mebibytes(key: str) -> float:
    """A size of this process that Linux tells: VmRSS now, VmHWM at most."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """VmHWM begins again at what the process has now."""
    Path("/proc/self/clear_refs").write_text("5")


@dataclass(frozen=True)
class Peaks:
    """Peak memory in MiB. allocated: to tensors, on a CPU how far the process grew.

    reserved: by torch's allocator for a GPU. smi: of the process, as nvidia-smi tells. None: it is not known.
    """

    allocated: float
    reserved: float | None = None
    smi: float | None = None


def import_compiler() -> None:
    """Let torch import its compiler, as it does for the first optimizer: 150 MiB, which are no step's."""
    torch.optim.SGD([torch.zeros(1)], lr=0.1)


class Meter:
    """The peak from now on, of tensors on a GPU or of the growth of the process."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, mebibytes("VmRSS")
        self.forget()

    def forget(self) -> None:
        """The peak begins again at what is held now."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            forget_peak()

    def peak(self) -> float:
        """MiB so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        return mebibytes("VmHWM") - self._before


def reserved(device: torch.device) -> float | None:
    """MiB that torch's allocator held on a GPU at most."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_reserved(device) / 2**20


class Smi:
    """Memory of this process as nvidia-smi tells; to be made before anything is on a GPU."""

    def __init__(self) -> None:
        self._before = self._used()

    def mebibytes(self, device: torch.device) -> float | None:
        """MiB on that GPU; where this process is not listed, how much more is used than before. None: unknown."""
        if device.type != "cuda":
            return None
        gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        for pid, where, used in _query("compute-apps=pid,gpu_uuid,used_memory"):
            if (pid, where) == (str(os.getpid()), gpu) and used.isdecimal():
                return float(used)
        now = self._used().get(gpu)
        before = self._before.get(gpu)
        return None if now is None or before is None or now <= before else now - before

    @staticmethod
    def _used() -> dict[str, float]:
        """MiB in use of each GPU, by its UUID."""
        return {gpu: float(used) for gpu, used in _query("gpu=uuid,used") if used.isdecimal()}


def _query(what: str) -> list[Sequence[str]]:
    """Lines of nvidia-smi's answer; none where there is no answer."""
    command = ["nvidia-smi", f"--query-{what}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)  # noqa: S603  # no shell
    except (OSError, subprocess.TimeoutExpired):
        return []
    columns = what.count(",") + 1
    lines = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    return [line for line in lines if done.returncode == 0 and len(line) == columns]


def growth() -> float:
    """Peak MiB of reading CIFAR-10 and of an epoch of its 50,000 images, above an interpreter with torch."""
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
