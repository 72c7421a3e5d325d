"""The terms of a loss, the logits that they read, and the losses of an attack, as data. Imports no torch.

x natural image, x~ = x_adv, x- = 2 x - x~ its mirror image; S student, T_at robust and T_st standard teacher.
Derived from these tables and written nowhere else: the forwards of a step, their order and lanes, the count of
passes, and the columns of the telemetry.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Logits(NamedTuple):
    """Origin of logits. network: "student", or a teacher's section of the configuration. view: of the images."""

    network: str
    view: str


VIEWS = {"nat": "x", "adv": "x~", "mirrored": "x-"}
"""The images that a network may see; "mirrored" is 2 x - x~, and not clamped."""

LOGITS: dict[str, Logits] = {
    "s_nat": Logits("student", "nat"),
    "s_adv": Logits("student", "adv"),
    "s_mirrored": Logits("student", "mirrored"),
    "t_at_nat": Logits("teacher", "nat"),
    "t_st_nat": Logits("teacher_st", "nat"),
    "t_at_adv": Logits("teacher", "adv"),
    "t_st_adv": Logits("teacher_st", "adv"),
    "t_at_mirrored": Logits("teacher", "mirrored"),
}
"""The logits that a term may read, each of one forward; a teacher's are run in this order."""

DIFFERENCES: dict[str, tuple[str, str]] = {
    "s_difference": ("s_adv", "s_mirrored"),
    "t_at_difference": ("t_at_adv", "t_at_mirrored"),
}
"""Logits that are the first less the second of two others."""

STUDENT, TEACHERS = "student", ("teacher", "teacher_st")
TRUST = "t_at_adv"
"""The logits that alpha, the trust in the robust teacher, is made of (Eq. 4)."""


class TermKind(NamedTuple):
    """One term of a loss.

    text: the formula. kind, student, target: see `engine.kernels.Term`. temperature: the key of `loss` that it has
    its temperature from; None: 1.
    """

    text: str
    kind: str
    student: str
    target: str | None = None
    temperature: str | None = None


TERMS: dict[str, TermKind] = {
    "ce_nat": TermKind("CE(S(x), y)", "ce", "s_nat"),
    "ce_adv": TermKind("CE(S(x~), y)", "ce", "s_adv"),
    "kl_self": TermKind("KL(S(x) || S(x~))", "kl", "s_adv", "s_nat", "tau_self"),
    "kl_at_nat": TermKind("KL(T_at(x) || S(x~))", "kl", "s_adv", "t_at_nat", "tau"),
    "kl_at_adv": TermKind("KL(T_at(x~) || S(x~))", "kl", "s_adv", "t_at_adv", "tau"),
    "kl_st_adv": TermKind("KL(T_st(x~) || S(x~))", "kl", "s_adv", "t_st_adv", "tau"),
    "kl_at_clean": TermKind("KL(T_at(x) || S(x))", "kl", "s_nat", "t_at_nat", "tau"),
    "kl_st_clean": TermKind("KL(T_st(x) || S(x))", "kl", "s_nat", "t_st_nat", "tau"),
    "kl_difference": TermKind("KL(T_at(x~) - T_at(x-) || S(x~) - S(x-))", "kl", "s_difference", "t_at_difference"),
    "margin_adv": TermKind("-log(1.0001 - max_{c != y} softmax(S(x~))_c)", "margin", "s_adv"),
    "kl_self_live": TermKind("(1 - softmax(S(x))_y) KL(S(x) || S(x~))", "kl_live", "s_adv", "s_nat", "tau_self"),
}
"""The terms: first the six of the paper's Table 1, in its order. A loss sums them in this order."""


class Factor(NamedTuple):
    """Constant factor of a sample's term.

    text: the formula. reads: logits that it is made of. has_state: it follows the training batch by batch.
    """

    text: str
    reads: tuple[str, ...]
    has_state: bool = False


FACTORS: dict[str, Factor] = {
    "entropy": Factor("5 (H - min H), H the entropy of softmax(T_at(x~)), over the batch", ("t_at_adv",)),
    "certainty": Factor("(max H - H) / (max H - min H), over the batch", ("t_at_adv",)),
    "robust_share": Factor(
        "1 - w of MTARD, which balances both teachers' terms",
        ("s_nat", "s_adv", "t_at_adv", "t_st_nat"),
        has_state=True,
    ),
    "natural_share": Factor(
        "w of MTARD, which balances both teachers' terms",
        ("s_nat", "s_adv", "t_at_adv", "t_st_nat"),
        has_state=True,
    ),
}
"""The factors by name; they carry no gradient."""


class AttackLoss(NamedTuple):
    """The loss that an attack ascends.

    text: in words, {kappa} and {slope} standing for those numbers of the attack. reads: logits that are made
    before the attack. forwards: passes before the steps. gradients: passes with a gradient before them.
    teacher_in_loop: the robust teacher is run, and differentiated through, in every step. one_label: it is not
    defined for mixed images, which have two.
    """

    text: str
    reads: tuple[str, ...] = ()
    forwards: int = 0
    gradients: int = 0
    teacher_in_loop: bool = False
    one_label: bool = False

    @property
    def teacher(self) -> bool:
        """True if the attack needs the robust teacher."""
        return bool(self.reads or self.gradients or self.teacher_in_loop)

    @property
    def reads_images(self) -> bool:
        """True if it depends on the images in other ways than by the student's logits."""
        return bool(self.gradients or self.teacher_in_loop)


ATTACK_LOSSES: dict[str, AttackLoss] = {
    "ce": AttackLoss("cross-entropy"),
    "kl": AttackLoss("KL to S(x)", forwards=1),
    "cw": AttackLoss("CW margin, kappa {kappa:g}", one_label=True),
    "dlr": AttackLoss("DLR", one_label=True),
    "kl-teacher": AttackLoss("KL to T(x)", reads=("t_at_nat",)),
    "kl-teacher-moving": AttackLoss("KL to T(x~), through both networks", teacher_in_loop=True),
    "kl-teacher-linear": AttackLoss(
        "KL to T(x), its probability of y moved along {slope:g} of its gradient", gradients=1, one_label=True
    ),
}
"""The losses of an attack; "kl-teacher" is RSLAD's, "kl-teacher-moving" AdaAD's, "kl-teacher-linear" SAAD's."""


def forwards_of(names: Iterable[str]) -> tuple[str, ...]:
    """The logits of `LOGITS` that are run for these, differences among them, in the order of the table."""
    wanted = {part for name in names for part in DIFFERENCES.get(name, (name,))}
    return tuple(name for name in LOGITS if name in wanted)


def of_network(names: Iterable[str], network: str) -> tuple[str, ...]:
    """Those of the logits that a network makes."""
    return tuple(name for name in names if LOGITS[name].network == network)


def reads_of(term: str) -> tuple[str, ...]:
    """The logits that a term compares."""
    entry = TERMS[term]
    return (entry.student,) if entry.target is None else (entry.student, entry.target)
