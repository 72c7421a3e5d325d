"""Every method as one row of six weights. Imports no torch.

Per sample i the loss is sum_k (a_k + b_k * alpha_i) * l_ik over the terms of `config.TERMS`
(the paper's Table 1, x~ = x_adv):

    ce_nat CE(S(x), y) | ce_adv CE(S(x~), y) | kl_self KL S(x~),S(x) |
    kl_at_nat KL S(x~),T_at(x) | kl_at_adv KL S(x~),T_at(x~) | kl_st_adv KL S(x~),T_st(x~)

A method is data: a base method for its warm-up, and a function from hyper-parameters to a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from engine.common.lookup import look_up, nearest
from engine.config import TERMS, LossConfig, check_reading, validated


class Weight(NamedTuple):
    """The affine function a + b * alpha of a sample's trust alpha in the teacher."""

    a: float
    b: float

    def __rmul__(self, factor: object) -> Weight:
        if not isinstance(factor, int | float):
            return NotImplemented
        return Weight(factor * self.a, factor * self.b)

    def __rsub__(self, constant: float) -> Weight:
        return Weight(constant - self.a, -self.b)


ALPHA = Weight(0.0, 1.0)
Cells = dict[str, float | Weight]
Rule = Callable[[LossConfig], Cells]


@dataclass(frozen=True)
class Row:
    """One entry of the table of methods."""

    summary: str
    paper: Rule
    official: Rule | None = None  # None: as in the paper
    base: str | None = None  # the method that is trained during the warm-up, where alpha is 1


_READINGS: dict[str, Callable[[Row], Rule]] = {
    "paper": lambda row: row.paper,
    "official": lambda row: row.official or row.paper,
}


def _gamma(p: LossConfig) -> float | Weight:
    return 1 - ALPHA if p.gamma is None else p.gamma


METHODS: dict[str, Row] = {
    "st": Row("standard training", lambda p: {"ce_nat": 1}),
    "at": Row("adversarial training (Madry et al., 2018)", lambda p: {"ce_adv": 1}),
    "trades": Row("TRADES (Zhang et al., 2019)", lambda p: {"ce_nat": 1, "kl_self": p.trades_lambda}),
    "ard": Row(
        "adversarially robust distillation (Goldblum et al., 2020)",
        lambda p: {"ce_nat": p.lam, "kl_at_nat": (1 - p.lam) * p.tau**2},
    ),
    "akd2": Row(
        "robust and standard teacher (Chen et al., 2021)",
        lambda p: {"ce_adv": p.lam1, "kl_at_adv": p.lam2 * p.tau**2, "kl_st_adv": p.lam3 * p.tau**2},
    ),
    "iad1": Row(
        "introspective distillation on ARD (IAD-I)",
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
    ),
    # Algorithm 1 leaves a bracket of IAD-II open: here gamma stands outside lam2 * tau^2.
    "iad2": Row(
        "introspective distillation on AKD2 (IAD-II)",
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
    ),
}


_IS_DIVERGENCE = {
    "ce_nat": False,
    "ce_adv": False,
    "kl_self": True,
    "kl_at_nat": True,
    "kl_at_adv": True,
    "kl_st_adv": True,
}
# What a divergence, summed over the classes, is divided by.
_KL_DIVISORS: dict[str, Callable[[int], int]] = {
    "batch": lambda num_classes: 1,
    "elements": lambda num_classes: num_classes,
}


