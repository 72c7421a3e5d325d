"""The numbers of a step on the device, and the rates that the optimizer reads there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.training.capture.step_numbers import StepNumbers

CPU = torch.device("cpu")


def optimizer() -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr_scale": scale} for scale in (1.0, 0.3)]
    return torch.optim.SGD(groups, lr=1.0, fused=True)


@settings(deadline=None)
@given(
    lr=st.floats(0, 10),
    epoch=st.integers(0, 2**31 - 1),
    step=st.integers(0, 2**53),
    peak=st.floats(1e-3, 10),
)
def test_every_number_is_there_exactly(lr: float, epoch: int, step: int, peak: float) -> None:
    made = optimizer()
    numbers = StepNumbers(made, CPU, peak)
    numbers.set(lr, epoch, step)
    assert (int(numbers.epoch), int(numbers.step)) == (epoch, step)
    assert numbers.lr_part.dtype == torch.float64
    assert float(numbers.lr_part) == lr / peak
    assert [group["lr"] for group in made.param_groups] == numbers.rates == [lr, lr * 0.3]


def test_rates_on_a_gpu_are_float32_tensors_of_the_optimizer() -> None:
    """Made as for a GPU, on the CPU: its memory lies there, and all else is the same."""
    made, reference = optimizer(), optimizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *shape, pin_memory=False, **keys: torch.empty(*shape, **keys).zero_())
        numbers = StepNumbers(made, CPU, 1.0)
        numbers._on_gpu = True
        numbers.give_rates([1.0, 0.3])
        numbers.set(0.7, 0, 0)
    rates = [group["lr"] for group in made.param_groups]
    assert [float(rate) for rate in rates] == [float(torch.tensor(value)) for value in (0.7, 0.7 * 0.3)]
    for group, lr in zip(reference.param_groups, rates, strict=True):
        group["lr"] = float(lr)
    for one in (made, reference):
        for group in one.param_groups:
            group["params"][0].grad = torch.full((2,), 0.5)
        one.step()
    for mine, theirs in zip(made.param_groups, reference.param_groups, strict=True):
        assert torch.equal(mine["params"][0], theirs["params"][0])
