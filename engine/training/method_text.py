"""A method in words: its loss with all numbers, what it reads, and the passes of a step. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from engine import config, methods, objectives
from engine.config import RunConfig
from engine.config.semantics import NAMES
from engine.methods import Method, Weight
from engine.training import plan

_NETWORKS = {"student": "S", "teacher": "T_at", "teacher_st": "T_st"}
# Keys that a method has defaults of, beside those of its loss and its attack, which are told in words.
_TOLD_IN_WORDS = ("method", "semantics", "loss.", "attack.")


class Summary(NamedTuple):
    """One row of the table of methods, in the reading of a semantics.

    reads: logits. outer, inner: the loss that is minimised, and the one that the attack maximises. source: paper
    and code.
    """

    name: str
    reads: str
    outer: str
    inner: str
    warmup: str
    source: str


def names() -> tuple[str, ...]:
    """Every method, and ARD with each addition."""
    return (*methods.METHODS, *(f"ard+{addition}" for addition in methods.ADDITIONS))


def run_of(name: str, semantics: str = NAMES[0]) -> tuple[RunConfig, Method]:
    """The default configuration of a method, and its weights. Raises ValueError for an unknown name."""
    run = config.load({"method": name, "semantics": semantics})
    return run, methods.get(name, semantics=semantics, loss=run.loss)


def summary(name: str, semantics: str = NAMES[0]) -> Summary:
    """A method's row. Raises ValueError for an unknown name."""
    run, method = run_of(name, semantics)
    sources = [text for row in rows_of(name) for text in (row.summary, row.source) if text]
    return Summary(
        name,
        ", ".join(map(logits, method.reads)),
        loss(method),
        inner_loss(run, method),
        warmup(run, method),
        ". ".join(sources),
    )


def rows_of(name: str) -> list[methods.Row]:
    """The entries that a name puts together: of the method, and of each addition."""
    methods.check_name(name)
    base, additions = methods.split_name(name)
    return [methods.METHODS[base], *(methods.ADDITIONS[addition] for addition in additions)]


def logits(name: str) -> str:
    """Logits as a formula has them, e.g. S(x~)."""
    network, view = objectives.LOGITS[name]
    return f"{_NETWORKS[network]}({objectives.VIEWS[view]})"


def loss(method: Method) -> str:
    """The loss of a sample as a sum of its terms, e.g. (1 - alpha) KL(S(x) || S(x~)) + KL(T_at(x) || S(x~))."""
    if method.function is not None:
        return f"the function {method.function.__name__}"
    growth = f"e/{method.loss.growth_epochs or 'epochs'}"
    text = " + ".join(f"{weight(cell, growth)}{term(name, method)}" for name, cell in method.weights.items())
    text = text.replace("+ -", "- ")
    shared = method.loss.kl_mean == "elements" and any(objectives.TERMS[name].target for name in method.weights)
    return f"{text}, each KL divided by the number of classes" if shared else text


def weight(cell: Weight, growth: str = "e/epochs") -> str:
    """A weight with a space behind it; nothing for 1."""
    if cell.b == 0:
        parts = [] if cell.a == 1 else [number(cell.a)]
    elif cell.a == 0:
        parts = ["alpha"] if cell.b == 1 else [number(cell.b), "alpha"]
    elif cell.b == -cell.a:
        parts = [*([] if cell.a == 1 else [number(cell.a)]), "(1 - alpha)"]
    else:
        parts = [f"({number(cell.a)} {'+' if cell.b > 0 else '-'} {number(abs(cell.b))} alpha)"]
    parts += [growth] * cell.grows + ([] if cell.factor is None else [cell.factor])
    return "".join(f"{part} " for part in parts)


def term(name: str, method: Method) -> str:
    """A term's formula, with its temperature where that is not 1."""
    found = objectives.TERMS[name]
    tau = 1.0 if found.temperature is None else getattr(method.loss, found.temperature)
    return found.text if tau == 1 else f"{found.text} at temperature {number(tau)}"


