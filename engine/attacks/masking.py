"""Checks for masked gradients, with which robustness looks better than it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attacks.parts import parts
from engine.attacks.pgd import batch_norm_mode, frozen, pgd, started
from engine.config import AttackSpec
from engine.system.precision import Precision, full_precision

Autocast = Callable[[], AbstractContextManager[object]]

# Limits of a healthy run, whose values stay far below or above: docs/performance.md shows measured ones.
MOST_ZEROS = 0.5
LEAST_AGREEMENT = 0.7
LARGEST_GAP = 0.05
# Share of an evaluation's images that it could not attack: the accuracy may be too high by as much.
MOST_MASKED = 0.01


def probe(
    student: nn.Module,
    x_nat: Tensor,
    labels: Tensor,
    spec: AttackSpec,
    precision: Precision,
    *,
    seed: int,
    teacher: nn.Module | None = None,
) -> dict[str, Any]:
    """Compare the attack under AMP with that in full precision, on a fixed set of images, in evaluation mode.

    probe_amp_sign_agreement: share of the entries of the first input gradient that have the same sign.
    probe_amp_accuracy_gap: accuracy under the attack crafted with AMP less that under the attack crafted without,
    both measured in full precision. Positive: AMP makes the attack weaker. teacher: see `pgd`.
    """
    spec = spec.model_copy(update={"bn": "eval"})
    modes: tuple[tuple[Autocast, float], ...] = (
        (nullcontext, 1.0),
        (precision.autocast, precision.attack_loss_scale),
    )
    agreeing, right, amp_right = torch.zeros(3, dtype=torch.float64, device=x_nat.device)
    with batch_norm_mode(student, spec.bn), frozen(student), full_precision():
        for x_B, labels_B, sample_B in parts(x_nat, labels):
            start = started(x_B, spec, seed=seed, sample=sample_B)
            signs = [_gradient(student, start, labels_B, *mode).sign() for mode in modes]
            agreeing += torch.eq(*signs).sum()
            for total, (autocast, loss_scale) in zip((right, amp_right), modes, strict=True):
                x_adv = pgd(
                    student, x_B, labels_B, spec, seed=seed, sample=sample_B, autocast=autocast,
                    loss_scale=loss_scale, teacher=teacher,
                )  # fmt: skip
                with torch.no_grad():
                    total += (student(x_adv).argmax(dim=1) == labels_B).sum()
    difference = amp_right / len(labels) - right / len(labels)
    agreement, gap = torch.stack((agreeing / x_nat.numel(), difference)).tolist()
    return {"probe_amp_sign_agreement": agreement, "probe_amp_accuracy_gap": gap}


def _gradient(student: nn.Module, images: Tensor, labels: Tensor, autocast: Autocast, loss_scale: float) -> Tensor:
    """Gradient of the cross-entropy with respect to the images."""
    images = images.detach().requires_grad_()
    with autocast():
        logits_BC = student(images)
    loss = F.cross_entropy(logits_BC.float(), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss_scale * loss, images)
    return gradient


def complaint(row: Mapping[str, Any]) -> str:
    """Signs in an epoch's row that the attack of the training is masked, in words; empty where there is none."""
    found = []
    if (zeros := row.get("attack_zero_gradients", 0.0)) > MOST_ZEROS:
        found.append(f"{zeros:.2%} of the attack's gradients are zero (limit {MOST_ZEROS:.0%})")
    if (broken := row.get("attack_non_finite_gradients", 0.0)) > 0:
        found.append(f"{broken:.2%} of the attack's gradients are not finite")
    if (masked := row.get("robust_masked") or 0.0) > MOST_MASKED:
        found.append(
            f"{masked:.2%} of the held-out images kept their class although their gradient was zero "
            f"(limit {MOST_MASKED:.0%})"
        )
    if (agreement := row.get("probe_amp_sign_agreement", 1.0)) < LEAST_AGREEMENT:
        found.append(
            f"AMP agrees with full precision on {agreement:.2%} of the signs (limit {LEAST_AGREEMENT:.0%})"
        )
    if (gap := row.get("probe_amp_accuracy_gap", 0.0)) > LARGEST_GAP:
        found.append(f"accuracy under the attack is {gap:.2%} higher with AMP (limit {LARGEST_GAP:.0%})")
    return "; ".join(found)
