"""Names that a user or a configuration gives, and the tables that know them. Imports nothing of engine."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping, Sequence

Entry = typing.TypeVar("Entry")

OBJECT = "python:"
"""Begin of the names in a configuration that stand for objects of a Python program."""
IMPORT_HINT = "one of your own needs --import FILE"


def nearest(name: object, known: Iterable[object]) -> str:
    """Tail of an error message: the nearest known name if one is near, and all known names."""
    names = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


def check_known(argument: str, name: object, known: Iterable[object]) -> None:
    """Raise ValueError, one line, for a name that is not among those known."""
    known = tuple(known)
    if name not in known:
        raise ValueError(f"{argument}: {name!r} is not known; {nearest(name, known)}")


def check_registered(argument: str, name: object, known: Iterable[object], imports: Sequence[str] = ()) -> None:
    """`check_known` for names that users may add. imports: what was imported where the name comes from."""
    known = tuple(known)
    if name in known:
        return
    if str(name).startswith(OBJECT):
        raise ValueError(
            f"{argument}: {name!r} stands for an object that was given to engine.train; in Python, "
            f"engine.resume(PATH, {argument}=...) goes on with the same one"
        )
    hint = f"it was made with --import {' --import '.join(imports)}" if imports else IMPORT_HINT
    raise ValueError(f"{argument}: {name!r} is not known; {nearest(name, known)}; {hint}")


def look_up(argument: str, name: typing.Any, table: Mapping[typing.Any, Entry]) -> Entry:
    """The table's entry of that name. Raises ValueError, one line, where it has none."""
    check_known(argument, name, table)
    return table[name]


def is_on(argument: str, switch: str, *, auto: bool | None = None) -> bool:
    """True for "on", False for "off", `auto` for "auto" where it is given. Raises ValueError for anything else."""
    return look_up(argument, switch, {"on": True, "off": False} | ({} if auto is None else {"auto": auto}))
