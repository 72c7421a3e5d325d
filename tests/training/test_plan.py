"""Number of passes of a step, against the forwards that it runs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench.lib.steps.variants import Flops
from engine import config, methods, models
from engine.pipelines.base import Batch
from engine.system.precision import Precision, full_precision
from engine.training import plan
from engine.training.learner import Learner
from engine.training.performance.speed import Speedometer, forward_flops

F64 = Precision(torch.device("cpu"), torch.float64)


@pytest.mark.parametrize(
    ("method", "semantics", "passes"),
    [
        ("st", "paper", (0, 1, 0)),
        ("at", "paper", (10, 1, 0)),
        ("trades", "paper", (10, 2, 2)),  # the attack's target S(x), and an idle S(x)
        ("ard", "paper", (10, 1, 2)),  # S(x) for BatchNorm's sake, T(x)
        ("ard", "official", (10, 2, 1)),
        ("iad1", "paper", (10, 2, 2)),
        ("iad1", "official", (10, 2, 4)),  # two idle forwards
        ("akd2", "paper", (10, 1, 2)),
        ("iad2", "paper", (10, 2, 2)),
        ("mart", "paper", (10, 2, 0)),
        ("fgsm-rs", "paper", (1, 1, 0)),
        ("n-fgsm", "paper", (1, 1, 0)),
        ("rslad", "paper", (10, 2, 1)),  # T(x) serves the attack and both terms
        ("adaad", "paper", (20, 1, 2)),  # the teacher in every step; S(x) for BatchNorm's sake, T(x~)
        ("adaiad", "paper", (20, 2, 2)),  # an idle S(x), T(x~)
        ("adaiad", "official", (20, 2, 3)),
        ("mtard", "paper", (10, 2, 2)),
        ("saad", "paper", (11, 2, 3)),  # the gradient of T(x)_y; T(x~), T(x-), S(x) for BatchNorm's sake
        ("ard+igdm", "paper", (10, 2, 4)),  # S(x), T(x), T(x~), T(x-)
    ],
)
def test_passes(method: str, semantics: str, passes: tuple[int, int, int]) -> None:
    run = config.load({"method": method, "semantics": semantics})
    row = methods.get(method, semantics=semantics, loss=run.loss)
    assert plan.passes(row, run.attack, run.forwards) == passes


@pytest.mark.parametrize(("idle", "forward"), [("iad1", 2), (True, 1), (False, 1)])
def test_the_warm_up_has_idle_forwards_of_its_own(idle: bool | str, forward: int) -> None:
    run = config.load({"method": "iad1", "semantics": "official", "forwards": {"idle": idle}})
    row = methods.get("iad1", semantics="official").warmup
    assert row is not None
    assert plan.passes(row, run.attack, run.forwards, in_warmup=True) == (10, 2, forward)


@pytest.mark.parametrize("semantics", ["paper", "official"])
@pytest.mark.parametrize("method", list(methods.METHODS))
def test_the_plan_s_operations_are_those_that_are_executed(method: str, semantics: str) -> None:
    run = config.load({"method": method, "semantics": semantics, "attack": {"num_steps": 3}})
    row = methods.get(method, semantics=semantics, loss=run.loss)
    student, at, st = (models.build("resnet8", 4).double() for _ in range(3))
    for teacher in (at, st):
        teacher.eval().requires_grad_(False)
    learner = Learner(student, {"teacher": at, "teacher_st": st}, row, run, F64)
    batch = Batch(torch.rand(5, 3, 16, 16, dtype=torch.float64), torch.arange(5) % 4, torch.arange(5))
    with Flops() as counted:
        learner.learn(batch, row, run.lr)
    forward, first = forward_flops(student, (3, 16, 16))
    expected = 5 * plan.passes(row, run.attack, run.forwards).flops(forward, first)
    assert counted.total == pytest.approx(expected, rel=1e-12)


def test_operations_of_a_forward_in_closed_form() -> None:
    """ResNet-8 on 16x16 images, with projections in its last two blocks."""
    stem = 2 * 16 * 16**2 * 3 * 9
    stages = (
        2 * 2 * 16 * 16**2 * 16 * 9
        + 2 * 32 * 8**2 * (16 * 9 + 32 * 9 + 16)
        + 2 * 64 * 4**2 * (32 * 9 + 64 * 9 + 32)
    )
    linear = 2 * 64 * 4
    assert forward_flops(models.build("resnet8", 4), (3, 16, 16)) == (stem + stages + linear, stem)


def test_the_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.training.performance import speed

    monkeypatch.setattr(speed, "peak_flops_per_second", lambda _: 1e9)
    net = models.build("resnet8", 4)
    forward, first = forward_flops(net, (3, 8, 8))
    share = Speedometer(net, (3, 8, 8), F64).share(50, plan.Passes(10, 2, 2))
    assert share == pytest.approx(50 * (20 * forward + 2 * (3 * forward - first) + 2 * forward) / 1e9)


def test_the_peak_is_that_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.training.performance import speed

    monkeypatch.setitem(speed._SIDE, "cpu", 64)
    clock = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0, 30.0, 33.0, 40.0, 45.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert speed.peak_flops_per_second(F64) == 2 * 64**3 / 1.0


@pytest.mark.parametrize("convolutions", ["ieee", "tf32"])
def test_the_peak_is_that_of_the_convolutions_format_and_of_random_numbers(
    convolutions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.training.performance import speed

    products = torch.backends.cuda.matmul
    seen: list[tuple[str, int]] = []

    class Noting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.Tensor.matmul, torch.Tensor.__matmul__):
                seen.append((products.fp32_precision, len(args[0].unique())))
            return func(*args, **(kwargs or {}))

    before = products.fp32_precision
    monkeypatch.setitem(speed._SIDE, "cpu", 16)
    random_state = torch.get_rng_state()
    with full_precision() if convolutions == "ieee" else nullcontext(), Noting():
        speed.peak_flops_per_second(Precision(torch.device("cpu"), torch.float32))
    assert seen == [(convolutions, 256)] * 5
    assert products.fp32_precision == before
    assert torch.equal(torch.get_rng_state(), random_state)
