"""The options of `engine train` that are keys of the configuration, made from the facts of each key."""

from __future__ import annotations

import functools
import re
from typing import Any, Literal

import click

from engine.commands.completion import KNOWN_NAMES, WITHOUT_TORCH, Completed, list_of, values_of
from engine.commands.options import GroupedOption
from engine.config import DEFAULTS, KEYS, Key, RunConfig, flat, semantics


@functools.cache
def key_options() -> tuple[click.Option, ...]:
    """The options of the keys that have a flag. The parameter's name is the key's."""
    return tuple(_key_option(name, key) for name, key in KEYS.items() if key.flag is not None)


def _key_option(name: str, key: Key) -> click.Option:
    settings: dict[str, Any] = {"is_flag": True} if bool in key.kinds else _type(key)
    option = GroupedOption([key.flag], group=key.group or "other", default=None, help=_help(name), **settings)
    option.name = name  # click takes no dot from a declaration
    return option


def _type(key: Key) -> dict[str, Any]:
    if key.values is not None and tuple in key.kinds:
        return {"type": list_of(key.values), "metavar": "NAME,..."}
    if key.values is not None:
        path: dict[str, Literal["file", "dir"]] = {
            "file": "file",
            "path": "file",
            "dir": "dir",
        }
        kind = Completed(lambda incomplete: values_of(key), path=path.get(key.values))
        return {"type": kind, "metavar": key.values.upper()}
    if key.choices:
        words = [*("N" for kind in key.kinds if kind is int), *values_of(key)]
        return {
            "type": Completed(lambda incomplete: values_of(key)),
            "metavar": f"[{'|'.join(words)}]",
        }
    if tuple in key.kinds:
        return {"type": click.STRING, "metavar": "NAME,..."}
    if int in key.kinds:
        return {"type": click.INT, "metavar": "N"}
    return {"type": click.STRING, "metavar": "NUMBER"}


def _help(name: str) -> str:
    """The text of a key without its Markdown, and its default in brackets."""
    key = KEYS[name]
    names = (
        ", ".join(KNOWN_NAMES[key.values]()) if key.values in WITHOUT_TORCH else f"engine {key.values}s lists them"
    )
    text = _plain(key.text.replace("{names}", names))
    if not key.text.startswith("`"):
        text = text[0].upper() + text[1:]
    return f"{text}. [{_plain(_default(name))}]"


def _plain(markdown: str) -> str:
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown).replace("`", "")


def _default(name: str) -> str:
    value = DEFAULTS[name]
    if name in _of_the_method():
        return "by the method"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value == []:
        return "none"
    return KEYS[name].null if value is None else str(value)


@functools.cache
def _of_the_method() -> frozenset[str]:
    default = RunConfig()
    return frozenset(flat(semantics.defaults(default.method, default.semantics, default.epochs)))
