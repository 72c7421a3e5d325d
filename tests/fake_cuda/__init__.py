"""A pretended GPU for tests of what is launched where, and what waits for what: see README.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fake_cuda import build


@dataclass(frozen=True)
class FakeCuda:
    """Runs functions in processes that see pretended GPUs."""

    driver: Path

    def run(self, function: Callable[..., Any], *arguments: Any, devices: int = 1, **environment: str) -> Any:
        """The value of `function(*arguments)` in such a process.

        function: of a test module, at its top level. Its arguments and what it returns are passed on as JSON.
        """
        folder = self.driver.parent
        answer = folder / "answer.json"
        answer.unlink(missing_ok=True)
        inherited = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        libraries = [str(folder), *filter(None, [inherited.get("LD_LIBRARY_PATH")])]
        call = (function.__code__.co_filename, function.__name__, json.dumps(arguments), answer)
        done = subprocess.run(
            [sys.executable, "-m", "tests.fake_cuda.child", *call],
            cwd=build.ROOT,
            env={
                **inherited,
                "LD_PRELOAD": str(self.driver),
                "LD_LIBRARY_PATH": ":".join(libraries),
                "TRITON_LIBCUDA_PATH": str(folder),
                "TRITON_CACHE_DIR": str(folder / "triton"),
                "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
                "FAKE_CUDA_DEVICES": str(devices),
                **environment,
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{function.__name__}: {done.stderr[-8000:]}"
        return json.loads(answer.read_text())


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> FakeCuda:
    """The mock, built; a skip where there is a GPU, or no torch for one."""
    if torch.version.cuda is None:
        pytest.skip("torch was built without CUDA: there is nothing to run on a pretended GPU")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/gpu/ uses it, and a pretended one would hide it")
    return FakeCuda(build.mock_runtime(tmp_path_factory.mktemp("fake_cuda")))


@pytest.fixture(scope="session")
def cuda_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native library with its CUDA part, for the mock."""
    return build.native_library(tmp_path_factory.mktemp("native"))
