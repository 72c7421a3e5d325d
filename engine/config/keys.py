"""The facts of a configuration's key: its text, its flag, and what it means to other runs."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel

Group = Literal["essentials", "data", "method", "speed", "many processes", "output"]
GROUPS: tuple[Group, ...] = typing.get_args(Group)
"""Groups of the flags in `engine train --help`, in order."""

Values = Literal[
    "method",
    "teacher method",
    "model",
    "dataset",
    "normalisation",
    "attack",
    "attack loss",
    "device",
    "logger",
    "file",
    "dir",
    "path",
]
"""Values of a key that a table or the file system knows, and the key's annotation does not."""


@dataclass(frozen=True)
class Key:
    """Facts of a key, written beside its type.

    text: its meaning, in Markdown with links relative to docs/: of the table in docs/configuration.md, and without
    the Markdown of `engine train --help`. {names} stands for the names in the table of its `values`, {teacher} for
    the teacher that the key is of.
    null: the meaning of None, where None is its default.
    flag: its option as click declares it, or None where only --set and files reach it; {section} stands for the
    name of its section. group: of that flag in the help.
    values: see `Values`.
    teacher: a teacher that is trained on the way takes it over from its student.
    decides: with another value it is another network: a part of a trained teacher's place in the cache.
    resume: how it may differ when a run goes on: "fixed", not at all; "free"; "place", another path to the same
    content; "longer", a larger number.
    later: the key is younger than the first teachers in caches: a part of their place only where it is not the
    default.
    kinds, choices: from its annotation, the types and the words that it admits.
    Raises ValueError where the text is missing, or one of flag and group.
    """

    text: str
    _: KW_ONLY
    null: str = ""
    flag: str | None = None
    group: Group | None = None
    values: Values | None = None
    teacher: bool = False
    decides: bool = False
    later: bool = False
    resume: Literal["fixed", "free", "place", "longer"] = "fixed"
    kinds: tuple[type, ...] = ()
    choices: tuple[object, ...] = ()

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("a key needs a text")
        if (self.flag is None) != (self.group is None):
            raise ValueError(f"a flag needs a group of the help, and a group a flag: {self.flag}, {self.group}")


own = partial(Key, decides=True)
"""A key of a run and its method alone."""
shared = partial(Key, teacher=True, decides=True)
"""A key of students and teachers alike."""
runtime = partial(Key, teacher=True, resume="free")
"""A key that decides where, how fast and how visibly a network is trained, and not which."""


def collect(section: type[BaseModel], prefix: str = "", teacher: str = "") -> Iterator[tuple[str, Key]]:
    """Names and facts of all keys of a section and of the sections in it, as "attack.bn".

    Raises ValueError for a key without its facts.
    """
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from collect(field.annotation, f"{prefix}{name}.", field.title or "")
            continue
        facts = [fact for fact in field.metadata if isinstance(fact, Key)]
        if len(facts) != 1:
            raise ValueError(f"{section.__name__}.{name}: annotate it with one Key")
        (key,) = facts
        kinds, choices = _alternatives(field.annotation)
        if type(None) in kinds and not key.null:
            raise ValueError(f"{section.__name__}.{name}: say in its Key what null means")
        yield (
            prefix + name,
            replace(
                key,
                text=key.text.replace("{teacher}", teacher),
                flag=key.flag and key.flag.replace("{section}", prefix.rstrip(".").replace("_", "-")),
                kinds=kinds,
                choices=choices,
            ),
        )


def _alternatives(annotation: Any) -> tuple[tuple[type, ...], tuple[object, ...]]:
    """Types and literal values that an annotation admits."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _alternatives(arguments[0])
    if origin is Literal:
        return (), arguments
    if origin in (typing.Union, types.UnionType):
        parts = [_alternatives(argument) for argument in arguments]
        return tuple(kind for kinds, _ in parts for kind in kinds), tuple(
            word for _, words in parts for word in words
        )
    return (origin or annotation,), ()
