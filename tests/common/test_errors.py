"""Whatever is typed: exit code 0, 1 or 2, at most one line on stderr, no traceback, nothing left behind."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click
import pytest

from engine.commands import data
from engine.commands.cli import commands
from engine.common import errors
from engine.common.stopping import RunFailed
from engine.runs import lifecycle, seeds
from engine.runs.reporting import html_report

NAMES_NOTHING = ("Overflow", "codec", "Expecting value", "0x7", "unpack", "unforeseen", "Traceback")
RUN = ["--dataset", "digits", "--model", "resnet8", "--method", "st", "--epochs", "1", "--limit-train", "40"]
RUN += ["--limit-test", "20", "--device", "cpu"]
NEEDED: dict[str, list[str]] = {
    "train": RUN,
    "eval": ["nowhere.pt", "--device", "cpu"],
    "data write": ["--dataset", "digits", "--out", "x.beton", "--limit-train", "20", "--limit-test", "20"],
}


def all_commands(group: click.Group = commands, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from all_commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


PARAMETERS = [
    (name, parameter)
    for name, command in all_commands()
    for parameter in command.params
    if not getattr(parameter, "is_flag", False)
]


@pytest.fixture
def bad_values(tmp_path: Path) -> list[str]:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    (tmp_path / "empty").touch()
    places = [str(tmp_path / name) for name in ("fifo", "folder", "socket", "empty", "n" * 300)]
    numbers = ["9" * 25, "9" * 5000, "-1", "-9e99", "nan", "inf", "1e999", "0x10", "1:30"]
    texts = [
        "",
        " ",
        "\udcff",
        "x" * 300,
        "[x]..[/italic]",
        "\x1b[31m\r\n",
        "~nosuchuser/x",
        "a=b=c",
        "lr=[",
        "/dev/zero",
    ]
    return places + numbers + texts


def check_lines(outcome: Any, what: str) -> None:
    assert outcome.code in (0, 1, 2), what
    lines = outcome.err.splitlines()
    assert len(lines) == (outcome.code != 0), (what, outcome.err)
    for line in lines:
        assert line.startswith("engine: "), (what, line)
        assert line.isprintable(), (what, line)
        assert not any(word in line for word in NAMES_NOTHING), (what, line)


def with_value(name: str, parameter: click.Parameter, value: str) -> list[str]:
    needed = [] if "--resume" in parameter.opts else NEEDED.get(name, [])
    if isinstance(parameter, click.Argument):
        return [*name.split(), *needed[1:], "--", value]
    flag = parameter.opts[0]
    if flag in needed:
        at = needed.index(flag)
        needed = needed[:at] + needed[at + 2 :]
    return [*name.split(), *needed, f"{flag}={value}"]


def ids(value: Any) -> str:
    return value.opts[0] if isinstance(value, click.Parameter) else str(value)


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS, ids=ids)
def test_every_option_of_every_command(
    name: str,
    parameter: click.Parameter,
    bad_values: list[str],
    cli: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to where work would begin: what that makes of odd values is tested by `test_every_option_at_work`."""

    def begin(*arguments: Any, **keys: Any) -> NoReturn:
        raise RunFailed("work would begin")

    for module, function in ((lifecycle, "train"), (lifecycle, "begin"), (seeds, "train"), (data, "write")):
        monkeypatch.setattr(module, function, begin)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for value in bad_values:
        check_lines(cli(*with_value(name, parameter, value)), f"{name} {parameter.opts[0]} {value!r:.40}")
        left = [path.name for path in work.iterdir() if path.name != "report.html"]
        assert left == [], (value, left)


# ---------------------------------------------------------------- what nobody foresaw


@pytest.fixture
def traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "traces"


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*arguments: Any, **keys: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(html_report, "write", fail)


class Mute(Exception):
    def __str__(self) -> str:
        raise TypeError


@pytest.mark.parametrize(
    "error",
    [
        KeyError("best"),
        TypeError("a\nb"),
        MemoryError(),
        RecursionError("deep"),
        RuntimeError("\udcff\x1b[31m"),
        AssertionError(),
        Mute(),
        UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"),
        OSError(errno.EBADF, "Bad file descriptor"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_unforeseen_is_one_line_with_a_trace(
    error: Exception, cli: Any, traces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    outcome = cli("report", "x")
    (line,) = outcome.err.splitlines()
    (trace,) = traces.iterdir()
    assert outcome.code == 1
    assert line.startswith(f"engine: unforeseen {type(error).__name__}")
    assert line.isprintable()
    assert line.endswith(str(trace))
    text = trace.read_text()
    for words in (
        "engine report x",
        "Traceback (most recent call last)",
        type(error).__name__,
        "Python 3",
        "torch 2",
    ):
        assert words in text
    assert "ENGINE_CACHE" not in text


def test_debugging_shows_the_trace_too(cli: Any, traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_DEBUG", "1")
    failing(monkeypatch, KeyError("best"))
    assert "Traceback" in cli("report", "x").err


def test_the_newest_traces_are_kept(cli: Any, traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyError("best"))
    traces.mkdir(parents=True)
    (traces / "mine.txt").touch()
    for number in range(30):
        (traces / f"engine-trace-20200101-0000{number:02}-x.txt").touch()
    cli("report", "x")
    names = sorted(path.name for path in traces.iterdir())
    assert len(names) == errors.MOST_TRACES + 1
    assert "mine.txt" in names
    assert "engine-trace-20200101-000011-x.txt" in names
    assert "engine-trace-20200101-000010-x.txt" not in names


def test_where_nothing_can_be_written_the_line_still_comes(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ENGINE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    failing(monkeypatch, KeyError("best"))
    outcome = cli("report", "x")
    assert outcome.code == 1
    (line,) = outcome.err.splitlines()
    assert "KeyError: 'best'" in line
    assert "ENGINE_DEBUG" in line


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EACCES, 2), (errno.EROFS, 2), (errno.ENAMETOOLONG, 2)],
)
def test_what_the_user_can_mend_has_its_path_and_no_trace(
    number: int, code: int, cli: Any, traces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, OSError(number, os.strerror(number), "/a/b"))
    outcome = cli("report", "x")
    assert outcome.code == code
    assert outcome.err == f"engine: /a/b: {os.strerror(number)}\n"
    assert not traces.exists()


def test_a_value_error_of_another_package_is_unforeseen(
    cli: Any, traces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says nothing of what the user gave."""

    def fail(*arguments: Any, **keys: Any) -> None:
        int("x")

    monkeypatch.setattr(html_report, "write", fail)
    outcome = cli("report", "x")
    assert outcome.code == 1
    assert "unforeseen ValueError: invalid literal" in outcome.err


def test_ctrl_c_is_no_error(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    outcome = cli("report", "x")
    assert (outcome.code, outcome.err.strip()) == (130, "engine: interrupted")
