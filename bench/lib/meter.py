"""Peak memory of a training: by the tensors, by torch's allocator, and by nvidia-smi."""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.lib import memory


@dataclass(frozen=True)
class Peaks:
    """In MiB. allocated: to tensors, on a CPU how far the process grew.

    reserved: by torch's allocator for a GPU. smi: of the process, as nvidia-smi tells. None: it is not known.
    """

    allocated: float
    reserved: float | None = None
    smi: float | None = None


class Meter:
    """The peak from now on, of tensors on a GPU or of the growth of the process."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, memory.mebibytes("VmRSS")
        self.forget()

    def forget(self) -> None:
        """The peak begins again at what is held now."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            memory.forget_peak()

    def peak(self) -> float:
        """MiB so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        return memory.mebibytes("VmHWM") - self._before


def reserved(device: torch.device) -> float | None:
    """MiB that torch's allocator held on a GPU at most."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_reserved(device) / 2**20


class Smi:
    """What nvidia-smi tells of this process; to be made before anything is on a GPU."""

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
        return {gpu: float(used) for gpu, used in _query("gpu=uuid,memory.used") if used.isdecimal()}


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
