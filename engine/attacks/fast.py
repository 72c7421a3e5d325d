"""AA-fast: the cheapest attacks first, in less than a tenth of the passes that AutoAttack needs.

As with every attack the accuracy is an upper bound of the robust one. Its parts are none of AutoAttack's, and an
image that stands it may fall under AutoAttack.
"""

from __future__ import annotations

from typing import NamedTuple

from engine.attacks.autoattack import NO_ATTACK, count_targets
from engine.attacks.pgd import NORMS

FAST = "aa-fast"
MARGIN, ADAPTIVE, FEW_SQUARES = "mm", "adi", "square-few"
FAST_PARTS = (NO_ATTACK, MARGIN, ADAPTIVE, FEW_SQUARES)
"""No attack, and the attacks in the order in which an image has to stand them."""


class Numbers(NamedTuple):
    """All numbers of AA-fast.

    targets, target_steps: of MM, APGD on z_t - z_y (Gao et al., 2022). restarts, start_steps, margin_steps: as of
    `Adaptive` (Liu et al., 2022), the restarts' targets in turn. queries: of Square (Andriushchenko et al., 2020).
    """

    targets: int = 5
    target_steps: int = 20
    restarts: int = 5
    start_steps: int = 5
    margin_steps: int = 40
    queries: int = 100


NUMBERS = Numbers()


def describe_fast(num_classes: int, threat_model: str, epsilon: float) -> str:
    """Parts, their numbers and the ball in words."""
    norm, targets = NORMS[threat_model], min(NUMBERS.targets, count_targets(num_classes))
    return (
        f"{norm.name}, epsilon {norm.length(epsilon)}, MM ({NUMBERS.target_steps} steps of APGD on the margin for "
        f"each of {targets} target class{'es' * (targets != 1)}), ADI ({NUMBERS.restarts} restarts of "
        f"{NUMBERS.start_steps} steps into a direction of the logits and {NUMBERS.margin_steps} on the margin), "
        f"Square ({NUMBERS.queries} queries)"
    )
