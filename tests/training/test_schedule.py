"""The learning rate, against torch's own schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from engine import config, methods
from engine.config import AttackSpec
from engine.training import schedule

EPOCHS, STEPS = 10, 7


def rates(**keys: Any) -> list[float]:
    complete = config.load({"method": "at", "epochs": EPOCHS, "lr": 0.2}, keys)
    return [schedule.learning_rate(complete, step, STEPS) for step in range(EPOCHS * STEPS)]


def torchs(make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], lr: float = 0.2) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=lr)
    scheduler, found = make(optimizer), []
    for _ in range(EPOCHS * STEPS):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


def test_milestones() -> None:
    expected = torchs(lambda sgd: lr_scheduler.MultiStepLR(sgd, [5 * STEPS, 8 * STEPS], 0.1))
    assert rates(optim={"milestones": [0.5, 0.75]}) == pytest.approx(expected, rel=1e-9)


def test_cosine() -> None:
    expected = torchs(lambda sgd: lr_scheduler.CosineAnnealingLR(sgd, EPOCHS * STEPS))
    assert rates(optim={"schedule": "cosine"}) == pytest.approx(expected, rel=1e-9)


def test_one_cycle() -> None:
    expected = torchs(lambda sgd: lr_scheduler.OneCycleLR(sgd, 0.2, EPOCHS * STEPS, cycle_momentum=False))
    assert rates(optim={"schedule": "one-cycle"}) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("steps_per_epoch", [7, 2])
def test_cyclic(steps_per_epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up from 0 to the middle of the run, and down again; the middle may fall between two steps."""
    monkeypatch.setattr("tests.training.test_schedule.STEPS", steps_per_epoch)
    half: Any = 9 * steps_per_epoch / 2  # torch's annotation knows whole numbers alone
    monkeypatch.setattr("tests.training.test_schedule.EPOCHS", 9)
    expected = torchs(lambda sgd: lr_scheduler.CyclicLR(sgd, 0.0, 0.2, half, half, cycle_momentum=False))
    found = rates(optim={"schedule": "cyclic"})
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found[0] == 0
    assert max(found) == pytest.approx(0.2, rel=1 / half)


@pytest.mark.parametrize("kind", ["milestones", "cosine"])
def test_the_warm_up_rises_linearly_and_then_the_schedule_begins(kind: str) -> None:
    warmup = 2 * STEPS
    found = rates(optim={"schedule": kind, "lr_warmup": 2})
    linear = torchs(lambda sgd: lr_scheduler.LinearLR(sgd, 1 / warmup, 1.0, warmup - 1))
    assert found[:warmup] == pytest.approx(linear[:warmup], rel=1e-9)
    assert found[warmup] == 0.2
    if kind == "cosine":
        rest = torchs(lambda sgd: lr_scheduler.CosineAnnealingLR(sgd, EPOCHS * STEPS - warmup))
        assert found[warmup:] == pytest.approx(rest[: len(found) - warmup], rel=1e-9)


@pytest.mark.parametrize("kind", ["milestones", "cosine", "one-cycle"])
def test_a_linear_scale_multiplies_by_batches_of_128(kind: str) -> None:
    plain = rates(optim={"schedule": kind}, batch_size=512)
    scaled = rates(optim={"schedule": kind}, batch_size=512, lr_scale="linear")
    assert scaled == pytest.approx([4 * lr for lr in plain])
    assert rates(optim={"schedule": kind}, lr_scale="linear") == rates(optim={"schedule": kind})


@pytest.mark.parametrize("kind", ["one-cycle", "cyclic"])
def test_a_schedule_that_rises_has_a_warm_up_of_its_own(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"optim\.lr_warmup: the {kind} schedule"):
        rates(optim={"schedule": kind, "lr_warmup": 1})


# ---------------------------------------------------------------- epsilon


def attacks(epochs: int = 5, **attack: Any) -> list[AttackSpec]:
    complete = config.load({"method": "at", "epochs": epochs, "attack": attack})
    return [schedule.attack(complete, epoch) for epoch in range(epochs)]


@pytest.mark.parametrize("warmup", [0.6, 3])
def test_epsilon_grows_by_the_epoch(warmup: float) -> None:
    """A third of 8/255, two thirds, and then all of it."""
    found = attacks(epsilon_warmup=warmup, random_start="uniform", start_epsilon=16 / 255)
    parts = [1 / 3, 2 / 3, 1, 1, 1]
    assert [spec.epsilon for spec in found] == pytest.approx([part * 8 / 255 for part in parts])
    assert [spec.step_size for spec in found] == pytest.approx([part * 2 / 255 for part in parts])
    assert [spec.start_epsilon for spec in found] == pytest.approx([part * 16 / 255 for part in parts])
    assert [spec.gaussian_std for spec in found] == pytest.approx([part * 0.001 for part in parts])
    whole = config.load({"method": "at", "attack": {"epsilon_warmup": warmup, "start_epsilon": 16 / 255}}).attack
    assert found[2:] == [whole] * 3