@dataclass(frozen=True)
class Method:
    """A method's weights and what they make necessary.

    weights: six (a, b) pairs in the order of `config.TERMS`; a term with (0, 0) costs nothing.
    warmup: the method to train while alpha is hard-coded to 1, or None where there is no warm-up.
    """

    name: str
    weights: tuple[Weight, ...]
    loss: LossConfig
    warmup: Method | None = None

    def weights_of(self, num_classes: int) -> tuple[Weight, ...]:
        """The weights of the terms as they are summed over the classes; see `loss.kl_mean`."""
        divisor = look_up("loss.kl_mean", self.loss.kl_mean, _KL_DIVISORS)(num_classes)
        if divisor == 1:
            return self.weights
        return tuple(
            1 / divisor * weight if look_up("term", term, _IS_DIVERGENCE) else weight
            for term, weight in zip(TERMS, self.weights, strict=True)
        )

    def _has(self, *terms: str) -> bool:
        return any(self.weights[TERMS.index(term)] != (0, 0) for term in terms)

    @property
    def needs_alpha(self) -> bool:
        """Some weight depends on alpha."""
        return any(weight.b != 0 for weight in self.weights)

    @property
    def needs_x_adv(self) -> bool:
        """Adversarial images are crafted."""
        return self._has(*TERMS[1:])

    @property
    def needs_s_nat(self) -> bool:
        """A term reads S(x)."""
        return self._has("ce_nat", "kl_self")

    @property
    def needs_t_at_nat(self) -> bool:
        """A term reads T_at(x)."""
        return self._has("kl_at_nat")

    @property
    def needs_t_at_adv(self) -> bool:
        """A term or alpha reads T_at(x~)."""
        return self._has("kl_at_adv") or self.needs_alpha

    @property
    def needs_t_st_adv(self) -> bool:
        """A term reads T_st(x~)."""
        return self._has("kl_st_adv")

    @property
    def needs_teacher(self) -> bool:
        """The robust teacher is used, in the warm-up or after it."""
        phases = [self] if self.warmup is None else [self, self.warmup]
        return any(phase.needs_t_at_nat or phase.needs_t_at_adv for phase in phases)

    @property
    def needs_teacher_st(self) -> bool:
        """The standard teacher is used, in the warm-up or after it."""
        return self.needs_t_st_adv or (self.warmup is not None and self.warmup.needs_t_st_adv)


def get(name: str, *, semantics: str = "paper", loss: LossConfig | None = None, **params: object) -> Method:
    """The method of that name with its row of weights.

    params: fields of `LossConfig` (tau, beta, lam, gamma, ...), in place of a whole `loss`. `weights` replaces
    single cells of the row: {"kl_self": 6} or, with the part that alpha multiplies, {"kl_at_adv": (0, 0.5)};
    in the warm-up, where alpha is 1, such a cell weighs a + b.
    Raises ValueError for an unknown name, term, parameter or semantics, and for what the semantics does not have.
    """
    row = look_up("method", name, METHODS)
    reading = look_up("semantics", semantics, _READINGS)
    if params:
        if unknown := sorted(set(params) - set(LossConfig.model_fields)):
            raise ValueError(f"{unknown[0]!r} is no parameter; {nearest(unknown[0], LossConfig.model_fields)}")
        loss = validated(LossConfig, {**(loss or LossConfig()).model_dump(), **params})
    loss = loss or LossConfig()
    check_reading(semantics, loss)
    replaced = {term: _weight(cell) for term, cell in loss.weights.items()}
    weights = _row(reading(row), loss, replaced)
    if row.base is None:
        return Method(name, weights, loss)
    in_warmup = {term: Weight(cell.a + cell.b, 0.0) for term, cell in replaced.items()}
    base = look_up("method", row.base, METHODS)
    return Method(name, weights, loss, Method(row.base, _row(reading(base), loss, in_warmup), loss))


def _weight(cell: float | tuple[float, float] | Weight) -> Weight:
    return Weight(*cell) if isinstance(cell, tuple) else Weight(float(cell), 0.0)


def _row(rule: Rule, loss: LossConfig, replaced: Mapping[str, Weight]) -> tuple[Weight, ...]:
    cells = {term: _weight(cell) for term, cell in rule(loss).items()} | dict(replaced)
    if unknown := sorted(set(cells) - set(TERMS)):
        raise ValueError(f"loss.weights: {unknown[0]!r} is no term; {nearest(unknown[0], TERMS)}")
    return tuple(cells.get(term, Weight(0.0, 0.0)) for term in TERMS)
