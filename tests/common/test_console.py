"""Reports of a training on terminals of several widths and in a log file."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from engine.common.console import ConsoleReporter, Reporter, usual_reporter

ROW: dict[str, Any] = {
    "epoch": 12, "step": 1234, "loss": 2.3456, "alpha": 0.7123, "seconds": 70, "images_per_second": 1234.5,
    "share_of_peak": 0.6123,
}  # fmt: skip
MEASURED = "natural 84.13%, PGD-10 43.20% of 1,000 validation images"


def reported(width: int | None, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[str]:
    """Lines that a terminal of that width, or a log file, got of an epoch and its evaluation."""
    now = iter(range(0, 10**6, 20))
    monkeypatch.setattr("engine.common.console.time.monotonic", lambda: float(next(now)))
    text = io.StringIO()
    to = Console(file=text, width=width, force_terminal=width is not None, color_system=None, highlight=False)
    reporter = ConsoleReporter(console=to, **settings)
    with reporter.speaking_of("student"):
        reporter.begin("iad1, resnet18", 78_200)
        reporter.at_epoch(12, 200)
        reporter.advance(40_000)
        reporter.step(ROW)
        reporter.doing("PGD-10 512/1,000 images")
        reporter.doing("")
        reporter.epoch(ROW, 200, MEASURED)
        reporter.end()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue()).replace("\r", "\n").split("\n")


@pytest.mark.parametrize("width", [30, 40, 80, 120, 240])
def test_no_line_is_longer_than_the_terminal_and_no_word_is_broken(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = reported(width, monkeypatch)
    assert max(map(cell_len, lines)) <= width
    assert not any("…" in line for line in lines)
    told = " ".join(" ".join(lines).split())
    assert (
        f"student: epoch 12/200: loss 2.3456, alpha 0.712, {MEASURED} (1 min 10 s, 1,234 images/s, about" in told
    )
    bars = [line for line in lines if "epoch 12/200" in line and "student: " not in line]
    assert bars
    assert all(line.startswith("student") for line in bars)


def test_a_narrow_terminal_goes_without_the_less_important_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    def columns(width: int) -> set[str]:
        last = [line for line in reported(width, monkeypatch) if line.strip()][-1]
        marks = {
            "epoch": "epoch 12/200",
            "left": "ETA ",
            "count": "40,000/78,200",
            "speed": "images/s",
            "bar": "━",
        }
        marks |= {"measured": MEASURED, "what": "iad1, resnet18"}
        return {name for name, mark in marks.items() if mark in last}

    assert columns(24) < columns(36) < columns(80) < columns(200)
    assert columns(24) == {"epoch"}
    assert columns(36) == {"epoch", "left"}
    assert columns(200) == {"epoch", "left", "count", "speed", "bar", "measured", "what"}


def test_a_log_file_has_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = reported(None, monkeypatch)
    told = [line for line in lines if line]
    assert all(line.startswith("student: ") for line in told)
    assert any(re.search(r"iad1, resnet18: epoch 12/200, 40,000/78,200, .*ETA \d", line) for line in told)
    assert any(line.startswith("student: epoch 12/200: ") and line.endswith(" left)") for line in told)


def test_the_share_of_the_peak_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    told = " ".join(reported(None, monkeypatch, share_of_peak=True))
    assert "1,234 images/s, 61.23% of the device's measured matrix-product speed" in told


def test_roles_end_with_their_context() -> None:
    text = io.StringIO()
    reporter = ConsoleReporter(console=Console(file=text))
    with reporter.speaking_of("student"):
        with reporter.speaking_of("teacher"):
            reporter.message("one")
        reporter.message("two")
    reporter.message("three")
    assert text.getvalue().split("\n") == ["teacher: one", "student: two", "three", ""]


def test_the_end_of_uneven_work_is_not_foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10**6))
    monkeypatch.setattr("engine.common.console.time.monotonic", lambda: float(next(now)))
    text = io.StringIO()
    reporter = ConsoleReporter(console=Console(file=text, width=100, force_terminal=True, color_system=None))
    reporter.begin("AA, best.pt", 1000)
    reporter.advance(400)
    reporter.doing("apgd-t, 34 checks", is_uneven=True)
    reporter.end()
    last = text.getvalue().rstrip().split("\r")[-1]
    assert "400/1,000 apgd-t, 34 checks" in last
    assert "ETA" not in last


def test_outside_a_notebook_a_program_is_told_nothing() -> None:
    assert type(usual_reporter()) is Reporter


def test_tasks_in_turn_begin_once_each() -> None:
    calls: list[tuple[object, ...]] = []

    class Recorded(Reporter):
        def begin(self, what: str, total: int, done: int = 0) -> None:
            calls.append((what, total))

        def advance(self, done: int) -> None:
            calls.append((done,))

    progress, parts = Recorded().task_progress(), Recorded().part_progress("reading")
    for what, done, total in (("a", 1, 2), ("a", 2, 2), ("b", 1, 1)):
        progress(what, done, total)
    parts("train", 3, 9)
    assert calls == [("a", 2), (1,), (2,), ("b", 1), (1,), ("reading train images", 9), (3,)]