@pytest.mark.parametrize("warmup", [0, 1, 0.05])
def test_without_a_warm_up_epsilon_is_the_same_in_every_epoch(warmup: float) -> None:
    assert [spec.epsilon for spec in attacks(epsilon_warmup=warmup)] == [8 / 255] * 5


def test_a_start_from_the_whole_ball_grows_with_it() -> None:
    assert [spec.start_epsilon for spec in attacks(epsilon_warmup=2)] == [None] * 5


@pytest.mark.parametrize(
    ("num_steps", "warmup", "steps"),
    [
        (4, 4, [1, 2, 3, 4, 4]),
        (10, 4, [1, 4, 7, 10, 10]),
        (3, 0.8, [1, 2, 2, 3, 3]),  # 1, 1 2/3, 2 1/3, 3
        (2, 3, [1, 2, 2, 2, 2]),  # a half is rounded up
        (3, 5, [1, 2, 2, 3, 3]),
        (10, 1, [10] * 5),
        (10, 0, [10] * 5),
        (1, 4, [1] * 5),
        (0, 4, [0] * 5),
    ],
)
def test_steps_grow_from_one_to_all(num_steps: int, warmup: float, steps: list[int]) -> None:
    found = attacks(num_steps=num_steps, steps_warmup=warmup)
    assert [spec.num_steps for spec in found] == steps
    assert {(spec.epsilon, spec.step_size) for spec in found} == {(8 / 255, 2 / 255)}


def test_epsilon_and_steps_grow_side_by_side() -> None:
    found = attacks(num_steps=3, steps_warmup=3, epsilon_warmup=2)
    assert [spec.num_steps for spec in found] == [1, 2, 3, 3, 3]
    assert [spec.epsilon * 255 for spec in found] == pytest.approx([4, 8, 8, 8, 8])


IDLE, LATE = ", and changes nothing", ": the attack does not reach its whole size"


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"attack": {"epsilon_warmup": 1.0}}, f"attack.epsilon_warmup: 1 stands for 1 of 5 epochs{IDLE}"),
        ({"attack": {"epsilon_warmup": 0.2}}, f"attack.epsilon_warmup: 0.2 stands for 1 of 5 epochs{IDLE}"),
        ({"attack": {"steps_warmup": 1}}, f"attack.steps_warmup: 1 stands for 1 of 5 epochs{IDLE}"),
        ({"attack": {"steps_warmup": 3, "num_steps": 1}}, "attack.steps_warmup changes nothing: the attack has"),
        ({"optim": {"lr_warmup": 0.05}}, f"optim.lr_warmup: 0.05 stands for 0 of 5 epochs{IDLE}"),
        ({"method": "iad1", "loss": {"warmup": 0.05}}, f"loss.warmup: 0.05 stands for 0 of 5 epochs{IDLE}"),
        ({"attack": {"epsilon_warmup": 6}}, f"attack.epsilon_warmup: 6 stands for 6 of 5 epochs{LATE}"),
        ({"attack": {"steps_warmup": 6}}, f"attack.steps_warmup: 6 stands for 6 of 5 epochs{LATE}"),
        ({"optim": {"lr_warmup": 6}}, "optim.lr_warmup: 6 stands for 6 of 5 epochs: the rate does not"),
        ({"method": "iad1", "loss": {"warmup": 60}}, "loss.warmup: 60 stands for 60 of 5 epochs: alpha is 1"),
        ({"method": "iad1", "loss": {"warmup": 5}}, "loss.warmup: 5 stands for 5 of 5 epochs: alpha is 1"),
        ({"method": "iad1", "loss": {"warmup": 4}}, None),
        ({"attack": {"epsilon_warmup": 2, "steps_warmup": 0.4}, "optim": {"lr_warmup": 1}}, None),
        ({"attack": {"epsilon_warmup": 5, "steps_warmup": 5}}, None),
        ({"method": "st", "attack": {"epsilon_warmup": 1}, "loss": {"warmup": 0.05}}, None),
        ({"method": "iad1", "loss": {"warmup": 0}}, None),
    ],
)
def test_a_warm_up_that_does_not_fit_the_run_is_told(keys: dict[str, Any], told: str | None) -> None:
    complete = config.load({"method": "at", "epochs": 5}, keys)
    method = methods.get(complete.method, semantics=complete.semantics, loss=complete.loss)
    found = list(schedule.misfit_warmups(complete, method))
    assert [warning[: len(told or "")] for warning in found] == ([] if told is None else [told])


def test_a_warm_up_as_long_as_the_run_ends_with_it() -> None:
    assert [spec.epsilon for spec in attacks(epsilon_warmup=5)] == pytest.approx(
        [e * 8 / 255 / 5 for e in range(1, 6)]
    )
    lr = rates(optim={"schedule": "cosine", "lr_warmup": EPOCHS})
    assert lr == pytest.approx([0.2 * (step + 1) / (EPOCHS * STEPS) for step in range(EPOCHS * STEPS)])
