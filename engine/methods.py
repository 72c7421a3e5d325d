"""Every method as one row of weights of terms. Imports no torch.

Per sample i the loss is sum_k (a_k + b_k * alpha_i) * f_ik * l_ik over the terms l of `engine.objectives.TERMS`,
with factors f of `engine.objectives.FACTORS`. A method is data: a base method for its warm-up, and a function from
hyper-parameters to a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from engine import objectives
from engine.common.lookup import check_registered, look_up, nearest
from engine.config import LossConfig, check_reading, validated
from engine.objectives import FACTORS, TERMS, TRUST


class Weight(NamedTuple):
    """The weight a + b * alpha of a sample's term, alpha the trust in the teacher.

    factor: name of a constant of each sample that multiplies it. grows: multiplied by e / epochs, e from 1.
    """

    a: float
    b: float
    factor: str | None = None
    grows: bool = False

    def __rmul__(self, number: object) -> Weight:
        if not isinstance(number, int | float):
            return NotImplemented
        return self._replace(a=number * self.a, b=number * self.b)

    def __rsub__(self, constant: float) -> Weight:
        return self._replace(a=constant - self.a, b=-self.b)


ALPHA = Weight(0.0, 1.0)
Cells = dict[str, float | Weight]
Rule = Callable[[LossConfig], Cells]


@dataclass(frozen=True)
class Row:
    """One entry of the table of methods.

    source: paper and published code. official: None: as in the paper. base: the method that is trained during the
    warm-up, where alpha is 1; its own name: its own row with alpha = 1.
    function: in place of terms, a loss of each sample, (B,), of logits by name and labels; it reads `reads`.
    """

    summary: str
    paper: Rule
    official: Rule | None = None
    base: str | None = None
    source: str = ""
    function: Callable[[dict[str, Any], Any], Any] | None = None
    reads: tuple[str, ...] = ()


_READINGS: dict[str, Callable[[Row], Rule]] = {
    "paper": lambda row: row.paper,
    "official": lambda row: row.official or row.paper,
}


def _gamma(p: LossConfig) -> float | Weight:
    return 1 - ALPHA if p.gamma is None else p.gamma


METHODS: dict[str, Row] = {
    "st": Row("standard training", lambda p: {"ce_nat": 1}),
    "at": Row(
        "adversarial training (Madry et al., 2018)",
        lambda p: {"ce_adv": 1},
        source="github.com/MadryLab/cifar10_challenge",
    ),
    "trades": Row(
        "TRADES (Zhang et al., 2019)",
        lambda p: {"ce_nat": 1, "kl_self": p.trades_lambda},
        source="github.com/yaodongyu/TRADES",
    ),
    "mart": Row(
        "MART (Wang et al., 2020)",
        lambda p: {"ce_adv": 1, "margin_adv": 1, "kl_self_live": p.trades_lambda},
        source="github.com/YisenWang/MART",
    ),
    "fgsm-rs": Row(
        "one-step training from a random start (Wong et al., 2020)",
        lambda p: {"ce_adv": 1},
        source="github.com/locuslab/fast_adversarial",
    ),
    "n-fgsm": Row(
        "one-step training around larger noise (de Jorge et al., 2022)",
        lambda p: {"ce_adv": 1},
        source="github.com/pdejorge/N-FGSM",
    ),
    "ard": Row(
        "adversarially robust distillation (Goldblum et al., 2020)",
        lambda p: {"ce_nat": p.lam, "kl_at_nat": (1 - p.lam) * p.tau**2},
        source="github.com/goldblum/AdversariallyRobustDistillation",
    ),
    "akd2": Row(
        "robust and standard teacher (Chen et al., 2021)",
        lambda p: {"ce_adv": p.lam1, "kl_at_adv": p.lam2 * p.tau**2, "kl_st_adv": p.lam3 * p.tau**2},
        source="github.com/VITA-Group/Alleviate-Robust-Overfitting",
    ),
    "iad1": Row(
        "introspective distillation on ARD (IAD-I; Zhu et al., 2022)",
        lambda p: {
            "ce_nat": p.lam,
            "kl_self": (1 - p.lam) * p.tau_self**2 * _gamma(p),
            "kl_at_nat": (1 - p.lam) * p.tau**2,
        },
        lambda p: {
            "ce_nat": p.lam,
            "kl_self": (1 - p.lam) * (1 - ALPHA),
            "kl_at_nat": (1 - p.lam) * p.tau**2,
        },
        base="ard",
        source="github.com/ZFancy/IAD",
    ),
    "iad1-down": Row(
        "IAD-I whose teacher term is weighted by alpha too (Table 8)",
        lambda p: {
            "ce_nat": p.lam,
            "kl_self": (1 - p.lam) * p.tau_self**2 * _gamma(p),
            "kl_at_nat": (1 - p.lam) * p.tau**2 * ALPHA,
        },
        lambda p: {
            "ce_nat": p.lam,
            "kl_self": (1 - p.lam) * (1 - ALPHA),
            "kl_at_nat": (1 - p.lam) * p.tau**2 * ALPHA,
        },
        base="ard",
        source="github.com/ZFancy/IAD",
    ),
    # Algorithm 1 leaves a bracket of IAD-II open: here gamma stands outside lam2 * tau^2.
    "iad2": Row(
        "introspective distillation on AKD2 (IAD-II; Zhu et al., 2022)",
        lambda p: {
            "ce_adv": p.lam1,
            "kl_self": _gamma(p),
            "kl_at_adv": p.lam2 * p.tau**2 * ALPHA,
            "kl_st_adv": p.lam3 * p.tau**2,
        },
        lambda p: {
            "ce_adv": p.lam1,
            "kl_self": p.lam2 * p.tau**2 * (1 - ALPHA),
            "kl_at_adv": p.lam2 * p.tau**2 * ALPHA,
            "kl_st_adv": p.lam3 * p.tau**2,
        },
        base="akd2",
        source="github.com/ZFancy/IAD",
    ),
    "rslad": Row(
        "robust soft label distillation (Zi et al., 2021)",
        lambda p: {"kl_at_nat": (1 - p.lam) * p.tau**2, "kl_at_clean": p.lam * p.tau**2},
        source="github.com/zibojia/RSLAD",
    ),
    "adaad": Row(
        "adaptive adversarial distillation, the teacher inside the attack (Huang et al., 2023)",
        lambda p: {"kl_at_adv": (1 - p.lam) * p.tau**2, "kl_at_clean": p.lam * p.tau**2},
        source="github.com/boyellow/AdaAD",
    ),
    "adaiad": Row(
        "introspective distillation on AdaAD (Huang et al., 2023)",
        lambda p: {
            "ce_nat": p.lam,
            "kl_self": (1 - p.lam) * p.tau_self**2 * _gamma(p),
            "kl_at_adv": (1 - p.lam) * p.tau**2,
        },
        lambda p: {
            "ce_nat": p.lam,
            "kl_self": (1 - p.lam) * (1 - ALPHA),
            "kl_at_adv": (1 - p.lam) * p.tau**2,
        },
        base="adaiad",
        source="github.com/boyellow/AdaAD",
    ),
    "mtard": Row(
        "two teachers, balanced by their progress (Zhao et al., 2022)",
        lambda p: {
            "kl_at_adv": Weight(p.tau**2, 0.0, "robust_share"),
            "kl_st_clean": Weight(p.tau**2, 0.0, "natural_share"),
        },
        source="github.com/zhaoshiji123/MTARD",
    ),
    "saad": Row(
        "distillation weighted by the teacher's entropy, with IGDM's term (Lee et al.)",
        lambda p: {
            "kl_at_adv": Weight(p.tau**2, 0.0, "entropy"),
            "kl_at_clean": Weight(p.lam * p.tau**2, 0.0, "certainty"),
            "kl_difference": Weight(p.igdm, 0.0, "entropy", grows=True),
        },
        source="github.com/HongsinLee/saad",
    ),
}

ADDITIONS: dict[str, Row] = {
    "igdm": Row(
        "indirect gradient distillation (Lee et al.), beside another method",
        lambda p: {"kl_difference": Weight(p.igdm, 0.0, grows=True)},
        source="github.com/HongsinLee/saad (igdm.py)",
    ),
}
"""Rows that are added to that of another method: METHOD+ADDITION."""


def split_name(name: str) -> tuple[str, tuple[str, ...]]:
    """The method and the additions of a name such as "ard+igdm"."""
    base, *additions = name.split("+")
    return base, tuple(additions)


def check_name(name: str) -> None:
    """Raise ValueError where there is no method of that name, or no such addition."""
    base, additions = split_name(name)
    check_registered("method", base, METHODS)
    for number, addition in enumerate(additions):
        look_up("method", addition, ADDITIONS)
        if addition in additions[:number]:
            raise ValueError(f"method: {name!r} adds {addition} twice")


# What a divergence, summed over the classes, is divided by.
_KL_DIVISORS: dict[str, Callable[[int], int]] = {
    "batch": lambda num_classes: 1,
    "elements": lambda num_classes: num_classes,
}


class WeightedTerm(NamedTuple):
    """A term with all its numbers, in the order of `engine.kernels.Term` after its name."""

    name: str
    kind: str
    student: str
    target: str | None
    weight: tuple[float, float]
    temperature: float
    detach: bool
    factor: str | None


@dataclass(frozen=True)
class Method:
    """A method's weights and what they make necessary.

    weights: of the terms that have one, by name, in the order of `objectives.TERMS`.
    warmup: the method to train while alpha is hard-coded to 1, or None where there is no warm-up.
    function: in place of the terms, see `Row`; it reads `function_reads`.
    """

    name: str
    weights: Mapping[str, Weight]
    loss: LossConfig
    warmup: Method | None = None
    function: Callable[[dict[str, Any], Any], Any] | None = field(default=None, compare=False)
    function_reads: tuple[str, ...] = ()

    def terms(self, num_classes: int, growth: float = 1.0) -> tuple[WeightedTerm, ...]:
        """The terms of a loss over so many classes. growth: e / epochs, for the weights that grow.

        A divergence's weight is divided as `loss.kl_mean` says: the term itself is summed over the classes.
        """
        divisor = look_up("loss.kl_mean", self.loss.kl_mean, _KL_DIVISORS)(num_classes)
        found = []
        for name, weight in self.weights.items():
            term = objectives.TERMS[name]
            if divisor != 1 and term.target is not None:
                weight = 1 / divisor * weight
            if weight.grows:
                weight = growth * weight
            temperature = 1.0 if term.temperature is None else getattr(self.loss, term.temperature)
            target = objectives.LOGITS.get(term.target or "")
            detach = self.loss.detach_self and target is not None and target.network == objectives.STUDENT
            found.append(WeightedTerm(name, *term[1:4], (weight.a, weight.b), temperature, detach, weight.factor))
        return tuple(found)

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms, "loss_function" where a function is in their place."""
        return tuple(self.weights) if self.function is None else (FUNCTION_TERM,)

    @property
    def needs_alpha(self) -> bool:
        """Some weight depends on alpha."""
        return any(weight.b != 0 for weight in self.weights.values())

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """Names in `objectives.LOGITS` of the logits that terms, alpha and factors read."""
        read = [name for term in self.weights for name in objectives.reads_of(term)]
        for weight in self.weights.values():
            read += FACTORS[weight.factor].reads if weight.factor is not None else ()
        read += [TRUST] if self.needs_alpha else []
        return objectives.forwards_of([*read, *self.function_reads])

    @property
    def needs_x_adv(self) -> bool:
        """Adversarial images are crafted."""
        return any(objectives.LOGITS[name].view != "nat" for name in self.reads)

    @property
    def phases(self) -> tuple[Method, ...]:
        """The methods that a run trains: of its warm-up, where it has one, and this one."""
        return (self,) if self.warmup is None else (self.warmup, self)


