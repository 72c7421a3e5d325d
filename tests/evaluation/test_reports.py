"""Reports of evaluations: results accumulate, none is lost, and no two checkpoints share a file."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine.evaluation import reports


def entry(attack: str = "pgd20", sha256: str = "a", accuracy: float = 0.5, **parameters: Any) -> dict[str, Any]:
    return {
        "attack": attack, "accuracy": accuracy, "n": 10, "started": "then", "checkpoint": {"sha256": sha256},
        "parameters": {"attack": attack, "checkpoint": sha256, "epsilon": 0.1, "seed": 0} | parameters,
    }  # fmt: skip


def test_results_accumulate_and_each_replaces_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "m.pt.eval.json"
    first = [entry("natural"), entry("aa", n=20), entry("pgd20")]
    assert reports.add(path, first) == []
    assert reports.read(path) == first
    beside = [entry("pgd20", epsilon=0.2), entry("pgd20", seed=1), entry("pgd20", n=5), entry("natural", data="x")]
    assert reports.add(path, beside) == []
    (said,) = reports.add(path, [entry("natural", accuracy=0.75)])
    assert said == f"Replaced the result of natural of then in {path}"
    assert reports.read(path) == [*first[1:], *beside, entry("natural", accuracy=0.75)]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_another_content_of_the_checkpoint_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "m.pt.eval.json"
    reports.add(path, [entry("natural"), entry("pgd20")])
    (said,) = reports.add(path, [entry("natural", "b")])
    assert said == f"Note: 2 results in {path} are of an earlier content of the checkpoint (its sha256)"
    assert [reports.checkpoint_of(found) for found in reports.read(path)] == ["a", "a", "b"]


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.pt.eval.json"
    with ThreadPoolExecutor(8) as pool:  # a lock is of an open file, so threads exclude each other as processes do
        list(pool.map(lambda seed: reports.add(path, [entry(seed=seed)]), range(40)))
    assert sorted(found["parameters"]["seed"] for found in reports.read(path)) == list(range(40))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


OLD = {
    "engine": "0.1.0", "checkpoint": {"path": "best.pt", "sha256": "a"}, "seed": 0,
    "results": {"pgd20": {"attack": "pgd20", "correct": 5, "n": 10, "accuracy": 0.5, "seconds": 1.0}},
}  # fmt: skip


def test_a_report_from_before_there_was_a_format_is_read_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "best.pt.eval.json"
    path.write_text(json.dumps(OLD))
    (old,) = reports.read(path)
    assert (old["attack"], old["accuracy"], old["engine"]) == ("pgd20", 0.5, "0.1.0")
    reports.add(path, [entry("natural")])
    assert reports.read(path) == [old, entry("natural")]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"5", b"null", b"\xff\xfe", b"[" * 5000, b"{}",
        b'{"results": []}', b'{"format": 1, "results": []}', b'{"format": 2, "results": [1]}',
        b'{"format": 3, "results": []}', b'{"format": 2}', b'{"format": 2, "results": {}}',
        b'{"format": 2, "results": [{"attack": "x"}]}', b'{"results": {"x": 1}}', b'{"results": {"x": {}}}',
        b'{"format": 2, "results": [{"attack": "x", "n": 1, "accuracy": NaN}]}',
        b'{"format": 2, "results": [{"attack": "x", "n": 1, "accuracy": 1, "warnings": 5}]}',
    ],
)  # fmt: skip
def test_what_is_no_report_stays_as_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.pt.eval.json"
    path.write_bytes(content)
    for attempt in (lambda: reports.read(path), lambda: reports.check(path), lambda: reports.add(path, [entry()])):
        with pytest.raises(ValueError, match="move it away") as caught:
            attempt()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo], ids=["folder", "fifo"])
def test_a_report_that_is_no_file_is_told_of(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "m.pt.eval.json")
    with pytest.raises(ValueError, match=r"cannot read .*m\.pt\.eval\.json"):
        reports.read(tmp_path / "m.pt.eval.json")


def test_no_two_checkpoints_share_a_report(tmp_path: Path) -> None:
    names = ["m.pt", "m.pth", "m", "ck.1", "ck.2", "ck", "best.pt", "best.eval.pt", "a-b/c", "a/b-c", "x" * 200]
    folders = [
        "sweepA/seed0",
        "sweepB/seed0",
        "sweepA-seed0",
        "seed0",
        "y" * 100 + "/seed0",
        "y" * 100 + "1/seed0",
    ]
    checkpoints = [tmp_path / folder / name for folder, name in itertools.product(folders, names)]
    for folder in (None, tmp_path / "out"):
        paths = [reports.path_of(path, folder) for path in checkpoints]
        assert len(set(paths)) == len(paths)
        assert len({reports.notes_of(path) for path in paths}) == len(paths)
        assert all(len(path.name) < 255 and path.name.endswith(".eval.json") for path in paths)
    assert reports.path_of(Path("runs/x/best.pt"), None) == Path("runs/x/best.pt.eval.json")


def test_a_name_in_a_folder_does_not_depend_on_how_the_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written = [Path("runs/x/best.pt"), Path("runs/../runs/x/best.pt"), tmp_path / "runs" / "x" / "best.pt"]
    (name,) = {reports.path_of(path, Path("out")).name for path in written}
    assert name.startswith("x-best.pt-")
