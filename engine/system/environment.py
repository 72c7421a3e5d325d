"""Environment of this process: versions, commit, hardware, precisions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import engine
from engine.common import optional
from engine.kernels import dispatch
from engine.system.precision import Precision

_PACKAGES = (
    "torch", "torchvision", "timm", "triton", "numpy", "pillow", "pyautoattack", "ffcv", "numba",
    "nvidia-dali-cuda130", "nvidia-dali-cuda120",
)  # fmt: skip

_EDITED = ("status", "--porcelain", "--", ".", ":(exclude)bench/results")


def session(precision: Precision) -> dict[str, Any]:
    """Versions, commit, hardware and precisions of this process."""
    return {
        "engine": engine.__version__,
        "commit": commit(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": {"python": platform.python_version()} | {name: optional.version(name) for name in _PACKAGES},
        "hardware": {
            "machine": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": _device_name(precision.device),
        },
        "kernels": {op: dispatch.choose(op, precision.device, fused=precision.fused) for op in dispatch.SERVED_BY},
        "precision": {
            "training": precision.describe(),
            "attack": precision.describe(),
            "choosing": precision.describe(),
            "evaluation": f"{str(precision.dtype).removeprefix('torch.')}, TF32 off",
        },
    }


def commit() -> str | None:
    """Commit of the source tree that the package runs from, with "+changes" if it was edited since.

    Results of measurements are no sources: those of a command would change the commit of the next one.
    """
    root = Path(engine.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(  # noqa: S603  # fixed arguments, no shell
            ["git", "-C", str(root), *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git(*_EDITED) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
