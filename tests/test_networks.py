"""How the networks of a step are run: compiled or not, watched or not, with or without recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from engine import config, methods, models, networks
from engine.attack import climb
from engine.models.layers import Stage
from engine.precision import Precision
from engine.twin import Twin

CPU = torch.device("cpu")
F32 = Precision(CPU, torch.float32)


@pytest.mark.parametrize(
    ("keys", "device", "compiled"),
    [
        ({}, "cpu", False),
        ({}, "cuda", True),
        ({"compile": "on"}, "cpu", True),
        ({"compile": "off"}, "cuda", False),
        ({"checkpoint_activations": True}, "cuda", False),
    ],
    ids=str,
)
def test_what_is_compiled(keys: dict[str, Any], device: str, compiled: bool) -> None:
    net = models.build("resnet8", 4)
    run = networks.passes(config.load(keys), torch.device(device))(net)
    assert (run is not net) == compiled


def test_compilation_and_recomputation_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"^compile: 'on' and checkpoint_activations exclude each other$"):
        config.load({"compile": "on", "checkpoint_activations": True})


@pytest.mark.parametrize(("value", "read"), [(True, "on"), (False, "off"), ("on", "on"), ("off", "off")])
def test_yaml_s_truth_values_are_switches(value: object, read: str) -> None:
    run = config.load({"lanes": value, "graphs": value, "compile": value})
    assert (run.lanes, run.graphs, run.compile) == (read, read, read)
    assert config.load({"masking_guard": False}).masking_guard == "off"


def test_compiled_passes_are_those_that_are_not() -> None:
    """By the real compiler: attack and training are two instances, and a smaller batch runs uncompiled."""
    run = networks.passes(config.load({"compile": "on", "batch_size": 4}), CPU)
    torch.manual_seed(0)
    net, other = models.build("resnet8", 4), models.build("resnet8", 4)
    other.load_state_dict(net.state_dict())
    x, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    spec = config.AttackSpec(num_steps=1, bn="train")
    found = []
    for student, how in ((net, run), (other, lambda module: module)):
        twin, trained = Twin(student, "train", F32, how), how(student)
        x_adv = x.clone()
        climb(twin, x_adv, x, labels, spec)
        nn.functional.cross_entropy(trained(x), labels).backward()
        part = trained(x[:2])
        gradients = torch.cat([value.grad.flatten() for value in student.parameters() if value.grad is not None])
        found.append((x_adv, gradients, part, dict(student.named_buffers())))
    (x_adv, gradients, part, buffers), expected = found
    assert (x_adv == expected[0]).float().mean() > 0.99  # a sign may differ where a gradient is almost zero
    torch.testing.assert_close(gradients, expected[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(part, expected[2], rtol=1e-4, atol=1e-5)
    for name, value in expected[3].items():
        torch.testing.assert_close(buffers[name], value, rtol=1e-4, atol=1e-5)


def test_only_trained_passes_are_recomputed() -> None:
    run = config.load({"method": "iad2", "checkpoint_activations": True})
    student, at, st = (models.build("resnet8", 4) for _ in range(3))
    built = networks.build(student, {"teacher": at, "teacher_st": st}, methods.get("iad2"), run, F32)
    assert built.adversary is not None
    assert built.teacher_at is not None

    def stages(network: nn.Module) -> set[bool]:
        return {module.recompute for module in network.modules() if isinstance(module, Stage)}

    assert stages(student) == {True}
    assert stages(built.adversary.twin.module) == stages(built.teacher_at.module) == {False}


def test_a_method_gets_what_it_needs() -> None:
    for name in methods.TABLE:
        method = methods.get(name)
        built = networks.build(models.build("resnet8", 4), {}, method, config.load({"method": name}), F32)
        assert (built.adversary is not None) == method.needs_x_adv
