"""What the first signal does, and what the second."""

from __future__ import annotations

import signal

import pytest

from engine import stopping
from engine.stopping import graceful_stop


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
        monkeypatch.setattr(stopping, "SECONDS_OF_ECHO", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_the_first_signal_is_the_first_although_another_process_was_asked_before() -> None:
    with graceful_stop(lambda said: None) as stop:
        stop.requested = True
        signal.raise_signal(signal.SIGTERM)