def number(value: float) -> str:
    """A number with four digits, or a fraction of small whole numbers that equals it."""
    ratio = Fraction(value).limit_denominator(12)
    rounded = f"{value:.4g}"
    return str(ratio) if float(rounded) != value and abs(float(ratio) - value) < 1e-12 else rounded


def inner_loss(run: RunConfig, method: Method) -> str:
    """The loss that the attack maximises."""
    if not method.needs_x_adv:
        return "no attack"
    spec = run.attack
    return plan.attack_loss(spec).text.format(kappa=spec.kappa, slope=spec.slope)


def warmup(run: RunConfig, method: Method) -> str:
    """The method of the warm-up and its part of the run; empty where there is none."""
    epochs = config.epochs_of(run.loss.warmup, run.epochs)
    if method.warmup is None or not epochs:
        return ""
    base = "alpha = 1" if method.warmup.name == method.name else method.warmup.name
    return f"{base}, {epochs} of {run.epochs} epochs"


def passes(run: RunConfig, method: Method) -> Iterator[str]:
    """The passes of a step after the warm-up, in their order."""
    wanted = plan.forwards(method, run.attack, run.forwards)
    yield from map(logits, wanted.before_attack)
    idle = plan.Idle()
    if method.needs_x_adv:
        idle, ascended = plan.idle(run.forwards, in_warmup=False), plan.attack_loss(run.attack)
        yield from ["S(x)"] * ascended.forwards + ["T_at(x) with gradient"] * ascended.gradients
        networks = "S(x~) and T_at(x~)" if ascended.teacher_in_loop else "S(x~)"
        times = "once" if run.attack.num_steps == 1 else f"{run.attack.num_steps} times"
        yield f"{times} {networks} with the gradient of x~"

    def unread(views: tuple[str, ...]) -> Iterator[str]:
        yield from (f"S({objectives.VIEWS[view]}) for BatchNorm alone" for view in views)

    yield from unread(idle.before)
    between = idle.between
    for place, (name, learns) in enumerate(wanted.student.items()):
        if place and objectives.LOGITS[name].view == "nat":
            yield from unread(between)
            between = ()
        yield logits(name) if learns else f"{logits(name)} for BatchNorm alone"
    yield from unread((*between, *idle.after))
    yield from map(logits, wanted.after_attack)


def factors(method: Method) -> dict[str, str]:
    """Formulas of the factors of a method's terms, by name."""
    used = {cell.factor for cell in method.weights.values()}
    return {name: factor.text for name, factor in objectives.FACTORS.items() if name in used}


def defaults(run: RunConfig) -> dict[str, str]:
    """Keys beside those of loss and attack that the method sets otherwise than all others."""
    found = config.flat(run.tree())
    return {
        key: as_written(value)
        for key, value in found.items()
        if value != config.DEFAULTS[key] and not key.startswith(_TOLD_IN_WORDS)
    }


def differences(name: str) -> dict[str, tuple[str, str]]:
    """Keys, and the loss, in which the readings differ: as of the paper, as of the published code."""
    (paper, of_paper), (official, of_official) = (run_of(name, semantics) for semantics in NAMES)
    found = {}
    unused = {*objectives.TEACHERS} - {*plan.teachers(of_paper, paper.attack)}
    if loss(of_paper) != loss(of_official):
        found["loss"] = (loss(of_paper), loss(of_official))
    for key, (before, after) in config.differences(paper, official).items():
        if key != "semantics" and key.partition(".")[0] not in unused:
            found[key] = (as_written(before), as_written(after))
    return found


def as_written(value: object) -> str:
    """A value of the configuration as one would write it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_written, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        ratio = Fraction(value).limit_denominator(255)
        return str(ratio) if ratio.denominator == 255 and float(ratio) == value else number(value)
    return "null" if value is None else str(value)
