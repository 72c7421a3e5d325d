"""How many processes a command asks for."""

from __future__ import annotations

import re

import pytest

from engine import launcher, precision


@pytest.mark.parametrize(
    ("gpus", "processes", "device", "there", "expected"),
    [
        (None, None, "auto", 0, 0),
        (None, None, "auto", 8, 0),
        (8, None, "auto", 8, 8),
        (1, None, "cuda", 8, 1),
        (None, 2, "auto", 0, 2),
        (None, 2, "cpu", 8, 2),
        (9, None, "auto", 8, "--gpus 9: this machine has 8 CUDA GPUs"),
        (1, None, "auto", 0, "--gpus 1: this machine has 0 CUDA GPUs"),
        (2, None, "auto", 1, "--gpus 2: this machine has 1 CUDA GPU"),
        (2, None, "cpu", 8, "--gpus 2 and --device cpu exclude each other"),
        (2, None, "cuda:1", 8, "--gpus 2 and --device cuda:1 exclude each other"),
        (2, 2, "auto", 8, "--gpus and --procs exclude each other: GPUs have a process each"),
        (None, 2, "auto", 8, "--procs 2 is for CPUs: add --device cpu, or use --gpus 2"),
        (None, 2, "cuda:0", 8, "--procs 2 is for CPUs: add --device cpu, or use --gpus 2"),
    ],
)
def test_count(
    gpus: int | None,
    processes: int | None,
    device: str,
    there: int,
    expected: int | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "count_gpus", lambda: there)
    if isinstance(expected, int):
        assert launcher.count(gpus, processes, device) == expected
    else:
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            launcher.count(gpus, processes, device)
