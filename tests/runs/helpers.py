"""Rows and messages of runs, for their tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.common.console import Reporter


class Listener(Reporter):
    """Keeps the messages of a run."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


class Bar(Listener):
    """A console whose bar of progress is shown or not."""

    def __init__(self) -> None:
        super().__init__()
        self.is_shown = False

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self.is_shown = True

    def end(self) -> None:
        self.is_shown = False


def rows_of(path: Path, event: str) -> list[dict[str, Any]]:
    """Rows of that event in metrics.jsonl of a run directory."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == event]
