"""YAML as users write it: YAML 1.2's values, in bounded time, and a line for everything else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.common import yaml_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("-7", -7),
        ("0o10", 8),
        ("0x1F", 31),
        ("1e-3", 0.001),
        ("1.5e+3", 1500.0),
        (".5", 0.5),
        (".inf", math.inf),
        ("1:30", "1:30"),
        ("2026-11-28", "2026-11-28"),
        ("1_000", "1_000"),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("~", None),
        ("", None),
        ("=", "="),
        ("!!str 3", "3"),
        ("'010'", "010"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("\ufeffa: 1", {"a": 1}),
        ("8/255", "8/255"),
    ],
)
def test_values_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = yaml_text.read(text)
    assert (found, type(found)) == (value, type(value))


BOMB = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, r"line 2: the alias \*a is not read"),
        ("a: 1\nb: &b [*b]", r"line 2: the alias \*b"),
        ("lr: 1\nattack:\n  bn: eval\n  bn: train\n", "line 4: the key 'bn' is there twice"),
        ("a: 1\n1: 2", "line 2: a key must be text"),
        ("true: 2", "line 1: a key must be text"),
        ("? [a]\n: b", "line 1: a key must be text"),
        ("[" * 3000, "line 1: more than 20 levels"),
        ("- " * 3000, "line 1: more than 20 levels"),
        ("{a: " * 3000, "line 1: more than 20 levels"),
        ("? " * 3000, "line 1: more than 20 levels"),
        ("lr: " + "1" * 5000, "line 1: an integer of 5,000 digits"),
        ("lr: 0x" + "f" * 5000, "line 1: an integer of 5,002 digits"),
        ("a: 1\nb: \0", r"line 2: the character '\\x00' is not allowed"),
        ("a: \ud800", r"line 1: the character '\\ud800' is not allowed"),
        ('a: "\\UFFFFFFFF"', "a character that does not exist"),
        ("a: 1\n\tb: 2", "line 2: "),
        ("a: 1\n---\nb: 2", "line 2: .*another document"),
        ("!!python/object/apply:os.getcwd []", "line 1: the tag"),
        ("!!binary aGk=", "line 1: 'aGk=' is no value of the tag !!binary"),
        ("!!int abc", "line 1: 'abc' is no value of the tag !!int"),
        ("!mine 3", "line 1: the tag '!mine' is not read"),
        ("x" * 70_000, "70,000 characters, and 65,536 are the most"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=rf"\A[^\n]*{says}[^\n]*\Z"):
        yaml_text.read(text)


TEXTS = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(
    (
        "010",
        "1:30",
        "1e3",
        "1e-3",
        "0o7",
        "0x1",
        "on",
        "null",
        "~",
        "1_0",
        ".inf",
        "2026-11-28",
        "=",
        "<<",
        "-",
        "1.",
    )
)
SCALARS = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_what_is_written_is_read_back_here_and_by_readers_of_yaml_1_1(value: Any) -> None:
    text = yaml_text.write(value)
    assert yaml_text.read(text) == value
    assert yaml.safe_load(text) == value


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab:-?[]{},&*!|>'\"%@` \n\t#~01.e\\Uxo=<\0\ufeff\ud800"), max_size=40))
def test_any_text_is_a_value_or_one_line(text: str) -> None:
    lines = ["a value"]
    try:
        yaml_text.read(text)
    except ValueError as error:  # nothing else is raised
        lines = str(error).splitlines()
    assert len(lines) == 1


@pytest.mark.parametrize(
    "text", ["[" + "1," * 30_000 + "]", "a: |\n" + " x\n" * 20_000, "\n" * 60_000, "'" * 60_000]
)
def test_the_largest_texts_cost_their_length(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in characters that PyYAML's reader steps over, in place of seconds."""
    steps = 0
    forward = yaml.reader.Reader.forward

    def counted(self: Any, length: int = 1) -> None:
        nonlocal steps
        steps += length
        forward(self, length)

    monkeypatch.setattr(yaml.reader.Reader, "forward", counted)
    yaml_text.read(text)
    assert steps <= 2 * len(text)
