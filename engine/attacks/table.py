"""The attacks of evaluations by name: built-in ones, also with a number or a file in the name, and the user's.

`engine attacks`, the checks of names, the shell's completion, titles and reports read this table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from engine.attacks.autoattack import NO_ATTACK, PACKAGE, PARTS, ROUNDED, WHOLE
from engine.attacks.fast import FAST
from engine.attacks.kinds import (
    AttackFunction,
    AutoAttackPart,
    ByFunction,
    EvaluationAttack,
    FastAutoAttack,
    NoAttack,
    Packaged,
    Preset,
    RoundedAutoAttack,
    Transferred,
    WholeAutoAttack,
    place_of,
)
from engine.attacks.pgd import NORMS, PGD_NAME, PGD_NAMES, PRESETS
from engine.common.files import checkpoint_of
from engine.common.lookup import IMPORT_HINT, check_known, nearest

_USUAL = {
    "fgsm": ("FGSM", "Goodfellow et al. (2015)"),
    "fgsm-rs": ("FGSM-RS", "Wong et al. (2020)"),
    "cw": ("CW-inf", "Carlini and Wagner (2017)"),
}
_PGD_SOURCES = {"": "Madry et al. (2018)", "-dlr": "Croce and Hein (2020)", "-cw": "Carlini and Wagner (2017)"}


def _preset(name: str) -> Preset:
    """The attack of a name that `engine.attacks.pgd.preset` knows."""
    if match := PGD_NAME.fullmatch(name):
        steps, loss = match.groups()
        return Preset(name, f"PGD-{steps}{loss.upper().replace('-', ' ')}", _PGD_SOURCES[loss])
    return Preset(name, *_USUAL[name])


ATTACKS: dict[str, EvaluationAttack] = {
    attack.name: attack
    for attack in (
        NoAttack(NO_ATTACK, "Natural", "", least_classes=1),
        *map(_preset, PRESETS),
        *(AutoAttackPart(name, part.title, part.source, part.least_classes) for name, part in PARTS.items()),
        WholeAutoAttack(WHOLE, "AA", "Croce and Hein (2020)"),
        FastAutoAttack(FAST, "AA-fast", "Gao et al. (2022), Liu et al. (2022)"),
        RoundedAutoAttack(WHOLE + ROUNDED, "AA (TF32)", "Croce and Hein (2020)"),
        Packaged(WHOLE + PACKAGE, "AA (package)", "Croce and Hein (2020)"),
    )
}
"""The built-in attacks that have one name."""

TRANSFER = "transfer:"
PATTERNS = {
    **{name: f"{name.replace('pgdN', 'pgd20')} with any number of steps N" for name in PGD_NAMES},
    f"{TRANSFER}CKPT": "images that pgd20 crafts on the network of another checkpoint or run",
    f"{TRANSFER}CKPT:ATTACK": "the same with another attack that crafts them",
}
"""Names that a number or a file completes, and what they are."""

_added: dict[str, ByFunction] = {}


def names() -> tuple[str, ...]:
    """Every name without a number or a file to fill in, the user's attacks last."""
    return (*ATTACKS, *_added)


def find(name: str) -> EvaluationAttack:
    """The attack of that name. Raises ValueError, one line, for an unknown one."""
    if name in ATTACKS or name in _added:
        return (ATTACKS | _added)[name]
    if PGD_NAME.fullmatch(name):
        return _preset(name)
    if name.startswith(TRANSFER):
        return _transferred(name)
    raise ValueError(f"attack: {name!r} is not known; {nearest(name, (*names(), *PATTERNS))}; {IMPORT_HINT}")


def check_defined(attack: EvaluationAttack, num_classes: int, threat_model: str) -> None:
    """Raise ValueError, naming those that are, where an attack is not defined for so many classes or the ball."""
    if attack.is_defined(num_classes, threat_model):
        return
    reason = f"is defined for {', '.join(attack.threat_models)}, and not for {threat_model}"
    if num_classes < attack.least_classes:
        reason = f"needs {attack.least_classes} classes, and the model has {num_classes}"
    defined = [name for name in names() if find(name).is_defined(num_classes, threat_model)]
    raise ValueError(f"{attack.name}: {reason}; defined: {', '.join(defined)}")


def check_gradients(attack: EvaluationAttack, where: str, *, has_gradients: bool) -> None:
    """Raise ValueError, naming attacks that need none, where a network in a file has no gradients for this one."""
    if has_gradients or not attack.needs_gradients:
        return
    without = [name for name in names() if not find(name).needs_gradients]
    patterns = (pattern for pattern in PATTERNS if pattern.startswith(TRANSFER))
    known = ", ".join((*without, *patterns))
    raise ValueError(f"{attack.name}: needs gradients, and {where} has none; these need none: {known}")


def title(name: str, result: Mapping[str, Any]) -> str:
    """Title in a table of an attack's result, as in `Result.as_dict`."""
    return find(name).title_of(result.get("parts") or ())


