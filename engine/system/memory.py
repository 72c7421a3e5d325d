"""Peak memory of a training: of tensors on a GPU, of the process on a CPU."""

from __future__ import annotations

import resource
import sys

import torch

_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss


def forget_peak(device: torch.device) -> None:
    """Begin a GPU's peak again at what is allocated now; that of a process begins with the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """Bytes: on a GPU the most that tensors took since then, else the largest resident size of the process.

    Neither waits for the device.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
