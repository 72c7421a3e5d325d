"""Training by one process for each GPU, over NCCL, equals training by one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.runs import lifecycle
from tests.system.test_distributed import assert_same_trajectory

pytestmark = pytest.mark.gpu


def test_all_gpus_train_as_one(tiny: Any, tmp_path: Path) -> None:
    """Equality in float64 to 1e-9 with synchronised BatchNorm; with one GPU, by one process over NCCL."""
    keys = {
        "method": "iad1",
        "device": "cuda",
        "dtype": "float64",
        "sync_bn": "on",
        "compile": "off",
        "batch_size": 8,
    }
    alone = lifecycle.train(tiny.config(out=str(tmp_path / "alone"), **keys))
    gpus = next(count for count in (8, 4, 2, 1) if count <= torch.cuda.device_count())
    command = [*tiny.flags(out=str(tmp_path / "together"), **keys), "--gpus", str(gpus)]
    ran = subprocess.run(  # the tests' own command
        [sys.executable, "-m", "engine", *command], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert_same_trajectory(alone.path, tmp_path / "together")
