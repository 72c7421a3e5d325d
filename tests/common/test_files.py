"""Files that are written beside their place: whole, by many at once, whatever the processes are called."""

from __future__ import annotations

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine.common.files import create, expand_user, remove_leftovers, replacing


def test_writers_of_one_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two containers that share a folder have processes of the same number, 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path, sizes = tmp_path / "summary.json", range(1000, 1150)

    def write(size: int) -> None:
        with replacing(path) as beside:
            beside.write_bytes(bytes([size % 256]) * size)
            remove_leftovers(tmp_path)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, sizes))
    content = path.read_bytes()
    assert len(content) in sizes
    assert set(content) == {len(content) % 256}
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_are_those_of_processes_that_are_gone(tmp_path: Path) -> None:
    for name in (".0123456789abcdef.tmp", ".last.pt.7.tmp"):  # and of an older version
        (tmp_path / name).write_text("half")
    (tmp_path / "mine.tmp").write_text("a user's")
    with replacing(tmp_path / "best.eval.json") as beside:
        beside.write_text("half")
        remove_leftovers(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"mine.tmp", beside.name}
    assert (tmp_path / "best.eval.json").read_text() == "half"


def test_a_writer_that_was_taken_for_a_leftover_takes_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock
    removed: list[Path] = []

    def slow(file: Any, how: int) -> None:
        if not removed:
            (beside,) = tmp_path.iterdir()
            beside.unlink()
            removed.append(beside)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with replacing(tmp_path / "a") as beside:
        assert beside not in removed
        beside.write_text("whole")
    assert (tmp_path / "a").read_text() == "whole"


def test_after_a_failure_the_old_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def interrupted(beside: Path) -> None:
        beside.write_text("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a") as beside:
        interrupted(beside)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_new_file_replaces_none(has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", refused)
    create(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        create(tmp_path / "a", b"second")
    (tmp_path / "b").symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        create(tmp_path / "b", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_homes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_user("data", "~/x") == Path("/home/me/x")
    assert expand_user("data", "x") == Path("x")
    with pytest.raises(ValueError, match="^data: ~nosuchuser/x begins with a user who has no home here$"):
        expand_user("data", "~nosuchuser/x")
