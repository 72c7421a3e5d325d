"""An attack on a network's own answers, and how many of them hold. B batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.attacks import table
from engine.attacks.autoattack import FLAGS, NO_ATTACK, Outcome, raised
from engine.attacks.checks import SLACK, GradientCounts, excess_of
from engine.attacks.evaluated import prepared
from engine.attacks.kinds import AutoAttackPart, EvaluationAttack, Perturb, Task
from engine.attacks.masking import MOST_ZEROS
from engine.attacks.table import ATTACKS
from engine.common.stopping import RunFailed
from engine.models.weights import LoadedModel
from engine.system.precision import Precision


class Held(NamedTuple):
    """A batch after the attack. labels_B: the classes then. holds_B: True where the answer is the same as before.

    masked_B: True where it holds and most of the gradient was zero or NaN, so that this says little; None: not
    known. x_adv: the attacked images, BCHW.
    """

    x_adv: Tensor
    labels_B: Tensor
    holds_B: Tensor
    masked_B: Tensor | None


@dataclass(eq=False)
class Tally:
    """Sums over the batches of an attack, from which its warnings come."""

    images: int = 0
    masked: int = 0
    boundary: int = 0
    entries: int = 0
    zeros: int = 0
    not_finite: int = 0
    flags: int = 0


@dataclass(frozen=True, eq=False)
class Challenge:
    """An attack made on a network, which starts from the network's own answers: there are no labels.

    An answer that holds is one that this attack did not change; it is no certificate.
    """

    network: nn.Module
    attack: EvaluationAttack
    task: Task
    perturb: Perturb
    tally: Tally = field(default_factory=Tally)

    def run(self, x_nat: Tensor, labels_B: Tensor, sample_B: Tensor) -> Held:
        """Attack a batch. labels_B: the network's answers to it. sample_B: indices that decide random starts.

        Raises FloatingPointError for logits that are not finite, and RunFailed for images outside the ball.
        """
        gradients = GradientCounts(len(x_nat), x_nat.device)
        with gradients.of(self.attack.crafts_on(self.task)):
            out = self.perturb(x_nat, labels_B, sample_B)
        x_adv = (out.x_adv if isinstance(out, Outcome) else out).to(x_nat.dtype)
        if not (beyond := excess_of(x_adv, x_nat, *self.task.ball)) <= SLACK:
            raise RunFailed(f"{self.attack.name}: an image lies {float(beyond):g} outside the ball or [0, 1]")
        logits_BC = self.network(x_adv)
        if lost := int((~logits_BC.isfinite().all(dim=1)).sum()):
            raise FloatingPointError(f"{self.attack.name}: the logits of {lost:,} images are NaN or infinite")
        after_B = logits_BC.argmax(dim=1)
        holds_B = (after_B == labels_B) & self._begun_B(out, labels_B)
        by_image = self.attack.takes_whole_batches and gradients.entries > 0
        masked_B = holds_B & gradients.hidden_B() if by_image else None
        self._count(gradients, masked_B, out)
        return Held(x_adv, after_B, holds_B, masked_B)

    def _begun_B(self, out: Tensor | Outcome, labels_B: Tensor) -> Tensor:
        """False where an attack in parts found another class for the image as it is, and so did nothing."""
        if isinstance(out, Outcome) and self.attack.parts(self.task.num_classes)[0] == NO_ATTACK:
            begun_B = out.survived_B > 0
            self.tally.boundary += int((~begun_B).sum())
            return begun_B
        return torch.ones_like(labels_B, dtype=torch.bool)

    def _count(self, gradients: GradientCounts, masked_B: Tensor | None, out: Tensor | Outcome) -> None:
        tally = self.tally
        tally.images += len(gradients.signed_B)
        tally.entries += gradients.entries
        tally.zeros += int(gradients.zeros)
        tally.not_finite += int(gradients.not_finite)
        if masked_B is not None:
            tally.masked += int(masked_B.sum())
        if isinstance(out, Outcome):
            tally.flags |= out.flags

    def describe(self, batch_size: int) -> dict[str, Any]:
        """Name, numbers and outcome of the attack, for JSON."""
        epsilon, threat_model = self.task.ball
        return {
            "name": self.attack.name,
            "title": self.attack.title,
            "description": self.attack.describe(self.task, f"batch {batch_size}"),
            "epsilon": epsilon,
            "threat_model": threat_model,
            "seed": self.task.seed,
            "starts_from": "the network's own answer",
            "holds": "this attack did not change the answer; no certificate",
            "flags": list(raised(self.tally.flags)),
            "warnings": self.warnings(),
        }

    def warnings(self) -> list[str]:
        """Sentences on what makes an answer that holds doubtful."""
        tally, name = self.tally, self.attack.name
        found = []
        if tally.masked:
            found.append(
                f"{name}: {tally.masked:,} of {tally.images:,} answers hold although most of their gradient was "
                "zero or NaN: the attack could not work on them; pgd20-dlr, whose loss no factor on the logits "
                "changes, or square, which needs no gradient, may change them"
            )
        elif tally.entries and tally.zeros > MOST_ZEROS * tally.entries:
            found.append(f"{name}: {tally.zeros / tally.entries:.1%} of its gradients are zero")
        if tally.not_finite:
            found.append(f"{name}: {tally.not_finite / tally.entries:.2%} of its gradients are not finite")
        if tally.boundary:
            found.append(
                f"{name}: {tally.boundary:,} answers change by rounding alone, without an attack; they do not hold"
            )
        meanings = (FLAGS[flag].meaning for flag in raised(tally.flags))
        return found + [f"{name}: {meaning}; that an answer holds says less" for meaning in meanings]


def challenge(
    loaded: LoadedModel, name: str, ball: tuple[float, str], at: Precision, *, seed: int = 0
) -> Challenge:
    """The attack of that name on a network, which lies on the device in evaluation mode, its parameters frozen.

    ball: epsilon, threat model. Raises ValueError for an unknown name, for one that crafts nothing, and where the
    attack is not defined for the network's classes or the ball.
    """
    (attack,) = table.resolve([name])
    if attack.name == NO_ATTACK:
        raise ValueError(
            f"--attack: {name!r} changes no image; known: {', '.join(n for n in ATTACKS if n != name)}"
        )
    table.check_defined(attack, loaded.num_classes, ball[1])
    task = Task(loaded.module, loaded.num_classes, ball, seed, loaded.class_names)
    # As an evaluation gives it to them: AutoAttack prepares the network itself, a user's function looks into it.
    if attack.takes_any_form and not isinstance(attack, AutoAttackPart):
        winograd = at.device.type == "cpu"
        task = task._replace(model=prepared(loaded.module, Precision(at.device, at.dtype, winograd=winograd)))
    return Challenge(loaded.module, attack, task, attack.make(task))
