"""How much memory is left for images."""

from __future__ import annotations

from pathlib import Path

import torch


def free_memory(device: torch.device | str) -> int:
    """Bytes that new data may take: of the host what its system calls available, of a GPU what is free."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux
        return 1 << 62
