"""Methods in words: their formulas, computed as they are read, and their passes, counted."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from engine import methods, objectives
from engine.config.semantics import NAMES
from engine.kernels import Term, distill_loss
from engine.methods import Weight
from engine.training import method_text, plan

CLASSES, LABEL, EPOCH, EPOCHS = 5, 3, 60, 80
EVERY = pytest.mark.parametrize("name", [*method_text.names(), "iad2+igdm"])


def log_softmax(z: Any) -> Any:
    shifted = z - z.max()
    return shifted - np.log(np.exp(shifted).sum())


@dataclass(frozen=True)
class Divergence:
    """KL(target || logits) / divisor, at a temperature that may be told behind it."""

    target: Any
    logits: Any
    divisor: int
    temperature: float = 1.0

    def at(self, temperature: float) -> Divergence:
        return replace(self, temperature=temperature)

    def __float__(self) -> float:
        log_p, log_q = (log_softmax(z / self.temperature) for z in (self.target, self.logits))
        return float((np.exp(log_p) * (log_p - log_q)).sum() / self.divisor)

    def __rmul__(self, weight: float) -> float:
        return weight * float(self)

    def __add__(self, other: Any) -> float:
        return float(self) + float(other)

    __radd__ = __add__


def as_read(text: str, logits: dict[str, Any], known: dict[str, float]) -> float:
    """The value of a formula for one image: numbers and names that stand beside each other are multiplied."""
    text, by_elements, _ = text.partition(", each KL divided by the number of classes")
    text = re.sub(r" at temperature (\d+)", r".at(\1)", text)
    text = text.replace("max_{c != y} softmax(S(x~))_c", "margin").replace("softmax(S(x))_y", "own")
    text = re.sub(r"e/(epochs|\d+)", r"(e/\1)", text)
    text = text.replace(" || ", ", ").replace("x~", "'adv'").replace("x-", "'mirrored'").replace("(x)", "('nat')")
    text = re.sub(r"(?<=[\w)]) (?=[(A-Za-z])", "*", text)
    p_adv, p_nat = (np.exp(log_softmax(logits[name])) for name in ("s_adv", "s_nat"))
    names: dict[str, Any] = known | {
        "S": lambda view: logits[f"s_{view}"],
        "T_at": lambda view: logits[f"t_at_{view}"],
        "T_st": lambda view: logits[f"t_st_{view}"],
        "CE": lambda z, label: -log_softmax(z)[label],
        "KL": lambda target, z: Divergence(target, z, CLASSES if by_elements else 1),
        "y": LABEL,
        "log": np.log,
        "margin": np.delete(p_adv, LABEL).max(),
        "own": p_nat[LABEL],
        "alpha": np.exp(log_softmax(logits["t_at_adv"]))[LABEL] ** 0.1,
        "e": EPOCH,
        "epochs": EPOCHS,
    }
    return float(eval(text, {"__builtins__": {}}, names))  # noqa: S307  # of our own text


@EVERY
@pytest.mark.parametrize("semantics", NAMES)
def test_the_loss_is_the_formula_that_is_told(name: str, semantics: str) -> None:
    run, method = method_text.run_of(name, semantics)
    generator = np.random.default_rng(7)
    logits = {known: 2 * generator.standard_normal(CLASSES) for known in objectives.LOGITS}
    tensors = {known: torch.tensor(z)[None] for known, z in logits.items()}
    tensors |= {known: tensors[whole] - tensors[part] for known, (whole, part) in objectives.DIFFERENCES.items()}
    factors = {known: 0.3 + number for number, known in enumerate(objectives.FACTORS)}
    terms = [Term(*term[1:]) for term in method.terms(CLASSES, EPOCH / (method.loss.growth_epochs or EPOCHS))]
    used = {term.factor for term in terms if term.factor is not None}
    expected = distill_loss(
        tensors, torch.tensor([LABEL]), terms, trust=objectives.TRUST, beta=run.loss.beta,
        factors={known: torch.tensor([factors[known]], dtype=torch.float64) for known in used},
    ).loss  # fmt: skip
    # MART's 1e-12 and 1e-7 are not told.
    assert as_read(method_text.loss(method), logits, factors) == pytest.approx(float(expected), rel=1e-6)


@EVERY
@pytest.mark.parametrize("semantics", NAMES)
def test_the_passes_that_are_told_are_those_of_the_plan(name: str, semantics: str) -> None:
    run, method = method_text.run_of(name, semantics)
    attacked = trained = forward = 0
    learns = set(plan.forwards(method, run.attack, run.forwards).student.items())
    for told in method_text.passes(run, method):
        if match := re.fullmatch(r"(once|\d+ times) (.*) with the gradient of x~", told):
            attacked += (1 if match[1] == "once" else int(match[1].split()[0])) * len(match[2].split(" and "))
        elif told.endswith("with gradient"):
            attacked += 1
        elif told in [method_text.logits(known) for known, has_gradient in learns if has_gradient]:
            trained += 1
        else:
            forward += 1
    ascended = plan.attack_loss(run.attack)
    if method.needs_x_adv and ascended.forwards and trained > sum(has for _, has in learns):
        trained, forward = trained - ascended.forwards, forward + ascended.forwards  # S(x) before the attack
    assert plan.passes(method, run.attack, run.forwards) == (attacked, trained, forward)


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (Weight(1, 0), ""),
        (Weight(0.25, 0), "0.25 "),
        (Weight(5 / 6, 0), "5/6 "),
        (Weight(0, 1), "alpha "),
        (Weight(0, 0.5), "0.5 alpha "),
        (Weight(1, -1), "(1 - alpha) "),
        (Weight(2, -2), "2 (1 - alpha) "),
        (Weight(0.5, 0.25), "(0.5 + 0.25 alpha) "),
        (Weight(0.5, -0.25), "(0.5 - 0.25 alpha) "),
        (Weight(3, 0, "entropy", True), "3 e/epochs entropy "),
    ],
)
def test_a_weight_in_words(cell: Weight, text: str) -> None:
    assert method_text.weight(cell) == text


def test_warm_ups_are_told_by_their_method_and_epochs() -> None:
    told = {name: method_text.summary(name).warmup for name in method_text.names()}
    assert {name: text for name, text in told.items() if text} == {
        "iad1": "ard, 60 of 200 epochs",
        "iad1-down": "ard, 60 of 200 epochs",
        "iad2": "akd2, 40 of 200 epochs",
        "adaiad": "alpha = 1, 60 of 200 epochs",
    }


def test_differences_of_the_readings_are_told() -> None:
    told = method_text.differences("saad")
    assert told == {"validation": ("0.02", "0")}
    assert method_text.differences("mart")["attack.epsilon"] == ("8/255", "0.031")
    assert method_text.differences("iad2")["teacher_st.model"] == ("null", "resnet18")
    assert "teacher_st.model" not in method_text.differences("iad1")  # it has no standard teacher


def test_every_method_has_a_source() -> None:
    assert {name for name, row in methods.METHODS.items() if not row.source} == {"st"}


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'iad1'"):
        method_text.summary("iad1x")