FUNCTION_TERM = "loss_function"
"""Name of the only term of a method whose loss is a function."""


def get(name: str, *, semantics: str = "paper", loss: LossConfig | None = None, **params: object) -> Method:
    """The method of that name, e.g. "iad1" or "ard+igdm", with its row of weights.

    params: fields of `LossConfig` (tau, beta, lam, gamma, ...), in place of a whole `loss`. `weights` replaces
    single cells of the row: {"kl_self": 6} or, with the part that alpha multiplies, {"kl_at_adv": (0, 0.5)};
    in the warm-up, where alpha is 1, such a cell weighs a + b.
    Raises ValueError for an unknown name, term, parameter or semantics, and for what the semantics does not have.
    """
    check_name(name)
    base, additions = split_name(name)
    row = METHODS[base]
    reading = look_up("semantics", semantics, _READINGS)
    if params:
        if unknown := sorted(set(params) - set(LossConfig.model_fields)):
            raise ValueError(f"{unknown[0]!r} is no parameter; {nearest(unknown[0], LossConfig.model_fields)}")
        loss = validated(LossConfig, {**(loss or LossConfig()).model_dump(), **params})
    loss = loss or LossConfig()
    check_reading(semantics, loss)
    replaced = _weights(loss.weights)
    if row.function is not None:
        return _by_function(name, row, loss)
    added: dict[str, Weight] = {}
    for addition in additions:
        added |= _weights(reading(ADDITIONS[addition])(loss))
    weights = _active(_weights(reading(row)(loss)) | added | replaced)
    if row.base is None:
        return Method(name, weights, loss)
    in_warmup = _weights(reading(look_up("method", row.base, METHODS))(loss))
    if row.base == base:
        in_warmup = _at_alpha_1(in_warmup)
    in_warmup = _active(in_warmup | added | _at_alpha_1(replaced))
    return Method(name, weights, loss, Method("+".join((row.base, *additions)), in_warmup, loss))


