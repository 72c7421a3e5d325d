"""Training in float16 with a gradient scaler: what a step computes, and that an overflow leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import config, methods, models
from engine.common.stopping import Interrupted
from engine.pipelines.base import Batch
from engine.runs import lifecycle
from engine.system import precision
from engine.training.learner import Learner
from tests.fake_cuda import FakeCuda
from tests.fake_cuda.journal import of
from tests.runs.test_resume import StopAt, assert_same_run
from tests.training.test_cuda_step import hot_step

OVERFLOWS = 2.0**40
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "awp": {"awp": {"gamma": 0.005}},
    "clipped": {"optim": {"clip_norm": 0.5}},
    "micro-batches": {"micro_batch": 4},
    "all": {"awp": {"gamma": 0.005}, "optim": {"clip_norm": 0.5}, "micro_batch": 4},
}
variants = pytest.mark.parametrize("keys", VARIANTS.values(), ids=VARIANTS)


def learner(amp_dtype: str, keys: dict[str, Any]) -> Learner:
    base = {
        "method": "at", "model": "resnet8", "device": "cpu", "amp": True, "amp_dtype": amp_dtype, "batch_size": 8,
        "attack": {"num_steps": 1, "random_start": "none", "epsilon": 0, "step_size": 0},
    }  # fmt: skip
    run = config.load(base, keys)
    place = precision.choose(run)
    torch.manual_seed(0)
    student = place.place(models.build("resnet8", 4)).train()
    return Learner(student, {}, methods.get("at", semantics=run.semantics, loss=run.loss), run, place)


def batch(seed: int = 1) -> Batch:
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return Batch(images.to(memory_format=torch.channels_last), torch.arange(8) % 4, torch.arange(8))


def state(one: Learner) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in one.student.state_dict().items()}


def weights(one: Learner) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in one.student.parameters()])


@variants
def test_a_step_is_that_of_float32_up_to_rounding(keys: dict[str, Any]) -> None:
    updates = []
    for amp_dtype in ("float16", "float32"):
        one = learner(amp_dtype, keys)
        before = weights(one)
        one.learn(batch(), one.method, 0.1)
        updates.append(weights(one) - before)
    half, full = updates
    assert one.scaler.is_enabled() is False
    assert 0 < float((half - full).norm() / full.norm()) < 0.15


@variants
def test_a_step_that_overflows_leaves_the_weights_and_finite_statistics(keys: dict[str, Any]) -> None:
    one = learner("float16", keys)
    one.scaler.load_state_dict(one.scaler.state_dict() | {"scale": OVERFLOWS})
    before = weights(one)
    one.learn(batch(), one.method, 0.1)
    assert torch.equal(weights(one), before)
    assert one.scaler.get_scale() == OVERFLOWS / 2
    assert all(value.isfinite().all() for value in state(one).values())
    one.scaler.update(1024.0)
    one.learn(batch(), one.method, 0.1)
    assert not torch.equal(weights(one), before)
    assert all(value.isfinite().all() for value in state(one).values())


def test_a_checkpoint_holds_the_scale() -> None:
    one, other = (learner("float16", {}) for _ in range(2))
    one.scaler.load_state_dict(one.scaler.state_dict() | {"scale": OVERFLOWS})
    one.learn(batch(), one.method, 0.1)
    other.student.load_state_dict(one.student.state_dict())
    other.load_state_dict(one.state_dict())
    assert other.scaler.state_dict() == one.scaler.state_dict()
    assert other.scaler.state_dict()["scale"] == OVERFLOWS / 2


def test_a_resumed_run_is_the_whole_one(tiny: Any, tmp_path: Path) -> None:
    keys = {"method": "at", "amp": True, "amp_dtype": "float16", "device": "cpu"}
    whole = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "whole")))
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(**keys, out=str(tmp_path / "parts")), StopAt(3))
    lifecycle.resume(tmp_path / "parts")
    assert_same_run(whole.path, tmp_path / "parts")
    assert torch.load(whole.path / "last.pt", weights_only=True)["scaler"]["scale"] > 0


@pytest.mark.parametrize("method", ["iad1", "adaad"])
@pytest.mark.parametrize("keys", [VARIANTS[name] for name in ("plain", "awp", "clipped")], ids=str)
def test_a_step_on_a_gpu_never_waits_for_it(method: str, keys: dict[str, Any], fake_cuda: FakeCuda) -> None:
    calls = fake_cuda.run(hot_step, method, {"amp_dtype": "float16", "graphs": "step", **keys})["calls"]
    assert of("kernel", calls)
    assert not [call for call in calls if call["call"] in ("synchronize", "copy_and_wait")]
