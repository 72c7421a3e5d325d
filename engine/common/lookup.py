"""Names that a user or a configuration gives, and the tables that know them. Imports nothing of engine."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping

Entry = typing.TypeVar("Entry")


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


def look_up(argument: str, name: typing.Any, table: Mapping[typing.Any, Entry]) -> Entry:
    """The table's entry of that name. Raises ValueError, one line, where it has none."""
    check_known(argument, name, table)
    return table[name]


def is_on(argument: str, switch: str, *, auto: bool | None = None) -> bool:
    """True for "on", False for "off", `auto` for "auto" where it is given. Raises ValueError for anything else."""
    return look_up(argument, switch, {"on": True, "off": False} | ({} if auto is None else {"auto": auto}))
