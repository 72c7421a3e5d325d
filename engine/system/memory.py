"""Memory of a training: of tensors on a GPU, of the process on a CPU."""

from __future__ import annotations

import torch

from engine.common import host_memory


def forget_peak(device: torch.device) -> None:
    """Begin a GPU's peak again at what is allocated now; that of a process begins with the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Bytes: on a GPU the most that tensors took since then, else the most that the process had; None: not known.

    Neither waits for the device.
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host_memory.peak()


def total(device: torch.device) -> int | None:
    """Bytes that there are: of the GPU, else for the process; None: not known."""
    if device.type == "cuda":
        found: int = torch.cuda.get_device_properties(device).total_memory
        return found
    return host_memory.total()
