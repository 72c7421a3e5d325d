"""The probe for catastrophic overfitting, its limits, and the attack after a rollback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import models
from engine.attacks import overfitting
from engine.attacks.pgd import pgd, preset
from engine.config import AttackSpec, validated

ONE_STEP = validated(
    AttackSpec, {"num_steps": 1, "epsilon": 0.1, "step_size": 0.1, "random_start": "none", "bn": "train"}
)


class Waves(nn.Module):
    """Two classes by one pixel: logit 0 of x is `height` of it, and logit 1 is 0."""

    def __init__(self, height: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.height, self.weight = height, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        height_B = self.weight * self.height(x[:, 0, 0, 0])
        return torch.stack((height_B, torch.zeros_like(height_B)), dim=1)


@pytest.mark.parametrize(
    ("height", "expected"),
    [
        (lambda x: x - 0.55, {"probe_fgsm_accuracy": 0.0, "probe_fgsm_pgd_gap": 0.0}),
        (lambda x: x - 0.4, {"probe_fgsm_accuracy": 1.0, "probe_fgsm_pgd_gap": 0.0}),
        # A valley 0.05 away from x, between x and the end of the one step: only small steps find it.
        (lambda x: ((x - 0.55) / 0.04) ** 2 - 1, {"probe_fgsm_accuracy": 1.0, "probe_fgsm_pgd_gap": 1.0}),
    ],
    ids=["falls to both", "stands both", "overfitted"],
)
def test_the_gap_of_a_network_whose_valleys_are_known(
    height: Callable[[Tensor], Tensor], expected: dict[str, float]
) -> None:
    x, labels = torch.full((6, 1, 1, 1), 0.6), torch.zeros(6, dtype=torch.int64)
    assert overfitting.probe(Waves(height), x, labels, ONE_STEP, seed=0) == expected


def test_the_gap_is_that_of_two_accuracies_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    net, x = models.build("resnet8", 4), torch.rand(40, 3, 8, 8)
    labels = net.eval()(x).argmax(dim=1)
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = overfitting.probe(net, x, labels, ONE_STEP, seed=3)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())

    net.eval()

    def accuracy(spec: AttackSpec) -> float:
        return float((net(pgd(net, x, labels, spec, seed=3)).argmax(dim=1) == labels).double().mean())

    fgsm = accuracy(ONE_STEP.model_copy(update={"bn": "eval"}))
    gap = fgsm - accuracy(preset("pgd10", 0.1))
    assert found == {"probe_fgsm_accuracy": fgsm, "probe_fgsm_pgd_gap": pytest.approx(gap)}
    assert 0 < gap < fgsm


@pytest.mark.parametrize("loss", ["kl-teacher", "kl-teacher-moving"])
def test_an_attack_of_a_teacher_is_measured_with_it(loss: str) -> None:
    torch.manual_seed(0)
    net, teacher, x = models.build("resnet8", 4), models.build("resnet8", 4).eval(), torch.rand(8, 3, 8, 8)
    spec = ONE_STEP.model_copy(update={"loss": loss})
    found = overfitting.probe(net, x, torch.arange(8) % 4, spec, seed=0, teacher=teacher)
    assert 0 <= found["probe_fgsm_accuracy"] <= 1


@pytest.mark.parametrize(
    ("gap", "before", "now", "words"),
    [
        (0.3, 0.5, 0.06, []),
        (0.31, 0.5, 0.4, ["31.00% higher"]),
        (0.1, 0.2, 0.04, ["fell from 20.00% to 4.00% in one epoch"]),
        (0.1, 0.19, 0.0, []),
        (0.9, 0.5, 0.0, ["90.00% higher", "fell from 50.00% to 0.00%"]),
        (-0.4, None, 0.0, []),
        (None, 0.5, 0.0, []),  # not measured
    ],
)
def test_what_is_complained_of(gap: float | None, before: float | None, now: float, words: list[str]) -> None:
    row = {"robust_accuracy": now} | ({} if gap is None else {"probe_fgsm_pgd_gap": gap})
    text = overfitting.complaint(row, {} if before is None else {"robust_accuracy": before})
    assert bool(text) == bool(words)
    assert all(word in text for word in words)


@pytest.mark.parametrize("rollbacks", [0, 1, 2, 3])
def test_every_rollback_doubles_the_steps(rollbacks: int) -> None:
    noisy = ONE_STEP.model_copy(update={"random_start": "uniform", "start_epsilon": 0.2, "project": False})
    attack = overfitting.in_force(noisy, rollbacks)
    steps = 2**rollbacks
    keys: dict[str, Any] = {"num_steps": steps, "step_size": pytest.approx(0.125 / steps), "start_epsilon": None}
    expected = noisy.model_dump() if not rollbacks else noisy.model_dump() | keys | {"project": True}
    assert attack.model_dump() == expected