def add(
    name: str,
    function: AttackFunction,
    *,
    title: str | None = None,
    summary: str = "",
    source: str = "",
    least_classes: int = 2,
    threat_models: Iterable[str] = tuple(NORMS),
) -> None:
    """Let a name stand for a function of the user's: f(model, x, y) -> x_adv.

    x: BCHW in [0, 1]. The model is in eval mode, and its parameters need no gradient. By keyword f gets those of
    `KEYWORDS` that it names: epsilon, threat_model, seed, and sample, the images' indices in the data.
    summary: its numbers, for descriptions. least_classes, threat_models: for which it is defined.
    Raises ValueError for a name that is taken, or that no list of attacks could hold.
    """
    attack = by_function(name, function, title, summary, source, least_classes, tuple(threat_models))
    titles = {known.title for known in (ATTACKS | _added).values() if known.name != name}
    if attack.title in titles:
        raise ValueError(f"attack {name!r}: another has the title {attack.title!r}; give it another one")
    if name in _added and place_of(_added[name].function) != place_of(function):
        raise ValueError(f"attack: {name!r} is that of {place_of(_added[name].function)} already")
    _added[name] = attack


def by_function(
    name: str,
    function: AttackFunction,
    title: str | None = None,
    summary: str = "",
    source: str = "",
    least_classes: int = 2,
    threat_models: tuple[str, ...] = tuple(NORMS),
) -> ByFunction:
    """A row for a function of the user's. Raises ValueError, one line, where a fact of it is wrong."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.-]*", name):
        raise ValueError(f"attack: a name of letters, digits, '.', '-' and '_' is needed, got {name!r:.100}")
    if name in ATTACKS or PGD_NAME.fullmatch(name):
        raise ValueError(f"attack: {name!r} is a built-in attack; give yours another name")
    if not callable(function):
        raise ValueError(f"attack {name!r}: expected a function f(model, x, y), got {type(function).__name__}")
    if type(least_classes) is not int or least_classes < 1:
        raise ValueError(
            f"attack {name!r}: least_classes: expected a whole number from 1 on, got {least_classes!r}"
        )
    if not threat_models:
        raise ValueError(f"attack {name!r}: threat_models: none is given; known: {', '.join(NORMS)}")
    for threat_model in threat_models:
        check_known("threat_models", threat_model, NORMS)
    return ByFunction(
        name,
        name if title is None else title,
        source,
        least_classes,
        threat_models,
        function=function,
        summary=summary or place_of(function),
    )


def resolve(attacks: object) -> list[EvaluationAttack]:
    """The attacks of a list, each once.

    An item is a name, a row, a function f(model, x, y) -> x_adv by its own name, or a pair (name, f); a mapping of
    names to functions serves as a list. Raises ValueError for anything else, for an unknown name, and where
    something that an attack needs is not there.
    """
    items: Iterable[object] | None = None
    if isinstance(attacks, Mapping):
        items = attacks.items()
    elif isinstance(attacks, Iterable) and not isinstance(attacks, str | bytes):
        items = attacks
    if items is None:
        raise ValueError(f"attacks: expected a list of names such as 'pgd20', got {attacks!r:.100}")
    found: dict[str, EvaluationAttack] = {}
    for item in items:
        attack = _resolved(item)
        known = found.setdefault(attack.name, attack)
        if isinstance(attack, ByFunction) and getattr(known, "function", None) is not attack.function:
            raise ValueError(f"attacks: two functions are called {attack.name!r}: give pairs (name, function)")
    for attack in found.values():
        attack.check_installed()
    return list(found.values())


def _resolved(item: object) -> EvaluationAttack:
    if isinstance(item, EvaluationAttack):
        return item
    if isinstance(item, str):
        return find(item)
    match item:
        case (str(name), function) if callable(function):
            return by_function(name, function)
    if callable(item):
        return by_function(getattr(item, "__name__", type(item).__name__), item)
    raise ValueError(f"attacks: expected names such as 'pgd20', functions, or pairs of both, got {item!r:.100}")


def _transferred(name: str) -> Transferred:
    """The attack of transfer:CKPT or transfer:CKPT:ATTACK; a file may have a colon in its name."""
    given = name.removeprefix(TRANSFER)
    place, _, inner_name = given.rpartition(":")
    if not place or checkpoint_of(given).exists():
        place, inner_name = given, "pgd20"
    if not place:
        raise ValueError(f"attack: {name!r} names no checkpoint; expected {' or '.join(_TRANSFERS)}")
    inner = find(inner_name)
    if isinstance(inner, Transferred | NoAttack | WholeAutoAttack | FastAutoAttack | Packaged):
        raise ValueError(f"attack: {name!r}: {inner_name} crafts nothing that is transferred; take e.g. pgd20")
    return Transferred(
        name,
        f"{inner.title} from {place}",
        inner.source,
        inner.least_classes,
        inner.threat_models,
        path=checkpoint_of(place),
        inner=inner,
    )


_TRANSFERS = tuple(pattern for pattern in PATTERNS if pattern.startswith(TRANSFER))
