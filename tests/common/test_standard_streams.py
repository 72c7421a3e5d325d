"""Standard output that is closed, full, left by its reader, or of few letters: no traceback, and no wrong code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from engine.common.console import ConsoleReporter

ENGINE = f"exec {sys.executable} -m engine"


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("methods > /dev/full", 1, "engine: standard output: No space left on device"),
        ("--help > /dev/full", 1, "engine: standard output: No space left on device"),
        ("recipes >&-", 1, "engine: standard output: it is closed"),
        ("methods >&- 2>&-", 1, ""),
        ("train --method x 2> /dev/full", 2, ""),
    ],
)
def test_output_that_is_lost_is_told(command: str, code: int, says: str) -> None:
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    ended = subprocess.run(["bash", "-c", f"{ENGINE} {command}"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.strip()) == (code, says)


def test_letters_that_the_terminal_does_not_have(
    tiny: Any, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    run = tmp_path / "räksmörgås"
    outcome = cli(*tiny.flags(method="st", epochs=1, out=str(run)))
    assert (outcome.code, outcome.err) == (0, "")
    assert rb"r\xe4ksm\xf6rg\xe5s" in out.buffer.getvalue()


def test_names_with_marks_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter()
    table = Table("[x]..[/italic]", title="[/b]")
    table.add_row("[bold]a[/red] :smile:")
    reporter.table(table)
    reporter.message("[/x] :smile:")
    shown = capsys.readouterr().out
    for text in ("[x]..[/italic]", "[/b]", "[bold]a[/red] :smile:", "[/x] :smile:"):
        assert text in shown
