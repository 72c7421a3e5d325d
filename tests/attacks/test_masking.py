"""The probe that finds gradients masked by half precision, and what a run does about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import models
from engine.attacks import masking
from engine.attacks.pgd import pgd, preset
from engine.common.console import Reporter
from engine.common.stopping import RunFailed
from engine.runs import lifecycle
from engine.system.precision import Precision

CPU = torch.device("cpu")
AMP = Precision(CPU, torch.float32, torch.bfloat16)
SPEC = preset("pgd10", 8 / 255)


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(12, 3, 8, 8), torch.arange(12) % 4


def test_without_half_precision_there_is_no_difference() -> None:
    net, (x, labels) = models.build("resnet8", 4), inputs()
    row = masking.probe(net, x, labels, SPEC, Precision(CPU, torch.float32), seed=0)
    assert row == {"probe_amp_sign_agreement": 1.0, "probe_amp_accuracy_gap": 0.0}


class Rounded(nn.Module):
    """A linear classifier whose gradient half precision turns around, or loses."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(192, 4), factor

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1).float())
        if torch.is_autocast_enabled("cpu"):
            logits = logits * self.factor + (1 - self.factor) * logits.detach()
        return logits


@pytest.mark.parametrize(("factor", "agreement"), [(1.0, 1.0), (-1.0, 0.0), (0.0, 0.0)])
def test_the_agreement_of_signs(factor: float, agreement: float, bf16: None) -> None:
    torch.manual_seed(1)
    net, (x, labels) = Rounded(factor), inputs()
    precision = Precision(CPU, torch.float32, torch.bfloat16)
    row = masking.probe(net, x, labels, SPEC, precision, seed=0)
    assert row["probe_amp_sign_agreement"] == pytest.approx(agreement, abs=0.02)


def test_the_gap_is_the_difference_of_two_accuracies_in_full_precision(bf16: None) -> None:
    torch.manual_seed(1)
    net, (x, _) = Rounded(0.0), inputs()
    labels = net(x).argmax(dim=1)  # every image is right until it is attacked
    row = masking.probe(net, x, labels, SPEC, AMP, seed=3)

    def accuracy(**keys: Any) -> float:
        return float((net(pgd(net, x, labels, SPEC, seed=3, **keys)).argmax(1) == labels).double().mean())

    assert row["probe_amp_accuracy_gap"] == pytest.approx(accuracy(autocast=AMP.autocast) - accuracy())
    assert row["probe_amp_accuracy_gap"] > 0.5  # an attack without a gradient stands still


@pytest.mark.parametrize("bn", ["eval", "train", "batch"])
def test_flags_modes_and_statistics_stay(bn: str, bf16: None) -> None:
    net, (x, labels) = models.build("resnet8", 4), inputs()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    row = masking.probe(net, x, labels, SPEC.model_copy(update={"bn": bn}), AMP, seed=0)
    assert row == masking.probe(net, x, labels, SPEC, AMP, seed=0), "in evaluation mode, however the run attacks"
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, []),
        ({"attack_zero_gradients": 0.5, "probe_amp_sign_agreement": 0.7, "probe_amp_accuracy_gap": 0.05}, []),
        ({"attack_zero_gradients": 0.51}, ["51.00% of the attack's gradients are zero"]),
        ({"attack_non_finite_gradients": 0.01}, ["1.00% of the attack's gradients are not finite"]),
        ({"probe_amp_sign_agreement": 0.6}, ["agrees with full precision on 60.00% of the signs"]),
        ({"probe_amp_accuracy_gap": 0.06, "attack_zero_gradients": 0.9}, ["90.00%", "6.00% higher with AMP"]),
    ],
)
def test_what_is_complained_of(row: dict[str, float], words: list[str]) -> None:
    text = masking.complaint(row)
    assert bool(text) == bool(words)
    assert all(word in text for word in words)


class Listener(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("guard", ["warn", "stop", "off"])
def test_the_guard(guard: str, tiny: Any, tmp_path: Path, bf16: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "MOST_ZEROS", -1.0)  # any gradient is too little
    keys = {"method": "at", "amp": True, "masking_guard": guard, "out": str(tmp_path / "run")}
    listener = Listener()
    if guard == "stop":
        with pytest.raises(RunFailed, match=r"epoch 1 may be masked: .* gradients are zero.*masking_guard=warn"):
            lifecycle.train(tiny.config(**keys), listener)
        assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["progress"]["epoch"] == 1
        return
    lifecycle.train(tiny.config(**keys), listener)
    warnings = [line for line in listener.lines if line.startswith("Warning: the attack of epoch")]
    assert len(warnings) == (2 if guard == "warn" else 0)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert ("probe_amp_sign_agreement" in row) == (row["event"] == "epoch")
        if row["event"] == "epoch":
            assert 0.5 < row["probe_amp_sign_agreement"] <= 1
