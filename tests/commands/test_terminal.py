"""The command line on pseudo-terminals of several widths, and in a notebook; the commands that it names."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engine.commands import tables
from engine.commands.cli import commands
from engine.common import optional
from engine.common.console import ConsoleReporter
from engine.evaluation import reports

ROOT = Path(__file__).resolve().parents[2]


class Shown(NamedTuple):
    """Exit code, and the lines that a terminal was given, each state of a bar as one."""

    code: int
    lines: list[str]

    @property
    def text(self) -> str:
        """All words with one space between them."""
        return " ".join(" ".join(self.lines).split())

    def command_after(self, mark: str) -> list[str]:
        """The words of the command that stands below the line which ends so."""
        place = max(number for number, line in enumerate(self.lines) if line.endswith(mark))
        lines = self.lines[place + 1 :]
        last = next(number for number, line in enumerate(lines) if not line.endswith("\\"))
        return shlex.split("\n".join(lines[: last + 1]).replace("\\\n", " "))


def on_terminal(width: int, *arguments: str, stop_after: str | None = None) -> Shown:
    """Run `engine ARGUMENTS` on a terminal of that width. stop_after: Ctrl-C once it has shown this."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    environment |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "engine", *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if stop_after is not None and stop_after in shown.decode(errors="replace"):
            process.send_signal(signal.SIGINT)
            stop_after = None
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))
    return Shown(process.wait(timeout=120), [line for line in re.split(r"[\r\n]+", text) if line.strip()])


def too_long(lines: list[str], width: int) -> list[str]:
    """Lines beyond the width, but for those of one word: a path, which may be part of a command."""
    return [line for line in lines if len(line) > width and len(line.removesuffix("\\").split()) > 1]