def _by_function(name: str, row: Row, loss: LossConfig) -> Method:
    """A method whose loss is a function: it has no weights to replace or to add to."""
    if loss.weights or "+" in name:
        raise ValueError(f"method: the loss of {name!r} is a function, and has no terms that could be weighed")
    return Method(name, {}, loss, None, row.function, row.reads)


def _weight(cell: float | tuple[float, float] | Weight) -> Weight:
    if isinstance(cell, Weight):
        return cell
    return Weight(*cell) if isinstance(cell, tuple) else Weight(float(cell), 0.0)


def _weights(cells: Mapping[str, float | tuple[float, float] | Weight]) -> dict[str, Weight]:
    return {term: _weight(cell) for term, cell in cells.items()}


def _at_alpha_1(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    return {term: weight._replace(a=weight.a + weight.b, b=0.0) for term, weight in weights.items()}


def _active(cells: Mapping[str, Weight]) -> dict[str, Weight]:
    """The cells that weigh anything, in the order of the terms. Raises ValueError for unknown names."""
    if unknown := sorted(set(cells) - set(TERMS)):
        raise ValueError(f"loss.weights: {unknown[0]!r} is no term; {nearest(unknown[0], TERMS)}")
    for weight in cells.values():
        if weight.factor is not None:
            look_up("factor", weight.factor, FACTORS)
    return {term: cells[term] for term in TERMS if term in cells and (cells[term].a or cells[term].b)}
