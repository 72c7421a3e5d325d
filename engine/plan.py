"""How many network passes a training step has, by kind. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple

from engine.config import AttackSpec, ForwardsConfig
from engine.methods import Method


class Passes(NamedTuple):
    """Passes of one step over student and teachers.

    attacked: a forward and the gradient of the images. trained: a forward and the gradients of the weights, and of
    everything between them and the loss. forward: a forward alone.
    """

    attacked: int
    trained: int
    forward: int

    def flops(self, forward: float, first_layer: float) -> float:
        """Floating-point operations of a step, given those of a forward pass and of its first layer.

        A gradient of inputs costs what the forward costs, one of weights too; nobody asks for that of the images
        in a trained pass.
        """
        return self.attacked * 2 * forward + self.trained * (3 * forward - first_layer) + self.forward * forward


def passes(method: Method, attack: AttackSpec, forwards: ForwardsConfig, *, in_warmup: bool = False) -> Passes:
    """The passes of a step that trains with that row of weights."""
    reads_s_nat = method.needs_s_nat
    forward = method.needs_t_at_nat + method.needs_t_at_adv + method.needs_t_st_adv
    forward += forwards.clean == "no_grad" and not reads_s_nat
    if method.needs_x_adv:
        forward += (attack.loss == "kl") + 2 * (forwards.idle and not in_warmup)
    return Passes(
        attacked=attack.num_steps if method.needs_x_adv else 0,
        trained=method.needs_x_adv + (reads_s_nat or forwards.clean == "grad"),
        forward=forward,
    )
