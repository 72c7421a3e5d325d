"""Notes of an evaluation: what is no whole note is left out, and only who is the last to use them removes them."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import Tensor, nn

from engine.common.stopping import RunFailed
from engine.evaluation.measure import Result, evaluate
from engine.evaluation.partial_results import Measured, PartialResults

A, B = (Measured(survived, "3 0 7 2", -0.25, 1.5, 10, 3, 0, 1, 0) for survived in ("1101", "0000"))


def partial(root: Path, identity: str = "these") -> PartialResults:
    made = PartialResults(root, {"pgd20": identity})
    made.hold()
    return made


def file_of(root: Path) -> Path:
    (path,) = root.glob("*/*.jsonl")
    return path


def test_what_is_added_is_known_to_the_next(tmp_path: Path) -> None:
    first = partial(tmp_path / "notes")
    first.add("pgd20", 0, A)
    first.add("pgd20", 3, B)
    first.release(done=False)
    assert partial(tmp_path / "notes").known("pgd20") == {0: A, 3: B}
    assert partial(tmp_path / "notes", "those").known("pgd20") == {}


@pytest.mark.parametrize("line", ["", "5", " ", "null", "[" * 5000, "\0", json.dumps({"batch": 0, **A._asdict()})])
def test_a_line_that_is_no_note_is_left_out(line: str, tmp_path: Path) -> None:
    made = partial(tmp_path / "notes")
    made.add("pgd20", 1, A)
    with file_of(tmp_path / "notes").open("a") as file:
        file.write(line + "\n")
    made.add("pgd20", 2, B)
    assert made.known("pgd20") == {1: A, 2: B}


def test_damaged_notes_are_left_out_and_nothing_else(tmp_path: Path) -> None:
    """Bytes cut, changed, and put in at random: what is taken is as it was written."""
    chance = random.Random(0)
    written = {number: A._replace(seconds=float(number)) for number in range(5)}
    made = partial(tmp_path / "notes")
    for number, note in written.items():
        made.add("pgd20", number, note)
    path = file_of(tmp_path / "notes")
    whole = path.read_bytes()
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        if chance.random() < 0.5:
            del damaged[chance.randrange(len(damaged)) :]
            damaged[chance.randrange(len(damaged) + 1) : 0] = chance.randbytes(3)
        path.write_bytes(damaged)
        known = made.known("pgd20")
        assert known.items() <= written.items()
        assert len(known) < len(written)
    (path.parent / "folder.jsonl").mkdir()
    os.mkfifo(path.parent / "fifo.jsonl")
    path.write_bytes(whole)
    assert made.known("pgd20") == written


def test_only_the_last_who_uses_notes_removes_them(tmp_path: Path) -> None:
    root = tmp_path / "notes"
    first, second, other = partial(root), partial(root), partial(root, "those")
    assert first.others() == 1
    for one in (first, second, other):
        one.add("pgd20", 0, A)
    first.release(done=True)
    second.add("pgd20", 1, B)
    assert second.known("pgd20") == {0: A, 1: B}
    second.release(done=True)
    assert len(list(root.iterdir())) == 1
    other.release(done=False)
    assert partial(root, "those").known("pgd20") == {0: A}


def test_who_noted_nothing_leaves_nothing(tmp_path: Path) -> None:
    partial(tmp_path / "notes").release(done=False)
    assert not list(tmp_path.iterdir())
    first, second = partial(tmp_path / "notes"), partial(tmp_path / "notes")
    first.release(done=False)
    second.add("pgd20", 0, A)
    second.release(done=True)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = partial(tmp_path / "notes")
    made.add("pgd20", 0, A)

    def full(descriptor: int | BinaryIO) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            RunFailed, match=r"No space left on device; what was measured is kept: the same command"
        ):
            made.add("pgd20", 1, B)
    made.release(done=False)
    assert partial(tmp_path / "notes").known("pgd20")[0] == A


class Stopping(Exception):
    pass


def test_verdicts_are_the_same_after_a_stop(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    data = torch.rand(30, 3, 4, 4), torch.arange(30) % 5
    calls = 0

    def count(module: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal calls
        calls += 1

    def run(notes: PartialResults | None, stop_at: int = 99) -> Result:
        def on_batch(name: str, done: int, total: int) -> None:
            if done >= stop_at:
                raise Stopping

        keys: dict[str, Any] = {"epsilon": 0.1, "batch_size": 7, "partial": notes, "on_batch": on_batch}
        return evaluate(model, data, ["pgd20"], **keys)["pgd20"]

    whole = run(None)
    assert 0 < whole.correct < 30
    with pytest.raises(Stopping):
        run(partial(tmp_path / "notes"), 14)
    model.register_forward_pre_hook(count)
    resumed = run(partial(tmp_path / "notes"))
    assert calls == 1 + 3 * 21  # the classes; of five batches three were left
    assert torch.equal(resumed.verdicts, whole.verdicts)
    assert torch.equal(resumed.samples, whole.samples)
    for key in ("correct", "zero_gradients", "masked", "warnings"):
        assert getattr(resumed, key) == getattr(whole, key)
