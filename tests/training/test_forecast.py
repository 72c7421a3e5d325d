"""Forecast of a training: seconds a step, the operations that are left, and memory."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from engine import config, methods
from engine.common import host_memory
from engine.training.performance.forecast import ImageCounts, Operations, StepClock, operations, peak_memory, told


class Clock:
    """Seconds that are set by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def measured(steps: list[float], *, every: int | None, ends: bool = True) -> tuple[int, float] | None:
    """After which step, and what the clock told. steps: seconds of each. every: the host waits after so many."""
    now = Clock()
    clock, found = StepClock(is_synchronous=every is None, now=now), []
    for number, seconds in enumerate(steps, 1):
        now.seconds += seconds
        last = ends and number == len(steps)
        waited = last or (every is not None and number % every == 0)
        if (told := clock.after_step(has_waited=waited, ends_epoch=last)) is not None:
            found.append((number, told))
    assert len(found) <= 1
    return found[0] if found else None


def test_the_first_steps_are_left_out() -> None:
    assert measured([60, 5, 1, *[1.0] * 20], every=None) == (8, 1.0)
    assert measured([60, *[2.0] * 200], every=50) == (100, 2.0)
    assert measured([60, *[0.001] * 200], every=50, ends=False) is None  # not five seconds yet


def test_a_short_epoch_is_measured_as_a_whole() -> None:
    assert measured([3, 1], every=None) == (2, 2.0)
    assert measured([5, 1, 1, 1, 1, 1], every=None) == (6, 1.0)
    assert measured([9, 1, 1, 1], every=50) == (4, 3.0)


def test_operations_by_hand() -> None:
    """AT with 10 steps: 10 passes with a gradient of the images, one trained; the first layer is a fifth."""
    run = config.load({"method": "at", "epochs": 4, "eval": {"attack": "pgd20", "final": ["natural", "fgsm"]}})
    method = methods.get("at", semantics=run.semantics, loss=run.loss)
    work = operations(run, method, (5.0, 1.0), ImageCounts(100, 10, 1000))
    assert run.attack.num_steps == 10
    assert work.training == (100 * (10 * 2 * 5 + 3 * 5 - 1),) * 4
    assert work.evaluation == 10 * (5 + 20 * 2 * 5 + 5)
    assert work.final == 2 * 1000 * (5 + 2 * 5 + 5)
    assert work.unknown == ()
    assert work.left(1, 0.25) == 11_400 * (0.75 + 2) + 3 * 2_100 + 40_000


def test_an_attack_whose_steps_grow_costs_what_it_has() -> None:
    run = config.load({"method": "at", "epochs": 4, "attack": {"num_steps": 3, "steps_warmup": 3}})
    method = methods.get("at", semantics=run.semantics, loss=run.loss)
    work = operations(run, method, (5.0, 1.0), ImageCounts(100, 10, 1000))
    assert work.training == tuple(100 * (steps * 2 * 5 + 14) for steps in (1, 2, 3, 3))


def test_a_warm_up_and_unknown_attacks_count() -> None:
    run = config.load({"method": "iad1", "epochs": 4, "loss": {"warmup": 2}, "eval": {"final": ["aa", "pgd10"]}})
    method = methods.get("iad1", semantics=run.semantics, loss=run.loss)
    work = operations(run, method, (5.0, 1.0), ImageCounts(100, 10, 1000))
    first, second, third, fourth = work.training
    assert first == second < third == fourth
    assert work.unknown == ("AA",)
    assert work.final == 2 * 1000 * (10 * 2 * 5 + 5)


@pytest.mark.parametrize(
    ("epoch", "unknown", "words"),
    [
        (0, (), "about 2 h 10 min for 200 epochs, evaluations included"),
        (80, ("AA",), "about 2 h 10 min for the 120 epochs that are left, evaluations included but for AA"),
        (199, (), "about 2 h 10 min for the 1 epoch that is left, evaluations included"),
    ],
)
def test_words(epoch: int, unknown: tuple[str, ...], words: str) -> None:
    assert told(Operations((1.0,) * 200, 0.0, 0.0, unknown), epoch, 7800.0) == words


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the peak of a process")
def test_the_peak_of_the_process_is_what_the_kernel_counts() -> None:
    torch.ones(2**26)
    peak, total = host_memory.peak(), host_memory.total()
    assert peak is not None
    assert total is not None
    # The kernel's count of the process may be of the program that it was before, too.
    assert 2**28 < peak <= max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, peak) < total
    assert peak_memory(torch.device("cpu")).startswith("peak memory so far ")


def test_unknown_memory_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "peak", lambda: None)
    assert peak_memory(torch.device("cpu")) == ""
