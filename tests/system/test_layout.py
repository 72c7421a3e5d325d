"""Channels-last from the pipeline to the weights' gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine import config, methods, models
from engine.pipelines.base import Batch
from engine.runs import lifecycle
from engine.system import layout
from engine.system.precision import Precision
from engine.training.learner import Learner

CPU = torch.device("cpu")
PRECISIONS = {"float32": Precision(CPU, torch.float32), "amp": Precision(CPU, torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("method", ["at", "trades", "iad1", "iad2"])
@pytest.mark.parametrize("amp", [False, True])
def test_a_run_is_channels_last(
    method: str, amp: bool, tiny: Any, tmp_path: Path, bf16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_DEBUG", "1")
    keys = {"method": method, "amp": amp, "epochs": 1, "loss": {"warmup": 0}, "eval": {"final": []}}
    lifecycle.train(tiny.config(**keys, out=str(tmp_path / "run")))


def run_step(name: str, precision: Precision, mode: Any = None) -> None:
    student, at, st = (precision.place(models.build(name, 4)) for _ in range(3))
    for teacher in (at, st):
        teacher.eval().requires_grad_(False)
    run = config.load({"method": "iad2", "attack": {"num_steps": 2}})
    method = methods.get("iad2")
    learner = Learner(student, {"teacher": at, "teacher_st": st}, method, run, precision)
    x = torch.rand(4, 3, 16, 16).to(memory_format=torch.channels_last)
    with mode or torch.enable_grad():
        learner.learn(Batch(x, torch.arange(4), torch.arange(4)), method, run.lr)


@pytest.mark.parametrize("name", ["resnet18", "preactresnet18", "mobilenetv2"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_architecture_is_channels_last(
    name: str, precision: str, bf16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_DEBUG", "1")
    run_step(name, PRECISIONS[precision])


class Conversions(TorchDispatchMode):
    """Notes each op that copies an image or an activation into another layout."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops += 1
        inputs = [value for value in args if isinstance(value, Tensor) and value.dim() == 4]
        if isinstance(out, Tensor) and out.dim() == 4 and inputs and strided(inputs[0]) != strided(out):
            self.found.append(f"{func} {tuple(inputs[0].shape)} {inputs[0].stride()} to {out.stride()}")
        return out


def strided(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_is_converted_into_another_layout(precision: str, bf16: None) -> None:
    conversions = Conversions()
    run_step("resnet8", PRECISIONS[precision], conversions)
    assert conversions.ops > 100
    # The network ends in a mean over H and W, whose gradient is NCHW; BatchNorm's backward turns it, once a pass.
    last = [line for line in conversions.found if line.startswith("aten.clone.default (4, 64, 4, 4)")]
    assert len(last) == 4  # two steps of the attack, x~ and x
    assert all(line in last or line.startswith("aten.expand") for line in conversions.found)


class Turning(nn.Module):
    """Two convolutions, of which the second one's input or gradient has another layout."""

    def __init__(self, backwards: bool) -> None:
        super().__init__()
        self.first, self.second, self.backwards = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), backwards

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.second(Turn.apply(x) if self.backwards else x.contiguous())
        return out


class Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


@pytest.mark.parametrize(("backwards", "words"), [(False, "second: its input"), (True, "first: its gradient")])
def test_a_broken_layout_is_named(backwards: bool, words: str) -> None:
    net = Turning(backwards).to(memory_format=torch.channels_last)
    layout.check_channels_last(net)
    x = torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last)
    with pytest.raises(AssertionError, match=words):
        net(x).square().sum().backward()


@pytest.mark.parametrize(("value", "wanted"), [("", False), ("0", False), ("1", True)])
def test_debugging_is_asked_for(value: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_DEBUG", value)
    assert layout.is_debug() == wanted
