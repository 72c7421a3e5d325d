"""Results that leave a machine: few files, whole at any moment, and nothing lost silently."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench import pack
from bench.pack import ARCHIVE, FILE_BYTES, FILES, MIB, SUMMARY, TOTAL_BYTES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    (folder / "step").mkdir(parents=True)
    (folder / SUMMARY).write_text("01-step: 0: done\n")
    (folder / "01-step.log").write_text("one\ntwo\n")
    (folder / "step" / "step.csv").write_text("a,b\n1,2\n")
    return folder


@pytest.fixture
def to(tmp_path: Path) -> Path:
    return tmp_path / "to"


def noise(path: Path, size: int) -> bytes:
    """A file that does not compress, and its content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = os.urandom(size)
    path.write_bytes(content)
    return content


def within_the_limits(to: Path) -> bool:
    sizes = [path.stat().st_size for path in to.iterdir()]
    return len(sizes) <= FILES and max(sizes) <= FILE_BYTES and sum(sizes) <= TOTAL_BYTES


def unpacked(to: Path) -> dict[str, bytes]:
    with tarfile.open(to / ARCHIVE) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]


def test_small_files_come_back_as_they_are(results: Path, to: Path) -> None:
    assert pack.pack(results, to) == []
    assert {path.name for path in to.iterdir()} == {ARCHIVE, SUMMARY}
    expected = {"01-step.log": b"one\ntwo\n", "step/step.csv": b"a,b\n1,2\n", SUMMARY: b"01-step: 0: done\n"}
    assert unpacked(to) == expected
    assert (to / SUMMARY).read_text() == "01-step: 0: done\n"


def test_a_network_comes_back_in_pieces(results: Path, to: Path) -> None:
    student = results / "train-iad1" / "best.pt"
    content = noise(student, 44_700_000)
    (line,) = pack.pack(results, to, [student])
    assert within_the_limits(to)
    pieces = sorted(to.glob("train-iad1-best.pt.*"))
    assert [piece.name[-4:] for piece in pieces] == ["1of3", "2of3", "3of3"]
    assert b"".join(piece.read_bytes() for piece in pieces) == content
    assert hashlib.sha256(content).hexdigest() in line
    assert line in (to / SUMMARY).read_text()
    assert "train-iad1/best.pt" not in unpacked(to)


def test_what_does_not_fit_is_named_and_the_most_wanted_fits(results: Path, to: Path) -> None:
    first, second = results / "iad1" / "best.pt", results / "at" / "best.pt"
    noise(first, 40 * MIB)
    noise(second, 40 * MIB)
    noise(results / "at" / "last.pt", 1000)
    lines = pack.pack(results, to, [first, second])
    assert within_the_limits(to)
    assert {path.name for path in to.iterdir()} == {
        ARCHIVE, SUMMARY, *(f"iad1-best.pt.{index}of3" for index in (1, 2, 3))
    }  # fmt: skip
    assert "left out: at/best.pt, 40.0 MiB, for want of room" in lines
    assert "left out: at/last.pt, 0.0 MiB" in lines
    assert (to / SUMMARY).read_text() == "01-step: 0: done\n" + "".join(f"{line}\n" for line in lines)


def test_a_long_log_keeps_its_beginning_and_its_end(results: Path, to: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(100_000))
    (results / "02-long.log").write_text(text)
    (line,) = pack.pack(results, to)
    assert line == f"cut: 02-long.log, {len(text) / MIB:.1f} MiB, to its beginning and its end"
    kept = unpacked(to)["02-long.log"].decode()
    head, _, tail = kept.partition("\n[")
    assert text.startswith(head)
    left_out, _, tail = tail.partition(" bytes are left out here]\n")
    assert text.endswith(tail)
    assert len(head) + int(left_out) + len(tail) == len(text)


def test_of_files_that_do_not_fit_together_the_small_come_first(
    results: Path, to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "PIECE_BYTES", MIB)
    for name, size in {"a.json": 0.4, "b.json": 0.3, "c.json": 0.5}.items():
        noise(results / name, int(size * MIB))
    assert pack.pack(results, to) == ["left out: c.json, 0.5 MiB"]
    assert (to / ARCHIVE).stat().st_size <= MIB
    assert {"a.json", "b.json", "step/step.csv"} <= {*unpacked(to)}


def test_pieces_of_an_older_network_do_not_stay(results: Path, to: Path) -> None:
    student = results / "iad1" / "best.pt"
    noise(student, 40 * MIB)
    pack.pack(results, to, [student])
    content = noise(student, 20 * MIB)
    pack.pack(results, to, [student])
    pieces = sorted(to.glob("iad1-best.pt.*"))
    assert b"".join(piece.read_bytes() for piece in pieces) == content
    student.unlink()
    pack.pack(results, to, [student])
    assert {path.name for path in to.iterdir()} == {ARCHIVE, SUMMARY}


def test_files_of_others_stay_and_count(results: Path, to: Path) -> None:
    student = results / "iad1" / "best.pt"
    noise(student, 40 * MIB)
    to.mkdir()
    for number in range(3):
        (to / f"log{number}").write_text("mine")
    assert "left out: iad1/best.pt, 40.0 MiB, for want of room" in pack.pack(results, to, [student])
    assert within_the_limits(to)
    assert len({*to.glob("log?")}) == 3
    for number in range(3, 6):
        (to / f"log{number}").write_text("mine")
    with pytest.raises(ValueError, match="6 files of others"):
        pack.pack(results, to, [student])


@pytest.mark.parametrize("at", [ARCHIVE, "iad1-best.pt.1of1", SUMMARY])
def test_whoever_is_killed_leaves_whole_files(
    at: str, results: Path, to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed where a file has been written and not yet renamed; the next one cleans up."""
    student = results / "iad1" / "best.pt"
    noise(student, 1000)
    pack.pack(results, to, [student])
    before = {path.name: path.read_bytes() for path in to.iterdir()}
    (results / SUMMARY).write_text("01-step: 1: other\n")
    noise(student, 1000)
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target.name == at:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            pack.pack(results, to, [student])
    assert within_the_limits(to)
    assert {SUMMARY, ARCHIVE} <= {path.name for path in to.iterdir()}
    if at == ARCHIVE:
        assert (to / ARCHIVE).read_bytes() == before[ARCHIVE]
    assert (to / SUMMARY).read_bytes() == before[SUMMARY]
    unpacked(to)
    pack.pack(results, to, [student])
    assert {path.name for path in to.iterdir()} == {*before}
    assert (to / "iad1-best.pt.1of1").read_bytes() == student.read_bytes()


def test_names_are_letters_digits_dots_and_dashes(results: Path, to: Path) -> None:
    student = results / "train-iad1" / "best.pt"
    noise(student, 1000)
    pack.pack(results, to, [student])
    assert all(set(path.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") for path in to.iterdir())


def test_the_command_says_what_is_there_and_fails_without_a_summary(results: Path, to: Path) -> None:
    command = [sys.executable, "-m", "bench.pack", str(results), str(to)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"packed: 2 files, 0.0 MiB in {to}\n"
    (results / SUMMARY).unlink()
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("not packed: ")
