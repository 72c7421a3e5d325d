"""AutoAttack on a GPU: steps that are replayed as CUDA graphs give the verdicts of steps op by op."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from engine.attacks.auto import slots, standard
from engine.attacks.auto.slots import Stepper
from engine.evaluation.measure import evaluate
from engine.evaluation.results import Result
from engine.models import build
from engine.system import precision
from engine.system.graphs import CapturedCall


def measured(attack: str) -> Result:
    torch.manual_seed(0)
    network = build("resnet8", 10).cuda().eval()
    x_nat = torch.rand(48, 3, 32, 32, device="cuda")
    with torch.no_grad():
        labels = network(x_nat).argmax(dim=1)
    with precision.deterministic(), mock.patch.object(standard, "STANDARD", standard.Steps(40, 40, 200)):
        return evaluate(network, (x_nat, labels), [attack], epsilon=1 / 255)[attack]


@pytest.mark.parametrize("attack", ["aa", "aa-fast"])
def test_graphs_change_nothing(attack: str) -> None:
    replays = []

    class Noted(CapturedCall):
        def replay(self, *tensors: Tensor) -> list[Tensor]:
            replays.append(1)
            return super().replay(*tensors)

    with mock.patch.object(slots, "CapturedCall", Noted):
        captured = measured(attack)
    assert len(replays) > 100
    with mock.patch.object(Stepper, "_step_of_gpu", lambda self, own: own.advance(self._search, last=False)):
        op_by_op = measured(attack)
    assert captured.verdicts.tolist() == op_by_op.verdicts.tolist()
    assert {name: part.forward for name, part in captured.details.items()} == {
        name: part.forward for name, part in op_by_op.details.items()
    }
