"""The table of methods, typed again by hand as numbers, and the forwards that each row needs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from engine import methods
from engine.config import AttackSpec, LossConfig
from engine.methods import Method, Weight, WeightedTerm
from engine.objectives import DIFFERENCES, FACTORS, LOGITS, TERMS
from engine.training import plan

PARAMS: dict[str, Any] = {
    "tau": 3, "lam": 0.3, "lam1": 0.2, "lam2": 0.7, "lam3": 0.4, "trades_lambda": 5
}  # fmt: skip
ZERO = (0, 0)

# Columns: ce_nat, ce_adv, kl_self, kl_at_nat, kl_at_adv, kl_st_adv; a weight is (a, b) for a + b alpha.
# tau = 3: (1 - lam) tau^2 = 6.3, lam2 tau^2 = 6.3, lam3 tau^2 = 3.6. tau_self = 2: (1 - lam) tau_self^2 = 2.8.
ST = ((1, 0), ZERO, ZERO, ZERO, ZERO, ZERO)
AT = (ZERO, (1, 0), ZERO, ZERO, ZERO, ZERO)
TRADES = ((1, 0), ZERO, (5, 0), ZERO, ZERO, ZERO)
ARD = ((0.3, 0), ZERO, ZERO, (6.3, 0), ZERO, ZERO)
AKD2 = (ZERO, (0.2, 0), ZERO, ZERO, (6.3, 0), (3.6, 0))
SAME = {"st": ST, "at": AT, "trades": TRADES, "ard": ARD, "akd2": AKD2}
PAPER = SAME | {
    "iad1": ((0.3, 0), ZERO, (2.8, -2.8), (6.3, 0), ZERO, ZERO),
    "iad1-down": ((0.3, 0), ZERO, (2.8, -2.8), (0, 6.3), ZERO, ZERO),
    "iad2": (ZERO, (0.2, 0), (1, -1), ZERO, (0, 6.3), (3.6, 0)),
}
OFFICIAL = SAME | {
    "iad1": ((0.3, 0), ZERO, (0.7, -0.7), (6.3, 0), ZERO, ZERO),
    "iad1-down": ((0.3, 0), ZERO, (0.7, -0.7), (0, 6.3), ZERO, ZERO),
    "iad2": (ZERO, (0.2, 0), (6.3, -6.3), ZERO, (0, 6.3), (3.6, 0)),
}
CONSTANT_GAMMA = {  # gamma = 0.5 (Table 9)
    "iad1": ((0.3, 0), ZERO, (1.4, 0), (6.3, 0), ZERO, ZERO),
    "iad1-down": ((0.3, 0), ZERO, (1.4, 0), (0, 6.3), ZERO, ZERO),
    "iad2": (ZERO, (0.2, 0), (0.5, 0), ZERO, (0, 6.3), (3.6, 0)),
}
WARMUP = {"iad1": ("ard", ARD), "iad1-down": ("ard", ARD), "iad2": ("akd2", AKD2)}


SIX = ("ce_nat", "ce_adv", "kl_self", "kl_at_nat", "kl_at_adv", "kl_st_adv")

# The newer methods, by term: a + b alpha, a factor, and whether the weight grows. igdm = 2.
NEWER: dict[str, dict[str, tuple[float, float, str | None, bool]]] = {
    "mart": {
        "ce_adv": (1, 0, None, False),
        "margin_adv": (1, 0, None, False),
        "kl_self_live": (5, 0, None, False),
    },
    "fgsm-rs": {"ce_adv": (1, 0, None, False)},
    "n-fgsm": {"ce_adv": (1, 0, None, False)},
    "rslad": {"kl_at_nat": (6.3, 0, None, False), "kl_at_clean": (2.7, 0, None, False)},
    "adaad": {"kl_at_adv": (6.3, 0, None, False), "kl_at_clean": (2.7, 0, None, False)},
    "adaiad": {
        "ce_nat": (0.3, 0, None, False),
        "kl_self": (0.7, -0.7, None, False),
        "kl_at_adv": (6.3, 0, None, False),
    },
    "mtard": {"kl_at_adv": (9, 0, "robust_share", False), "kl_st_clean": (9, 0, "natural_share", False)},
    "saad": {
        "kl_at_adv": (9, 0, "entropy", False),
        "kl_at_clean": (2.7, 0, "certainty", False),
        "kl_difference": (2, 0, "entropy", True),
    },
    "ard+igdm": {
        "ce_nat": (0.3, 0, None, False),
        "kl_at_nat": (6.3, 0, None, False),
        "kl_difference": (2, 0, None, True),
    },
}


def is_row(method: Method, row: tuple[tuple[float, float], ...]) -> bool:
    cells = [method.weights.get(term, Weight(0, 0))[:2] for term in SIX]
    plain = all(weight[2:] == (None, False) for weight in method.weights.values())
    return (
        plain
        and set(method.weights) <= set(SIX)
        and all(got == pytest.approx(wanted, rel=1e-14, abs=0) for got, wanted in zip(cells, row, strict=True))
    )


def row_of(method: Method) -> dict[str, tuple[float, float]]:
    """The weights a + b alpha by term."""
    return {term: (weight.a, weight.b) for term, weight in method.weights.items()}


def phase_of(method: Method, phase: str) -> Method:
    if phase == "after":
        return method
    assert method.warmup is not None
    return method.warmup


def test_the_tables_here_name_every_method() -> None:
    assert set(PAPER) == set(OFFICIAL)
    assert {name.partition("+")[0] for name in (*PAPER, *NEWER)} == set(methods.METHODS)
    assert tuple(TERMS)[:6] == SIX


@pytest.mark.parametrize("semantics", ["paper", "official"])
@pytest.mark.parametrize("name", NEWER)
def test_rows_of_the_newer_methods(name: str, semantics: str) -> None:
    method = methods.get(name, semantics=semantics, igdm=2, **PARAMS)
    assert list(method.weights) == [term for term in TERMS if term in NEWER[name]]
    for term, weight in method.weights.items():
        a, b, *rest = NEWER[name][term]
        assert weight == (pytest.approx(a, rel=1e-14), pytest.approx(b, rel=1e-14), *rest), term


def test_the_warm_up_of_adaiad_is_its_own_row_at_alpha_1() -> None:
    warmup = methods.get("adaiad", **PARAMS).warmup
    assert warmup is not None
    assert warmup.name == "adaiad"
    assert row_of(warmup) == {"ce_nat": (0.3, 0), "kl_at_adv": (pytest.approx(6.3), 0)}


def test_an_addition_is_in_the_warm_up_too() -> None:
    warmup = methods.get("iad1+igdm", igdm=2).warmup
    assert warmup is not None
    assert (warmup.name, row_of(warmup)) == ("ard+igdm", {"kl_at_nat": (1, 0), "kl_difference": (2, 0)})


def test_a_term_has_all_its_numbers() -> None:
    method = methods.get("saad", igdm=2, tau=3, lam=0.5, kl_mean="elements")
    expected: tuple[Any, ...] = (
        ("kl_at_adv", "kl", "s_adv", "t_at_adv", (pytest.approx(0.9), 0), 3, False, "entropy"),
        ("kl_at_clean", "kl", "s_nat", "t_at_nat", (pytest.approx(0.45), 0), 3, False, "certainty"),
        ("kl_difference", "kl", "s_difference", "t_at_difference", (pytest.approx(0.05), 0), 1, False, "entropy"),
    )
    assert method.terms(10, growth=0.25) == expected
    (_, self_term) = methods.get("trades", detach_self=True, tau_self=2, trades_lambda=7).terms(10)
    assert self_term == WeightedTerm("kl_self", "kl", "s_adv", "s_nat", (7, 0), 2, True, None)
    assert not methods.get("ard", detach_self=True).terms(10)[0].detach  # of the self term alone


def test_the_tables_of_objectives_hold_together() -> None:
    for term in TERMS.values():
        assert {term.student, term.target} <= {*LOGITS, *DIFFERENCES, None}
        assert term.temperature is None or term.temperature in LossConfig.model_fields
    assert {name for factor in FACTORS.values() for name in factor.reads} <= set(LOGITS)
    assert {name for pair in DIFFERENCES.values() for name in pair} <= set(LOGITS)


@pytest.mark.parametrize("name", PAPER)
def test_paper_rows(name: str) -> None:
    method = methods.get(name, tau_self=2, **PARAMS)
    assert method.name == name
    assert is_row(method, PAPER[name]), method.weights


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_rows(name: str) -> None:
    method = methods.get(name, semantics="official", **PARAMS)
    assert is_row(method, OFFICIAL[name]), method.weights


@pytest.mark.parametrize("name", CONSTANT_GAMMA)
def test_constant_gamma_rows(name: str) -> None:
    method = methods.get(name, tau_self=2, gamma=0.5, **PARAMS)
    assert is_row(method, CONSTANT_GAMMA[name]), method.weights


@pytest.mark.parametrize(("semantics", "more"), [("paper", {"gamma": 0.5, "tau_self": 2}), ("official", {})])
@pytest.mark.parametrize("name", PAPER)
def test_the_warm_up_is_the_base_method(name: str, semantics: str, more: dict[str, Any]) -> None:
    warmup = methods.get(name, semantics=semantics, **PARAMS, **more).warmup
    if name not in WARMUP:
        assert warmup is None
        return
    base, row = WARMUP[name]
    assert warmup is not None
    assert warmup.name == base
    assert is_row(warmup, row), warmup.weights
    assert warmup.warmup is None


def test_default_rows_are_those_of_section_5() -> None:
    """lam = 0, lam1..3 = 0.25, 0.5, 0.25, tau = 1; TRADES with 6."""
    assert row_of(methods.get("trades")) == {"ce_nat": (1, 0), "kl_self": (6, 0)}
    assert row_of(methods.get("ard")) == {"kl_at_nat": (1, 0)}
    assert row_of(methods.get("iad1")) == {"kl_self": (1, -1), "kl_at_nat": (1, 0)}
    assert row_of(methods.get("akd2")) == {"ce_adv": (0.25, 0), "kl_at_adv": (0.5, 0), "kl_st_adv": (0.25, 0)}
    assert row_of(methods.get("iad2", semantics="official")) == {
        "ce_adv": (0.25, 0), "kl_self": (0.5, -0.5), "kl_at_adv": (0, 0.5), "kl_st_adv": (0.25, 0)
    }  # fmt: skip


@pytest.mark.parametrize("semantics", ["paper", "official"])
def test_table_12_row_self_1_minus_alpha_teacher_alpha_is_iad1_down(semantics: str) -> None:
    weights = {"kl_self": (1, -1), "kl_at_nat": (0, 1)}
    assert methods.get("ard", weights=weights).weights == methods.get("iad1-down", semantics=semantics).weights


@pytest.mark.parametrize("name", ["iad1", "iad1-down", "iad2"])
@pytest.mark.parametrize("semantics", ["paper", "official"])
def test_at_alpha_1_a_row_is_its_warm_up(name: str, semantics: str) -> None:
    method = methods.get(name, semantics=semantics, **PARAMS)
    assert method.warmup is not None
    for term in SIX:
        after, before = (one.weights.get(term, Weight(0, 0)) for one in (method, method.warmup))
        assert after.a + after.b == pytest.approx(before.a, rel=1e-14, abs=0)


def test_weights_replace_single_cells() -> None:
    method = methods.get("iad2", weights={"ce_adv": 0, "kl_st_adv": 2}, **PARAMS)
    expected = (ZERO, ZERO, (1, -1), ZERO, (0, 6.3), (2, 0))
    assert is_row(method, expected), method.weights


def test_in_the_warm_up_a_replaced_cell_weighs_a_plus_b() -> None:
    method = methods.get("iad1", weights={"kl_self": (6, -2), "kl_at_nat": [0.25, 0.5], "ce_adv": (1, -1)})
    assert row_of(method) == {"ce_adv": (1, -1), "kl_self": (6, -2), "kl_at_nat": (0.25, 0.5)}
    assert method.warmup is not None
    assert row_of(method.warmup) == {"kl_self": (4, 0), "kl_at_nat": (0.75, 0)}
    assert not method.warmup.needs_alpha


# What a phase needs, in the order x_adv, S(x), T_at(x), T_at(x~), T_st(x~), alpha.
NEEDS = {
    ("st", "after"): "S(x)",
    ("at", "after"): "x_adv",
    ("trades", "after"): "x_adv S(x)",
    ("ard", "after"): "x_adv T_at(x)",
    ("iad1", "after"): "x_adv S(x) T_at(x) T_at(x~) alpha",
    ("iad1", "warmup"): "x_adv T_at(x)",
    ("iad1-down", "after"): "x_adv S(x) T_at(x) T_at(x~) alpha",
    ("iad1-down", "warmup"): "x_adv T_at(x)",
    ("akd2", "after"): "x_adv T_at(x~) T_st(x~)",
    ("iad2", "after"): "x_adv S(x) T_at(x~) T_st(x~) alpha",
    ("iad2", "warmup"): "x_adv T_at(x~) T_st(x~)",
    ("mart", "after"): "x_adv S(x)",
    ("fgsm-rs", "after"): "x_adv",
    ("n-fgsm", "after"): "x_adv",
    ("rslad", "after"): "x_adv T_at(x)",
    ("adaad", "after"): "x_adv T_at(x~)",
    ("adaiad", "after"): "x_adv S(x) T_at(x~) alpha",
    ("adaiad", "warmup"): "x_adv T_at(x~)",
    ("mtard", "after"): "x_adv S(x) T_at(x~) T_st(x)",
    ("saad", "after"): "x_adv T_at(x~) S(x-) T_at(x-)",
    ("ard+igdm", "after"): "x_adv T_at(x) T_at(x~) S(x-) T_at(x-)",
}


def needs(method: Method) -> str:
    words = {"s_nat": "S(x)", "t_at_nat": "T_at(x)", "t_at_adv": "T_at(x~)", "t_st_adv": "T_st(x~)"}
    words |= {"s_mirrored": "S(x-)", "t_at_mirrored": "T_at(x-)", "t_st_nat": "T_st(x)"}
    found = [word for name, word in words.items() if name in method.reads]
    return " ".join(["x_adv"] * method.needs_x_adv + found + ["alpha"] * method.needs_alpha)


@pytest.mark.parametrize("semantics", ["paper", "official"])
@pytest.mark.parametrize(("name", "phase"), NEEDS)
def test_what_each_phase_needs(name: str, phase: str, semantics: str) -> None:
    method = methods.get(name, semantics=semantics)
    assert needs(phase_of(method, phase)) == NEEDS[name, phase]


@pytest.mark.parametrize(
    ("name", "params", "needed"),
    [
        ("ard", {"lam": 0.1}, "x_adv S(x) T_at(x)"),
        ("ard", {"lam": 1}, "S(x)"),
        ("trades", {"trades_lambda": 0}, "S(x)"),
        ("akd2", {"lam2": 0}, "x_adv T_st(x~)"),
        ("akd2", {"lam3": 0}, "x_adv T_at(x~)"),
        ("iad1", {"gamma": 0.5}, "x_adv S(x) T_at(x)"),
        ("iad2", {"gamma": 0.5, "lam2": 0}, "x_adv S(x) T_st(x~)"),
        ("at", {"weights": {"ce_adv": (0, 1)}}, "x_adv T_at(x~) alpha"),
        ("st", {"weights": {"kl_st_adv": 1}}, "x_adv S(x) T_st(x~)"),
    ],
)
def test_a_zero_weight_needs_no_forward(name: str, params: dict[str, Any], needed: str) -> None:
    assert needs(methods.get(name, **params)) == needed


def test_teachers_are_those_of_both_phases_and_of_the_attack() -> None:
    def teachers(name: str, attack_loss: str = "ce", **params: Any) -> tuple[str, ...]:
        return plan.teachers(methods.get(name, **params), AttackSpec(loss=attack_loss))

    assert {name: teachers(name) for name in (*PAPER, *NEWER)} == {
        **dict.fromkeys(("st", "at", "trades", "mart", "fgsm-rs", "n-fgsm"), ()),
        **dict.fromkeys(("ard", "iad1", "iad1-down", "rslad", "adaad", "adaiad", "saad"), ("teacher",)),
        "ard+igdm": ("teacher",),
        **dict.fromkeys(("akd2", "iad2", "mtard"), ("teacher", "teacher_st")),
    }
    # At alpha = 1 this cell is 0: the robust teacher is needed after the warm-up alone.
    method = methods.get("iad2", weights={"kl_at_adv": (1, -1)})
    assert method.warmup is not None
    assert "t_at_adv" in method.reads
    assert "t_at_adv" not in method.warmup.reads
    assert teachers("at", weights={"kl_at_nat": 1}) == ("teacher",)
    for loss in ("kl-teacher", "kl-teacher-moving", "kl-teacher-linear"):
        assert teachers("at", loss) == ("teacher",)
        assert teachers("st", loss) == ()  # it attacks nothing


def test_params_replace_fields_of_a_given_loss() -> None:
    method = methods.get("iad1", loss=LossConfig(lam=0.5, beta=0.7), tau=2)
    assert (method.loss.lam, method.loss.beta, method.loss.tau) == (0.5, 0.7, 2)
    assert row_of(method)["kl_at_nat"] == (2, 0)
    assert method.warmup is not None
    assert method.warmup.loss == method.loss


def test_alpha_has_the_algebra_of_an_affine_function() -> None:
    assert methods.ALPHA[:2] == (0, 1)
    assert Weight(1, -1) == 1 - methods.ALPHA
    assert Weight(3, -3) == 3 * (1 - methods.ALPHA)
    assert 0.5 * Weight(1, 2, "entropy", grows=True) == Weight(0.5, 1, "entropy", grows=True)


def test_a_method_is_frozen() -> None:
    method = methods.get("iad1")
    with pytest.raises(FrozenInstanceError):
        method.name = "ard"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "keys", "names"),
    [
        ("iad3", {}, ["method", "'iad3'", "did you mean 'iad", "known: adaad, adaiad, akd2, ard, at, fgsm-rs"]),
        ("IAD1", {}, ["method", "'IAD1'", "known: "]),
        ("iad1", {"semantics": "oficial"}, ["semantics", "'oficial'", "did you mean 'official'", "paper"]),
        ("iad1", {"taus": 1}, ["'taus'", "did you mean 'tau'", "known: balance_floor, balance_rate, beta"]),
        ("iad1", {"tau": 0}, ["tau", "greater than 0", "got 0"]),
        ("iad1", {"lam": "x"}, ["lam", "'x'"]),
        ("ard+igdn", {}, ["method", "'igdn'", "did you mean 'igdm'"]),
        ("ard+igdm+igdm", {}, ["method", "'ard+igdm+igdm'", "twice"]),
        ("iad1", {"weights": {"klself": 1}}, ["loss.weights", "'klself'", "did you mean 'kl_self'"]),
        ("iad1", {"semantics": "official", "gamma": 0.5}, ["gamma", "0.5", "'paper'"]),
        ("iad2", {"semantics": "official", "tau_self": 2}, ["tau_self", "official", "got 2"]),
    ],
)
def test_what_is_unknown_is_named_in_one_line(name: str, keys: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        methods.get(name, **keys)
    assert [part for part in names if part not in str(error.value)] == []


def test_methods_and_configuration_import_no_torch() -> None:
    program = (
        "import sys, engine, engine.config, engine.methods, engine.config.semantics;"
        "print(*{'torch', 'numpy', 'triton'} & set(sys.modules))"
    )
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
