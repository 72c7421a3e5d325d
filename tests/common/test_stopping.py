"""Effects of the first signal, and of the second."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from engine.common import stopping
from engine.common.stopping import EXIT_INTERRUPTED, SIGNALS, Interrupted, graceful_stop


@pytest.fixture(autouse=True)
def _signals_are_heard() -> Iterator[None]:
    """Also where the tests run under nohup, or in the background of a script."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(number: signal.Signals) -> None:
    said: list[str] = []
    with graceful_stop(said.append) as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert said == [f"{number.name}: stopping at the next safe point; once more to stop at once"]


def test_the_launcher_s_echo_is_no_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with graceful_stop(said.append, launched=True) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        assert len(said) == 1
        monkeypatch.setattr(stopping, "ECHO_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_the_first_signal_is_the_first_although_another_process_was_asked_before() -> None:
    with graceful_stop(lambda said: None) as stop:
        stop.requested = True
        signal.raise_signal(signal.SIGTERM)


def test_a_terminal_that_is_closed_is_a_signal_as_any_other() -> None:
    with graceful_stop(lambda said: None) as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.requested


def test_under_nohup_it_is_none() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with graceful_stop(lambda said: None) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("error", [Interrupted, ValueError, None])
def test_from_python_signals_are_as_before(error: type[Exception] | None) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with nullcontext() if error is None else pytest.raises(error), graceful_stop(lambda said: None):
        if error is not None:
            raise error
    assert [signal.getsignal(number) for number in SIGNALS] == before


ENDING = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from engine.commands import cli
from engine.common import stopping

def train(**keys):
    try:
        with stopping.graceful_stop(lambda said: None) as stop:
            os.kill(os.getpid(), signal.{first})
            stop.check()
    finally:
        os.kill(os.getpid(), signal.{second})

cli.commands.main = train
try:
    cli.main()
finally:
    os.kill(os.getpid(), signal.{second})
    time.sleep(0.05)
"""


@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("second", ["SIGTERM", "SIGHUP"])
def test_a_signal_on_the_way_out_does_not_change_the_exit_code(first: str, second: str, tmp_path: Path) -> None:
    script = ENDING.format(first=first, second=second)
    root = str(Path(__file__).resolve().parents[2])
    found = subprocess.run([sys.executable, "-c", script, root], capture_output=True, text=True, cwd=tmp_path)
    assert (found.returncode, found.stderr) == (EXIT_INTERRUPTED, ""), found  # Interrupted has no message here


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_command_that_saves_nothing_ends_with_130_too(number: str, tmp_path: Path) -> None:
    script = "import os, signal, sys\nsys.path.insert(0, sys.argv[1])\nfrom engine.commands import cli\n"
    script += f"cli.commands.main = lambda **keys: os.kill(os.getpid(), signal.{number})\ncli.main()"
    root = str(Path(__file__).resolve().parents[2])
    found = subprocess.run([sys.executable, "-c", script, root], capture_output=True, text=True, cwd=tmp_path)
    assert (found.returncode, found.stderr) == (EXIT_INTERRUPTED, "engine: interrupted\n"), found
