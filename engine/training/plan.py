"""Number of network passes of a training step, by kind. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from engine.common.lookup import look_up
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
        """Floating-point operations of a step; forward, first_layer: of a forward pass and of its first layer.

        A gradient of inputs costs what the forward costs, one of weights too; nobody asks for that of the images
        in a trained pass.
        """
        return self.attacked * 2 * forward + self.trained * (3 * forward - first_layer) + self.forward * forward


class Idle(NamedTuple):
    """Forwards of the student that nothing reads, of "nat" and "adv" images, in their order.

    before: before S(x~). between: after it, and before S(x).
    """

    before: tuple[str, ...] = ()
    between: tuple[str, ...] = ()


# By `forwards.idle`, as a function of in_warmup.
IDLE: dict[bool | str, Callable[[bool], Idle]] = {
    False: lambda in_warmup: Idle(),
    True: lambda in_warmup: Idle() if in_warmup else Idle(between=("adv", "nat")),
    "iad1": lambda in_warmup: Idle(between=("adv",) if in_warmup else ("adv", "nat")),
    "trades": lambda in_warmup: Idle(before=("nat",)),
}
# By `forwards.clean`: True if S(x) has a gradient where no term reads it; None: it is not run.
CLEAN = {"skip": None, "no_grad": False, "grad": True}
# Forwards of x that the attack's loss needs before its steps.
TARGET_FORWARDS = {"ce": 0, "kl": 1, "cw": 0, "dlr": 0}


def idle(forwards: ForwardsConfig, *, in_warmup: bool) -> Idle:
    """The idle forwards of a step that crafts adversarial images."""
    return look_up("forwards.idle", forwards.idle, IDLE)(in_warmup)


def s_nat_learns(method: Method, forwards: ForwardsConfig) -> bool | None:
    """True if S(x) has a gradient, False if not, None if it is not run."""
    unread = look_up("forwards.clean", forwards.clean, CLEAN)
    return True if method.needs_s_nat else unread


def passes(method: Method, attack: AttackSpec, forwards: ForwardsConfig, *, in_warmup: bool = False) -> Passes:
    """The passes of a step that trains with that row of weights."""
    learns = s_nat_learns(method, forwards)
    forward = method.needs_t_at_nat + method.needs_t_at_adv + method.needs_t_st_adv + (learns is False)
    if method.needs_x_adv:
        forward += look_up("attack.loss", attack.loss, TARGET_FORWARDS)
        forward += sum(map(len, idle(forwards, in_warmup=in_warmup)))
    return Passes(
        attacked=attack.num_steps if method.needs_x_adv else 0,
        trained=method.needs_x_adv + (learns is True),
        forward=forward,
    )
