"""As many processes as there are GPUs, over NCCL, train as one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.runs import trainer
from tests.system.test_distributed import assert_same_trajectory

pytestmark = pytest.mark.gpu


def test_all_gpus_train_as_one(tiny: Any, tmp_path: Path) -> None:
    """In float64 to 1e-9 with synchronised BatchNorm; where there is one GPU, its process over NCCL by itself."""
    keys = {
        "method": "iad1",
        "device": "cuda",
        "dtype": "float64",
        "sync_bn": "on",
        "compile": "off",
        "batch_size": 8,
    }
    alone = trainer.train(tiny.config(out=str(tmp_path / "alone"), **keys))
    gpus = next(count for count in (8, 4, 2, 1) if count <= torch.cuda.device_count())
    command = [*tiny.flags(out=str(tmp_path / "together"), **keys), "--gpus", str(gpus)]
    ran = subprocess.run(  # the tests' own command
        [sys.executable, "-m", "engine", *command], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert_same_trajectory(alone.path, tmp_path / "together")
