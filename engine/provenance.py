"""What a run was made with: versions, commit, hardware, seeds, hashes, precisions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import engine
from engine.config import RunConfig
from engine.kernels import dispatch
from engine.pipelines.datasets import AnyDataset
from engine.precision import AMP_DTYPES, Precision
from engine.rundir import RunDir, write_json
from engine.teachers import Teacher

_PACKAGES = (
    "torch", "torchvision", "triton", "numpy", "pillow", "pyautoattack", "ffcv", "numba", "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
)  # fmt: skip


def write(
    run: RunDir,
    config: RunConfig,
    precision: Precision,
    dataset: AnyDataset,
    teachers: Mapping[str, Teacher],
    step: int,
    pipeline: str,
    processes: int,
    init_sha256: str | None = None,
) -> None:
    """Write provenance.json for this session of the run; those before a resume are kept under earlier_sessions."""
    current = session(precision) | {
        "from_step": step,
        "pipeline": pipeline,
        "processes": processes,
        "seeds": {"run": config.seed},
        "data": {"name": config.dataset, "source": dataset.source, "sha256": dataset.sha256},
        "teachers": {
            section: {"model": teacher.name, "source": teacher.source, "sha256": teacher.sha256}
            for section, teacher in teachers.items()
        },
    }
    if init_sha256 is not None:
        current["init"] = {"source": config.init, "sha256": init_sha256}
    write_json(run.provenance, current | {"earlier_sessions": run.sessions()})


def session(precision: Precision) -> dict[str, Any]:
    """Versions, commit, hardware and precisions of this process."""
    return {
        "engine": engine.__version__,
        "commit": commit(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "hardware": {
            "machine": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": _device_name(precision.device),
        },
        "kernels": {op: dispatch.choose(op, precision.device, fused=precision.fused) for op in dispatch.TABLE},
        "precision": {
            "training": precision.describe(),
            "attack": precision.describe(),
            "evaluation": f"{str(precision.dtype).removeprefix('torch.')}, TF32 off",
        },
    }


def amp_dtype(run: RunDir) -> str | None:
    """Format of the passes of a run, or of a teacher in training for it, by provenance.json; None: nothing yet."""
    for place in (run, RunDir(run.path / "teacher"), RunDir(run.path / "teacher_st")):
        if sessions := place.sessions():
            named = str(sessions[-1]["precision"]["training"]).rpartition(" ")[2]
            return named if named in AMP_DTYPES else None
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Commit of the source tree that the package runs from, with "+changes" if it was edited since."""
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
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
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
