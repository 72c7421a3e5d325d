"""Large images in parts: sizes, and probes whose numbers do not depend on them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import models
from engine.attacks import masking, overfitting, parts, table
from engine.attacks.kinds import Task, craft
from engine.attacks.pgd import pgd, preset
from engine.system.precision import Precision
from engine.training import telemetry


@pytest.mark.parametrize(
    ("height", "width", "most"), [(224, 224, 32), (224, 448, 16), (32, 32, 1568), (225, 224, 31), (3000, 2000, 1)]
)
def test_as_many_as_have_the_pixels_of_32_photographs(height: int, width: int, most: int) -> None:
    assert parts.most_images(height, width) == most


def test_every_image_once_in_order() -> None:
    x, labels = torch.rand(5, 1, 224, 32 * 224 // 2), torch.arange(5)
    found = list(parts.parts(x, labels))
    assert [len(x_B) for x_B, _, _ in found] == [2, 2, 1]
    columns = [torch.cat(column) for column in zip(*found, strict=True)]
    assert all(map(torch.equal, columns, (x, labels, torch.arange(5))))


def probes(net: nn.Module, teacher: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Any]:
    spec = preset("pgd10", 0.05)
    attack = partial(craft, table.find("pgd10"), Task(net, 4, (0.05, "Linf"), 3, counter=0))
    half = Precision(torch.device("cpu"), torch.float32, torch.bfloat16)
    return (
        telemetry.probe(net, teacher, x, labels, attack, beta=0.1)
        | telemetry.probe(net, None, x, labels, attack, beta=0.1)
        | overfitting.probe(net, x, labels, spec, seed=3)
        | masking.probe(net, x, labels, spec, half, seed=3)
    )


def test_probes_in_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch, bf16: None) -> None:
    torch.manual_seed(0)
    net, teacher = (models.build("resnet8", 4) for _ in range(2))
    x = torch.rand(24, 3, 8, 8)
    labels = net.eval()(x).argmax(dim=1)
    whole = probes(net, teacher.eval(), x, labels)
    monkeypatch.setattr(parts, "_MOST_PIXELS", 7 * 8 * 8)
    largest: list[int] = []
    for network in (net, teacher):
        network.register_forward_pre_hook(lambda module, inputs: largest.append(len(inputs[0])))
    found = probes(net, teacher, x, labels)
    assert max(largest) == 7
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        assert found[name] == pytest.approx(value, abs=1e-5), name
    assert 0 < whole["probe_student_adversarial_accuracy"] < 1


def test_the_probe_of_the_teacher_is_what_its_logits_say(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, teacher = (models.build("resnet8", 4).double().eval() for _ in range(2))
    x = torch.rand(24, 3, 8, 8, dtype=torch.float64)
    labels = teacher(x).argmax(dim=1)
    x_adv = pgd(net, x, labels, preset("pgd10", 0.05), seed=3)
    monkeypatch.setattr(parts, "_MOST_PIXELS", 7 * 8 * 8)
    attack = partial(craft, table.find("pgd10"), Task(net, 4, (0.05, "Linf"), 3, counter=0))
    row = telemetry.probe(net, teacher, x, labels, attack, beta=0.5)
    trusted = teacher(x_adv).detach().softmax(dim=1)[torch.arange(24), labels]
    of_student, of_teacher = (
        (network(x_adv).argmax(dim=1) == labels).double().mean() for network in (net, teacher)
    )
    assert row["probe_alpha"] == pytest.approx(float(trusted.sqrt().mean()), abs=1e-9)
    assert row["probe_student_adversarial_accuracy"] == float(of_student)
    assert row["probe_teacher_adversarial_accuracy"] == float(of_teacher)
    assert row["probe_teacher_natural_accuracy"] == 1
