"""Losses of APGD, for each image, which the attack maximises (Croce and Hein, 2020).

z: logits (B, C); y: labels; z_(k): the k-th largest logit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits_BC, labels_B, target_B) -> loss_B"""

_TINY = 1e-12


def cross_entropy(logits_BC: Tensor, labels_B: Tensor, target_B: Tensor) -> Tensor:
    """-log softmax(z)_y."""
    return F.cross_entropy(logits_BC, labels_B, reduction="none")


def dlr(logits_BC: Tensor, labels_B: Tensor, target_B: Tensor) -> Tensor:
    """-(z_y - max_{c != y} z_c) / (z_(1) - z_(3)), at least three classes."""
    largest_BC, classes_BC = logits_BC.sort(dim=1, descending=True)
    other_B = largest_BC[:, 0].where(classes_BC[:, 0] != labels_B, largest_BC[:, 1])
    return (other_B - _of(logits_BC, labels_B)) / (largest_BC[:, 0] - largest_BC[:, 2] + _TINY)


def targeted_dlr(logits_BC: Tensor, labels_B: Tensor, target_B: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2), at least four classes."""
    largest_BC = logits_BC.sort(dim=1, descending=True).values
    spread_B = largest_BC[:, 0] - 0.5 * (largest_BC[:, 2] + largest_BC[:, 3]) + _TINY
    return targeted_margin(logits_BC, labels_B, target_B) / spread_B


def targeted_margin(logits_BC: Tensor, labels_B: Tensor, target_B: Tensor) -> Tensor:
    """z_t - z_y."""
    return _of(logits_BC, target_B) - _of(logits_BC, labels_B)


def margin(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """z_y - max_{c != y} z_c: negative where another class is the likeliest."""
    others_BC = logits_BC.scatter(1, labels_B[:, None], -float("inf"))
    return _of(logits_BC, labels_B) - others_BC.amax(dim=1)


def _of(logits_BC: Tensor, classes_B: Tensor) -> Tensor:
    return logits_BC.gather(1, classes_B[:, None]).squeeze(1)


LOSSES: dict[str, Loss] = {
    "ce": cross_entropy,
    "dlr": dlr,
    "dlr-targeted": targeted_dlr,
    "margin-targeted": targeted_margin,
}
