"""Number of network passes of a training step, by kind. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from engine import objectives
from engine.common.lookup import look_up
from engine.config import AttackSpec, ForwardsConfig, RunConfig
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

    before: before all others. between: after S(x~) and S(x-), and before S(x). after: after all others.
    """

    before: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


# By `forwards.idle`, as a function of in_warmup.
IDLE: dict[bool | str, Callable[[bool], Idle]] = {
    False: lambda in_warmup: Idle(),
    True: lambda in_warmup: Idle() if in_warmup else Idle(between=("adv", "nat")),
    "iad1": lambda in_warmup: Idle(between=("adv",) if in_warmup else ("adv", "nat")),
    "trades": lambda in_warmup: Idle(before=("nat",)),
    "adaiad": lambda in_warmup: Idle(before=("nat",), after=() if in_warmup else ("nat",)),
}
# By `forwards.clean`: True if S(x) has a gradient where no term reads it; None: it is not run.
CLEAN = {"skip": None, "no_grad": False, "grad": True}
# By `forwards.first`: the order in which the student sees the images.
_ORDERS: dict[str, tuple[str, ...]] = {
    "adv": ("s_adv", "s_mirrored", "s_nat"),
    "nat": ("s_nat", "s_adv", "s_mirrored"),
}


class Forwards(NamedTuple):
    """The forwards of a step by the names in `objectives.LOGITS`, in their order.

    student: after the attack; True: with a gradient. before_attack, after_attack: of the teachers.
    attack_waits: the attack reads logits of the teachers.
    """

    student: dict[str, bool]
    before_attack: tuple[str, ...]
    after_attack: tuple[str, ...]
    attack_waits: bool


def forwards(method: Method, attack: AttackSpec, config: ForwardsConfig) -> Forwards:
    """The forwards that the method's terms and its attack read, and S(x) as `forwards.clean` wants it."""
    of_attack = attack_loss(attack).reads if method.needs_x_adv else ()
    reads = objectives.forwards_of((*method.reads, *of_attack))
    unread = look_up("forwards.clean", config.clean, CLEAN)
    learns = dict.fromkeys(objectives.of_network(reads, objectives.STUDENT), True)
    if unread is not None:
        learns.setdefault("s_nat", unread)
    teachers = [name for section in objectives.TEACHERS for name in objectives.of_network(reads, section)]
    first = [name for name in objectives.LOGITS if name in teachers and objectives.LOGITS[name].view == "nat"]
    return Forwards(
        {name: learns[name] for name in look_up("forwards.first", config.first, _ORDERS) if name in learns},
        tuple(first),
        tuple(name for name in objectives.LOGITS if name in teachers and name not in first),
        bool(of_attack),
    )


def attack_loss(attack: AttackSpec) -> objectives.AttackLoss:
    """The loss that an attack ascends. Raises ValueError for an unknown one."""
    return look_up("attack.loss", attack.loss, objectives.ATTACK_LOSSES)


def teachers(method: Method, attack: AttackSpec) -> tuple[str, ...]:
    """Sections of the configuration whose teachers a run needs, in its warm-up or after it."""
    reads = {name for phase in method.phases for name in phase.reads}
    needed = {objectives.LOGITS[name].network for name in reads}
    if method.needs_x_adv and attack_loss(attack).teacher:
        needed.add(objectives.LOGITS[objectives.TRUST].network)
    return tuple(section for section in objectives.TEACHERS if section in needed)


def idle(config: ForwardsConfig, *, in_warmup: bool) -> Idle:
    """The idle forwards of a step that crafts adversarial images."""
    return look_up("forwards.idle", config.idle, IDLE)(in_warmup)


def followed_factors(method: Method) -> tuple[str, ...]:
    """Factors of the method's terms that follow the training batch by batch."""
    factors = {weight.factor for weight in method.weights.values() if weight.factor is not None}
    return tuple(sorted(name for name in factors if objectives.FACTORS[name].has_state))


def check_whole_batches(method: Method, config: RunConfig) -> None:
    """Refuse what gives a batch in parts, or twice, to factors that follow the training batch by batch."""
    followed = followed_factors(method)
    for key, is_set in (("micro_batch", config.micro_batch is not None), ("awp.gamma", config.awp.gamma > 0)):
        if followed and is_set:
            raise ValueError(f"{key}: {method.name} balances its terms ({', '.join(followed)}) by whole batches")


def passes(method: Method, attack: AttackSpec, config: ForwardsConfig, *, in_warmup: bool = False) -> Passes:
    """The passes of a step that trains with that row of weights."""
    wanted = forwards(method, attack, config)
    learning = list(wanted.student.values())
    forward = len(wanted.before_attack) + len(wanted.after_attack) + learning.count(False)
    attacked = 0
    if method.needs_x_adv:
        ascended = attack_loss(attack)
        attacked = attack.num_steps * (1 + ascended.teacher_in_loop) + ascended.gradients
        forward += ascended.forwards + sum(map(len, idle(config, in_warmup=in_warmup)))
    return Passes(attacked=attacked, trained=learning.count(True), forward=forward)
