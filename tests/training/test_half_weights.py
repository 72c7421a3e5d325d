"""Training on half-precision copies of the weights that the optimizer writes: the bits are autocast's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from engine import config, methods, models
from engine.pipelines.base import Batch
from engine.system import precision
from engine.system.distributed import World
from engine.training.learner import Learner
from engine.training.weights import half_weights

BATCH, CLASSES, SIDE = 8, 4, 8


@pytest.fixture(autouse=True)
def fast_half(bf16: None) -> None:
    """bfloat16 is what --amp chooses."""


def learner(method: str, *, halves: bool, student: nn.Module | None = None, **keys: Any) -> Learner:
    """A learner of a small network; without half weights by autocast alone."""
    base = {
        "method": method, "model": "resnet8", "device": "cpu", "amp": True, "amp_dtype": "bfloat16",
        "batch_size": BATCH, "attack": {"num_steps": 2},
    }  # fmt: skip
    run = config.load(base, keys)
    place = precision.choose(run)
    torch.manual_seed(0)
    student, at, st = (place.place(net) for net in (student or network(), network(), network()))
    row = methods.get(method, semantics=run.semantics, loss=run.loss)
    build = half_weights.build if halves else mock.Mock(return_value=None)
    with mock.patch.object(half_weights, "build", build):
        teachers = {"teacher": at.eval(), "teacher_st": st.eval()}
        return Learner(student.train(), teachers, row, run, place, World())


def network() -> nn.Module:
    return models.build("resnet8", CLASSES)


def batches(count: int) -> Iterator[Batch]:
    for seed in range(count):
        images = torch.rand(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
        yield Batch(
            images.to(memory_format=torch.channels_last), torch.arange(BATCH) % CLASSES, torch.arange(BATCH)
        )


def learn(one: Learner, count: int = 3) -> dict[str, Tensor]:
    for batch in batches(count):
        one.learn(batch, one.method, 0.05, epoch=5)
    momenta = {
        f"momentum {number}": state["momentum_buffer"].clone()
        for number, state in one.optimizer.state_dict()["state"].items()
    }
    return {name: value.clone() for name, value in one.student.state_dict().items()} | momenta


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("method", methods.METHODS)
def test_the_bits_are_those_of_autocast(method: str) -> None:
    one = learner(method, halves=True)
    assert one.halves is not None
    assert_same(learn(one), learn(learner(method, halves=False)))
