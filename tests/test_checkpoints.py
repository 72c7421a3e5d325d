"""Checkpoints are written beside the training, one at a time."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import checkpoints, rundir


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the state at the call, the second call waits for the first, and errors come later."""
    go, begun, written = threading.Event(), threading.Event(), rundir.write_tensors

    def slow(path: Path, value: Any) -> None:
        begun.set()
        assert go.wait(60)
        written(path, value)

    monkeypatch.setattr(checkpoints, "write_tensors", slow)
    weight = torch.zeros(3)
    with checkpoints.Saver() as saver:
        saver.save((tmp_path / "first.pt", {"weight": weight, "nested": [{"again": weight}]}))
        assert begun.wait(60)
        weight += 1  # the training goes on
        assert not (tmp_path / "first.pt").exists()
        second = threading.Thread(target=saver.save, args=((tmp_path / "second.pt", {"weight": weight}),))
        second.start()
        second.join(0.2)
        assert second.is_alive(), "the second call does not wait for the first to be written"
        go.set()
        second.join(60)
    saved = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("first", "second")]
    assert saved[0]["weight"].tolist() == saved[0]["nested"][0]["again"].tolist() == [0, 0, 0]
    assert saved[1]["weight"].tolist() == [1, 1, 1]


def test_a_checkpoint_that_cannot_be_written_is_told_by_the_next_call(tmp_path: Path) -> None:
    saver = checkpoints.Saver()
    saver.save((tmp_path / "absent" / "last.pt", {}))
    with pytest.raises(FileNotFoundError):
        saver.wait()
