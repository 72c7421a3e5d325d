"""Ops of a step by region: the sums over events made by hand, and a real step whose ops can be counted."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace as Made
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bench import profile
from bench.lib.machine import Facts
from bench.profile import NETWORK, NODE, STEP, Group, summed
from engine import models
from engine.config import load
from tests.bench.readme import documented

CPU, GPU = Made(name="CPU"), Made(name="CUDA")
"""Attributes that the profiler's events have."""


class Events(list[Any]):
    """Events in the order of their start."""

    def add(self, name: str, parent: Any = None, *, number: int = -1, total: float = 0, kernels: Any = ()) -> Any:
        event = Made(
            name=name, cpu_parent=parent, sequence_nr=number, device_type=CPU, time_range=Made(start=len(self)),
            cpu_time_total=total, self_cpu_time_total=total / 10,
            kernels=[Made(name=kernel, duration=duration) for kernel, duration in kernels],
        )  # fmt: skip
        self.append(event)
        return event


def test_what_the_backward_runs_belongs_to_the_range_that_made_its_node() -> None:
    events = Events()
    step = events.add(STEP, total=1000)
    network = events.add(NETWORK, step, total=100)
    events.add("aten::mm", events.add("aten::linear", network, number=0, total=50), number=0, total=40)
    # A number is told to every op that begins before the node is made: the last one made it.
    events.add("aten::detach", network, number=1, total=5)
    loss = events.add("loss", step, total=200)
    fused = events.add("FusedDistillLoss", loss, number=1, total=100)
    events.add("aten::empty", fused, total=3)
    events.add("aten::empty", fused, total=4)
    node = events.add(f"{NODE}FusedDistillLossBackward", number=1, total=30)
    events.add("aten::mul", events.add("FusedDistillLossBackward", node, number=1, total=20), total=7)
    node = events.add(f"{NODE}AddmmBackward0", number=0, total=60)
    events.add("aten::mm", node, total=50)
    events.add("aten::detach", events.add(f"{NODE}torch::autograd::AccumulateGrad", total=8), total=2)
    events.add("aten::ones_like", total=1)
    events.reverse()  # whatever the order they come in
    assert summed(events) == {
        Group(STEP, "forward", "host", "between the ops"): (1, 100.0),
        Group(STEP, "forward", "op", "aten::ones_like"): (1, 1),
        Group(NETWORK, "forward", "host", "between the ops"): (1, 10.0),
        Group(NETWORK, "forward", "op", "aten::linear"): (1, 50),
        Group(NETWORK, "forward", "op", "aten::detach"): (1, 5),
        Group(NETWORK, "backward", "host", "between the ops"): (2, 6.8),
        Group(NETWORK, "backward", "op", "aten::mm"): (1, 50),
        Group(NETWORK, "backward", "op", "aten::detach"): (1, 2),
        Group("distill_loss", "forward", "host", "between the ops"): (2, 30.0),
        Group("distill_loss", "forward", "op", "aten::empty"): (2, 7),
        Group("distill_loss", "backward", "host", "between the ops"): (2, 5.0),
        Group("distill_loss", "backward", "op", "aten::mul"): (1, 7),
    }


def test_the_innermost_range_counts() -> None:
    events = Events()
    attack = events.add("attack", events.add(STEP))
    forward = events.add("attack: forward", attack)
    events.add("aten::add", events.add(NETWORK, forward))
    events.add("aten::nll_loss", forward)
    events.add("aten::sign", events.add("attack: update", attack))
    ops = {group.name: group.region for group in summed(events) if group.kind == "op"}
    assert ops == {"aten::add": NETWORK, "aten::sign": "pgd_update", "aten::nll_loss": "rest of the attack"}


def test_kernels_are_counted_wherever_they_are_launched_from() -> None:
    events = Events()
    update = events.add("attack: update", kernels=[("_update_kernel", 3.0), ("attack: update", 9.0)])  # its range
    outer = events.add("aten::sum", update, kernels=[("reduce", 2.0)])
    events.add("aten::fill_", outer, kernels=[("reduce", 4.0)])
    on_device = events.add("_update_kernel")
    on_device.device_type = GPU
    assert summed(events) == {
        Group("pgd_update", "forward", "host", "between the ops"): (1, 0),
        Group("pgd_update", "forward", "op", "aten::sum"): (1, 0),
        Group("pgd_update", "forward", "kernel", "_update_kernel"): (1, 3.0),
        Group("pgd_update", "forward", "kernel", "reduce"): (2, 6.0),
    }


def test_a_step_of_iad2_has_the_ops_that_its_definition_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the reference, whose ops are known; convolutions lie in the networks, and in the attack's step."""
    monkeypatch.setenv("ENGINE_KERNELS", "reference")
    arguments = ["--model", "resnet8", "--batch-size", "2", "--device", "cpu", "--out", str(tmp_path)]
    ended = CliRunner().invoke(profile.main, arguments)
    assert ended.exit_code == 0, ended.output
    with (tmp_path / "profile-iad2-resnet8.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    facts = documented("kernels.csv")[: len(Facts.__annotations__)]
    assert list(rows[0]) == [*facts, *documented("profile-METHOD-MODEL.csv")]
    assert rows[0]["served"] == (
        "distill_loss reference, random_start reference, pgd_update reference, fab_step reference, "
        "crop_flip reference, conv3x3 reference, image_conv3x3 reference, batch_norm reference, "
        "batch_sums reference, sgd_update reference"
    )
    calls: dict[tuple[str, str, str], int] = defaultdict(int)
    for row in rows:
        calls[row["region"], row["direction"], row["name"]] = int(row["calls"])

    steps = load({"method": "iad2"}).attack.num_steps
    layers = sum(isinstance(module, torch.nn.Conv2d) for module in models.build("resnet8", 10).modules())
    assert calls[NETWORK, "forward", "aten::conv2d"] == (steps + 4) * layers  # S(x~), S(x), T_at(x~), T_st(x~)
    # The attack's gradient ends before the first layer, and its step begins with that layer's.
    assert calls[NETWORK, "backward", "aten::convolution_backward"] == steps * (layers - 1) + 2 * layers
    assert calls["pgd_update", "forward", "aten::convolution_backward"] == steps
    assert calls["distill_loss", "forward", "aten::kl_div"] == 3
    assert calls["distill_loss", "forward", "aten::cross_entropy_loss"] == 1
    assert calls["distill_loss", "backward", "aten::nll_loss_backward"] == 1
    assert calls["pgd_update", "forward", "aten::sign"] == steps
    assert calls["rest of the attack", "forward", "aten::cross_entropy_loss"] == steps
    assert calls["rest of the attack", "backward", "aten::nll_loss_backward"] == steps
    assert calls["crop_flip", "forward", "aten::index_select"] == 1
    assert calls["random_start", "forward", "aten::copy_"] == 1
    assert not any(name == "aten::argsort" for *_, name in calls)  # the order of the epoch is there already
    places = {key[:2] for key in calls if "conv" in key[2] or "batch_norm" in key[2]}
    assert places == {(NETWORK, "forward"), (NETWORK, "backward"), ("pgd_update", "forward")}


def test_every_region_is_that_of_a_range() -> None:
    assert set(profile.REGIONS) <= profile.RANGES


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--method", "iad3"], "iad3"), (["--model", "resnet9"], "resnet9"), (["--device", "cuda:99"], "cuda:99")],
)
def test_a_wrong_argument_is_named(arguments: list[str], named: str) -> None:
    ended = CliRunner().invoke(profile.main, arguments)
    assert ended.exit_code == 2
    assert named in ended.output
