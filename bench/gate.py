"""The tests that must pass before anything is timed: a fast wrong answer is worth nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def checks(ops: Sequence[str], device_type: str) -> list[Path]:
    """Where the tests of the ops lie, in the implementations that serve on a device."""
    if device_type == "cuda":
        return [ROOT / "tests" / "gpu"]
    return [ROOT / "tests" / "kernels" / f"test_{name}.py" for name in (*ops, "table")]


def tests_pass(paths: Sequence[Path], ops: Sequence[str], device_type: str) -> bool:
    """Run the fast tests there that name one of the ops, in a process of its own; to find none is to fail."""
    marks = "not slow" if device_type == "cuda" else "not slow and not gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", marks, "-k", " or ".join(ops), *map(str, paths)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0  # noqa: S603  # no shell