@pytest.mark.parametrize("width", [40, 80])
def test_a_training_fits_into_the_terminal(width: int, tiny: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shown = on_terminal(width, *tiny.flags(method="iad1", out=str(out)))
    assert shown.code == 0, shown.lines
    assert too_long(shown.lines, width) == []
    assert not any("…" in line for line in shown.lines)
    for words in (
        "student: about ",
        " for 2 epochs, evaluations included, at ",
        "; peak memory so far ",
        "teacher: resnet8, ",
        "PGD-10 ",
        " of 18 test images (",
        "epsilon 8/255",
        "n = 18",
    ):
        assert words in shown.text
    assert re.search(
        r"student: epoch 2/2: loss \d\.\d{4}, alpha \d\.\d{3}, natural \d+\.\d\d%, PGD-10", shown.text
    )
    bars = [line for line in shown.lines if re.match(r"student .*epoch 1/2 ", line)]
    assert bars, shown.lines
    after = shown.lines[shown.lines.index("Next:") + 1 :]
    told = shlex.split("\n".join(after).replace("\\\n", " "))
    assert told == [
        *("engine", "eval", str(out), "--attacks", "natural,pgd20,aa"),
        *("engine", "report", str(out)),
        *("engine", "export", str(out), "--format", "onnx"),
    ]


def test_the_command_of_a_stopped_training_continues_it(tiny: Any, tmp_path: Path) -> None:
    out = tmp_path / "my run"
    shown = on_terminal(60, *tiny.flags(method="at", epochs=400, out=str(out)), stop_after="epoch 1/400: ")
    assert shown.code == 130
    command = shown.command_after("to continue:")
    assert command == ["engine", "train", "--resume", str(out)]
    again = on_terminal(60, *command[1:], stop_after="that are left")
    assert again.code == 130
    assert re.search(r"student: about .* for the \d{3} epochs that are left, ", again.text)


def test_the_command_of_a_stopped_evaluation_completes_it(tiny: Any, tmp_path: Path) -> None:
    out = tmp_path / "my reports"
    options = ["--data", str(tiny.folder), "--batch-size", "6", "--attacks", "natural,pgd600", "--out", str(out)]
    shown = on_terminal(60, "eval", str(tiny.teacher), *options, stop_after="1/18")
    assert shown.code == 130, shown.lines
    assert re.search(r"PGD-600 .* [1-5]/18 ", shown.text), "the bar stands still within a batch"
    command = shown.command_after("to continue:")
    assert command == ["engine", "eval", str(tiny.teacher), *options]
    assert list(out.glob("**/*")), "nothing is kept"
    again = on_terminal(60, *command[1:])
    assert again.code == 0, again.lines
    (report,) = out.glob("*.eval.json")
    assert [result["attack"] for result in reports.read(report)] == ["natural", "pgd600"]


def test_the_command_of_a_stopped_comparison_begins_it_again(tiny: Any, tmp_path: Path) -> None:
    options = ["--data", str(tiny.folder), "--dataset", "folder", "--student-epochs", "1000"]
    options += ["--out", str(tmp_path / "a b")]
    shown = on_terminal(40, "teachers", str(tiny.teacher), *options, stop_after="student epoch ")
    assert shown.code == 130, shown.lines
    assert "student" in shown.text
    assert shown.command_after("again:") == ["engine", "teachers", str(tiny.teacher), *options]


def helps() -> list[tuple[str, ...]]:
    """Names of all commands, those below others too."""
    found: list[tuple[str, ...]] = [()]
    for name, command in sorted(commands.commands.items()):
        found.append((name,))
        found += [(name, below) for below in sorted(getattr(command, "commands", {}))]
    return found


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("names", helps(), ids=" ".join)
def test_a_help_fits_and_breaks_no_word(
    names: tuple[str, ...], width: int, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    wide = set(cli(*names, "--help").out.split())
    monkeypatch.setenv("COLUMNS", str(width))
    lines = cli(*names, "--help").out.split("\n")
    assert too_long(lines, width) == []
    assert set(" ".join(lines).split()) == wide


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("command", ["attacks", "methods", "models", "recipes", "datasets"])
def test_a_list_fits_and_breaks_no_word(
    command: str, width: int, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = set(cli(command).out.split())

    def narrow() -> ConsoleReporter:
        reporter = ConsoleReporter()
        reporter.console._force_terminal = True
        reporter.console.width = width
        return reporter

    monkeypatch.setattr(tables, "ConsoleReporter", narrow)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", cli(command).out).split("\n")
    assert too_long(lines, width) == []
    lost = {word for word in words if not re.search(r"[─━]", word)} - set(" ".join(lines).split())
    # Beside a value that stands below its name there is a colon.
    assert {word for word in lost if f"{word}:" not in " ".join(lines)} == set()


def test_a_training_in_a_notebook_shows_its_progress(tmp_path: Path) -> None:
    nbformat, nbclient = (optional_module(name) for name in ("nbformat", "nbclient"))
    optional_module("ipykernel")
    kernel = tmp_path / "kernels" / "this"
    kernel.mkdir(parents=True)
    arguments = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ENGINE_CACHE": str(tmp_path / "cache")}
    kernel.joinpath("kernel.json").write_text(
        json.dumps({"argv": arguments, "display_name": "this", "language": "python", "env": environment})
    )
    keys = {"method": "at", "dataset": "digits", "model": "resnet8", "epochs": 1, "limit_train": 60}
    keys |= {
        "limit_test": 20,
        "device": "cpu",
        "eval": {"final": []},
        "out": str(tmp_path / "run"),
        "winograd": "off",
    }
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(f"import engine\nfound = engine.train({keys!r})")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(tmp_path))
        nbclient.NotebookClient(notebook, kernel_name="this", timeout=120).execute()
    outputs = notebook.cells[0].outputs
    printed = "".join(each.text for each in outputs if each.output_type == "stream")
    assert "student: epoch 1/1: loss " in printed
    bars = [each.data for each in outputs if each.output_type == "display_data"]
    (bar,) = [each for each in bars if "epoch 1/1" in each["text/plain"]]
    assert re.search(r"student at, resnet8 epoch 1/1 ━+ 1/1 ", bar["text/plain"])
    assert bar["text/html"] == f"<pre>{bar['text/plain']}</pre>"
    assert "\x1b" not in printed + bar["text/plain"]


def optional_module(name: str) -> Any:
    """A module, whose absence is a skip that is seen."""
    try:
        return optional.load(name, missing=f"{name} is not installed")
    except ValueError as error:
        pytest.skip(str(error))
