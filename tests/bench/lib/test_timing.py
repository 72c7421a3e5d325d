"""Turns, counts and clocks, with times made by hand."""

from __future__ import annotations

import gc
import os

import pytest

from bench.lib.timing import Call, Candidate, HostClock, calls_within, interleaved, preferring, rotated, warm_up


class Script:
    """A clock that tells the next number of its script, and notes what it was asked."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = iter(numbers)
        self.asked: list[tuple[object, int, str | None, bool]] = []

    def seconds(self, call: Call, count: int) -> float:
        self.asked.append((call(), count, os.environ.get("ENGINE_KERNELS"), gc.isenabled()))
        return next(self.numbers)


def test_a_round_begins_with_the_next_item_each_time() -> None:
    assert [rotated("abc", turn) for turn in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def test_candidates_take_turns_with_their_own_counts_and_preferences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KERNELS", "triton")
    candidates = [Candidate("slow", lambda: "S"), Candidate("fast", lambda: "F", preference="native")]
    clock = Script(1, 2, 3, 4, 5, 6)
    samples = interleaved(candidates, [7, 9], clock, rounds=3)
    assert samples == {"slow": [1, 4, 5], "fast": [2, 3, 6]}
    slow, fast = ("S", 7, "auto", False), ("F", 9, "native", False)
    assert clock.asked == [slow, fast, fast, slow, slow, fast]
    assert gc.isenabled()
    assert os.environ["ENGINE_KERNELS"] == "triton"


def test_the_warm_up_calls_first_and_counts_by_the_time_that_its_last_timing_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    told = iter((50.0, 50.012))
    monkeypatch.setattr("time.perf_counter", lambda: next(told))
    candidate = Candidate("x", lambda: calls.append(os.environ["ENGINE_KERNELS"]), "native")
    assert warm_up(candidate, Script(100.0, 100.0), 0.02) == 5
    assert calls == ["native"] * 3


@pytest.mark.parametrize(("per_call", "count"), [(0.02, 1), (3.0, 1), (0.0041, 5), (0.0039, 5), (1e-9, 1000)])
def test_calls_fill_the_time_of_a_round(per_call: float, count: int) -> None:
    assert calls_within(0.02, per_call) == count


def test_a_preference_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGINE_KERNELS", raising=False)
    with preferring("reference"):
        assert os.environ["ENGINE_KERNELS"] == "reference"
    assert "ENGINE_KERNELS" not in os.environ


def test_the_host_clock_gives_the_mean_of_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    told, calls = iter((10.0, 16.0)), []
    monkeypatch.setattr("time.perf_counter", lambda: next(told))
    assert HostClock().seconds(lambda: calls.append(1), 4) == 1.5
    assert len(calls) == 4
