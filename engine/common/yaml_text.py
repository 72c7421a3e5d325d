"""YAML as users write it, read in bounded time: values as YAML 1.2 has them, no aliases, no key twice.

PyYAML alone reads YAML 1.1, where 010 is 8, 1:30 is 90, 1e-3 is text, and the last of two equal keys wins.
Imports nothing of engine.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode
from yaml.events import AliasEvent

MOST_BYTES = 1 << 16
"""Limit of a file: a configuration with every key has 3 kB, and PyYAML reads some 100 kB a second."""

_MOST_DEPTH = 20
_MOST_DIGITS = 30
_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_NULL = re.compile("|~|null|Null|NULL")
_TRUE, _FALSE = re.compile("true|True|TRUE"), re.compile("false|False|FALSE")


def read(text: str) -> Any:
    """The value of a YAML document: dict, list, str, int, float, bool or None.

    Raises ValueError, one line with the line's number, for what is no YAML, an alias, a key that is no text or is
    there twice, a tag of Python's or others, more than 20 levels, and more than 65,536 characters.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"{len(text):,} characters, and {MOST_BYTES:,} are the most")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _value(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}{', '.join(filter(None, (error.context, error.problem)))}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: the character {chr(error.character)!r} is not allowed") from None
    except (ValueError, OverflowError) as error:  # of an escape like \\UFFFFFFFF
        raise ValueError(f"a character that does not exist ({error})") from None


def write(value: Any) -> str:
    """YAML that `read` and readers of YAML 1.1 read as this value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Quotes text that is something else in YAML 1.1 or 1.2."""


class _Loader(yaml.SafeLoader):
    """Composes nodes only; `_value` makes values of them."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  # PyYAML's way
    _depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if self.check_event(AliasEvent):
            raise _fault(f"the alias *{event.anchor} is not read; write its value out", event)
        if self._depth == _MOST_DEPTH:
            raise _fault(f"more than {_MOST_DEPTH} levels", event)
        self._depth += 1
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


for _kind, _pattern, _first in (
    ("null", _NULL, ["", "~", "n", "N"]),
    ("bool", re.compile(f"{_TRUE.pattern}|{_FALSE.pattern}"), list("tTfF")),
    ("int", _INTEGER, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _kind, re.compile(f"(?:{_pattern.pattern})\\Z"), _first)


def _value(node: Node) -> Any:
    if isinstance(node, MappingNode) and node.tag == f"{_TAG}map":
        return _mapping(node)
    if isinstance(node, SequenceNode) and node.tag == f"{_TAG}seq":
        return [_value(each) for each in node.value]
    if isinstance(node, ScalarNode) and node.tag.startswith(_TAG):
        return _scalar(node)
    raise _fault(f"the tag {node.tag!r} is not read", node)


def _mapping(node: MappingNode) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = _value(key_node)
        if not isinstance(key, str):
            raise _fault(f"a key must be text, as in `key: value`, and this one is {_shown(key)}", key_node)
        if key in found:
            raise _fault(f"the key {key!r} is there twice", key_node)
        found[key] = _value(value_node)
    return found


def _scalar(node: ScalarNode) -> str | int | float | bool | None:
    kind, text = node.tag.removeprefix(_TAG), node.value
    if kind == "str":
        # JSON writes a character beyond U+FFFF as a pair of escapes.
        return str(text).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    if kind == "int" and _INTEGER.fullmatch(text):
        if len(text) > _MOST_DIGITS:
            raise _fault(f"an integer of {len(text):,} digits", node)
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    if kind == "float" and _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if kind == "bool" and (_TRUE.fullmatch(text) or _FALSE.fullmatch(text)):
        return _TRUE.fullmatch(text) is not None
    if kind == "null" and _NULL.fullmatch(text):
        return None
    raise _fault(f"{_shown(text)} is no value of the tag !!{kind}", node)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fault(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)
