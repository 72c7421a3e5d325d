"""Configuration of a resumed run: keys that may differ from those it began with, and what more epochs mean.

A run with more epochs is from there on the run of the longer configuration: what is given as a part of the run
(`FRACTIONS`), and a cosine or one-cycle schedule, is one of all its epochs, while the epochs that are trained stay
as they are. Its teachers stay what they are, and an average of weights that has begun goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine import config
from engine.config import RunConfig, epochs_of
from engine.training.weights import averaging

FRACTIONS = (
    "loss.warmup",
    "attack.epsilon_warmup",
    "attack.steps_warmup",
    "optim.lr_warmup",
    "optim.milestones",
    "averaging.start",
    "awp.start",
)
"""Keys whose values below 1 are fractions of the epochs."""

_MAY: dict[str, Callable[[Any, Any], bool]] = {
    "fixed": lambda before, after: False,
    "free": lambda before, after: True,
    "place": lambda before, after: True,  # the hashes of the content are compared where it is read
    "longer": lambda before, after: bool(after > before),
}


def changed(begun: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The configuration of a run with some keys given anew: no other key moves with them, whatever its default.

    Raises ValueError for what is no configuration.
    """
    return config.with_absolute_paths(config.checked(config.merge(begun.tree(), changes)))


def carried_on(begun: RunConfig, wanted: RunConfig, epochs_begun: int = 0) -> RunConfig:
    """The configuration that a run goes on with, which says of a longer run what stays as it is.

    begun: what it was trained with so far, in so many epochs, the current one included.
    Raises ValueError with both values of each key that may not change.
    """
    if wanted.epochs > begun.epochs:
        kept, before = config.flat(_kept(begun, epochs_begun)), config.flat(begun.tree())
        after = config.flat(wanted.tree())
        stays = [config.nested(name, value) for name, value in kept.items() if after[name] == before[name]]
        begun, wanted = (
            changed(begun, config.merge(*(config.nested(name, value) for name, value in kept.items()))),
            changed(wanted, config.merge(*stays)),
        )
    pairs = config.differences(begun, wanted)
    refused = {name: pair for name, pair in pairs.items() if not _MAY[config.KEYS[name].resume](*pair)}
    if refused:
        said = (f"{name} was {before!r} and would be {after!r}" for name, (before, after) in refused.items())
        raise ValueError(f"--resume: {'; '.join(said)}; a run that has begun may change {_what_may_change()}")
    return wanted


def describe(begun: RunConfig, longer: RunConfig) -> str:
    """One line: what a longer run changes."""
    moved = []
    for name in FRACTIONS:
        before, after = (_epochs(each, name) for each in (begun, longer))
        if before != after:
            moved.append(f"{name} at epoch {', '.join(map(str, after))} (was {', '.join(map(str, before))})")
    if longer.optim.schedule != "milestones":
        moved.append(f"optim.schedule {longer.optim.schedule} over {longer.epochs}")
    return (
        f"Extended from {begun.epochs} to {longer.epochs} epochs; from here on a part of the run is one of "
        f"{longer.epochs} epochs: {'; '.join(moved) or 'none changes'}"
    )


def _kept(begun: RunConfig, epochs_begun: int) -> config.Tree:
    """Keys by which a longer run says what stays as it is."""
    trained = {
        section: {"epochs": begun.epochs}
        for section in ("teacher", "teacher_st")
        if getattr(begun, section).checkpoint is None and getattr(begun, section).epochs is None
    }
    start = averaging.first_epoch(begun)
    return trained | ({} if start is None or epochs_begun <= start else {"averaging": {"start": start}})


def _epochs(of: RunConfig, name: str) -> list[int]:
    """Epochs at which a part of the run ends or begins; none where the key has no value or no use."""
    if name == "averaging.start":
        start = averaging.first_epoch(of)
        return [] if start is None else [start]
    if name == "optim.milestones" and of.optim.schedule != "milestones":
        return []
    value = config.flat(of.tree())[name]
    return [epochs_of(part, of.epochs) for part in (value if isinstance(value, list) else [value])]


def _what_may_change() -> str:
    by = {how: [name for name, key in config.KEYS.items() if key.resume == how and name != "out"] for how in _MAY}
    return (
        f"{', '.join(by['longer'])} (to more), {', '.join(by['place'])} (to the same content elsewhere), "
        f"and {', '.join(by['free'])}"
    )
