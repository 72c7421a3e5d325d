"""Catastrophic overfitting of one-step training (Wong et al., 2020): robust against its own attack, and no other.

Within an epoch or two the accuracy under PGD falls to nearly nothing, while the one under the attack of the
training stays or rises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.attacks.parts import parts
from engine.attacks.pgd import batch_norm_mode, pgd, preset
from engine.config import AttackSpec
from engine.system.precision import full_precision

# Limits between healthy and overfitted epochs: docs/performance.md shows measured ones.
LARGEST_FGSM_PGD_GAP = 0.3
# A fall of the robust accuracy from one epoch to the next: from at least the one to less than the other.
ONCE_ROBUST, NEARLY_NONE = 0.2, 0.05
MOST_ROLLBACKS = 3
"""Rollbacks of a run, each of which doubles the steps of the attack: 1, 2, 4, 8."""
LENGTH_OF_STEPS = 1.25
"""Length of all steps together after a rollback, in epsilons: that of the one step of FGSM-RS."""
COMPLAINT = "overfitting"
"""Key of an epoch's row with the signs in words, where there are any."""


def is_possible(attack: AttackSpec) -> bool:
    """True if a training with that attack, as it is configured, is measured and guarded."""
    return attack.num_steps == 1


def in_force(attack: AttackSpec, rollbacks: int) -> AttackSpec:
    """The attack of a training after so many rollbacks: 2^rollbacks times the steps, projected onto the ball.

    Each is of length 1.25 epsilon / steps, and a uniform start is drawn from the ball.
    """
    if not rollbacks:
        return attack
    steps = attack.num_steps * 2**rollbacks
    step_size = LENGTH_OF_STEPS * attack.epsilon / steps
    changed = {"num_steps": steps, "step_size": step_size, "project": True, "start_epsilon": None}
    return attack.model_copy(update=changed)


@torch.no_grad()
def probe(
    student: nn.Module,
    x_nat: Tensor,
    labels: Tensor,
    attack: AttackSpec,
    *,
    seed: int,
    teacher: nn.Module | None = None,
) -> dict[str, Any]:
    """Compare the attack of the training with PGD-10, in evaluation mode and full precision.

    probe_fgsm_accuracy: accuracy under the attack of the training. probe_fgsm_pgd_gap: the same less the accuracy
    under PGD-10. teacher: for an attack's loss that needs one.
    """
    specs = (
        attack.model_copy(update={"bn": "eval"}),
        preset("pgd10", attack.epsilon, attack.threat_model),
    )
    right = torch.zeros(len(specs), dtype=torch.float64, device=x_nat.device)
    with batch_norm_mode(student, "eval"), full_precision():
        for x_B, labels_B, sample_B in parts(x_nat, labels):
            for number, spec in enumerate(specs):
                x_adv = pgd(student, x_B, labels_B, spec, seed=seed, sample=sample_B, teacher=teacher)
                right[number] += (student(x_adv).argmax(dim=1) == labels_B).sum()
    fgsm, of_pgd = (right / len(labels)).tolist()
    return {"probe_fgsm_accuracy": fgsm, "probe_fgsm_pgd_gap": fgsm - of_pgd}


def complaint(row: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """Signs of catastrophic overfitting in a measured epoch's row, in words; empty where there is none.

    before: the row of the epoch before, {} at the first.
    """
    if "probe_fgsm_pgd_gap" not in row:
        return ""
    found = []
    if (gap := row["probe_fgsm_pgd_gap"]) > LARGEST_FGSM_PGD_GAP:
        found.append(
            f"accuracy on the probe is {gap:.2%} higher under the attack of the training than under PGD-10 "
            f"(limit {LARGEST_FGSM_PGD_GAP:.0%})"
        )
    once, now = before.get("robust_accuracy", 0.0), row["robust_accuracy"]
    if once >= ONCE_ROBUST and now < NEARLY_NONE:
        found.append(f"robust accuracy fell from {once:.2%} to {now:.2%} in one epoch")
    return "; ".join(found)
