"""Text, commands and tables at any width: no word is broken or lost, and no line longer than it must be."""

from __future__ import annotations

import io
import shlex
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from engine.common.wrapping import columns, fitted, wrapped, wrapped_command

WORDS = st.lists(st.text("abcxyz0159/.%-é漢", min_size=1, max_size=30), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(WORDS, st.integers(10, 120), st.integers(0, 30))
def test_every_word_stays_whole_and_in_its_place(words: list[str], width: int, indent: int) -> None:
    lines = wrapped(" " * indent + " ".join(words), width)
    assert [word for line in lines for word in line.split(" ") if word] == words
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        assert cell_len(line) <= width or len(line.split()) == 1
        # As full as can be: the next word had no room.
        assert not after or cell_len(f"{line} {after.split()[0]}") > width


def test_lines_that_go_on_are_indented_and_columns_of_spaces_stay() -> None:
    assert wrapped("  natural   10 %   of 1,000 images", 20) == ["  natural   10 %", "    of 1,000 images"]
    assert wrapped("one two\n\nthree", 5) == ["one", " two", "", "three"]
    assert wrapped("", 5) == [""]


@pytest.mark.parametrize("width", [None, 24, 40, 200])
def test_a_command_is_what_a_shell_takes(width: int | None) -> None:
    words = ["printf", "%s\n", "a b", "it's", "$HOME", "--attacks", "natural,pgd20", "", "x" * 50, "~/é"]
    text = "\n".join(wrapped_command(words, width))
    shown = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True).stdout
    assert shown.split("\n")[:-1] == words[2:]
    assert shlex.split(text.replace("\\\n", " ")) == words
    if width is not None:
        assert all(len(line) <= width or "x" * 50 in line for line in text.split("\n"))


def table() -> Table:
    found = Table("", Column(Text("Natural\nn = 1,000")), "AA\nn = 1,000", "what it is", box=box.SIMPLE)
    found.add_row(
        "best (epoch 12, selected on validation)", "84.13%", "43.20%*", "L-inf, epsilon 8/255, cross-entropy"
    )
    found.add_row(Text("last (epoch 200)"), "", "41.07%", "none")
    return found


def shown(width: int) -> list[str]:
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=True, color_system=None)
    found = fitted(table(), console)
    if isinstance(found, list):
        return found
    console.print(found)
    return text.getvalue().split("\n")


@pytest.mark.parametrize("width", [20, 40, 58, 80, 100, 120, 200])
def test_a_table_keeps_all_its_words_at_every_width(width: int) -> None:
    lines = shown(width)
    assert max(map(cell_len, lines)) <= width
    words = " ".join(lines).split()
    for word in ("84.13%", "43.20%*", "41.07%", "8/255,", "cross-entropy", "(epoch", "validation)", "selected"):
        assert word in words


def test_a_wide_terminal_has_a_table_and_a_narrow_one_lines() -> None:
    assert any("84.13%" in line and "43.20%*" in line for line in shown(80))
    assert any(line.count("n = 1,000") == 2 and "what it is" in line for line in shown(200))
    assert "  AA n = 1,000: 43.20%*" in shown(40)
    assert "  Natural n = 1,000: " not in "\n".join(shown(40)[-4:])  # an empty cell is no line


def test_a_table_of_names_and_values_has_a_line_for_each() -> None:
    found = Table("path/best.pt", "checkpoint")
    found.add_row("sha256", "0" * 64)
    assert fitted(found, Console(width=40)) == ["path/best.pt: checkpoint", "sha256:", "  " + "0" * 64]


def test_the_width_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "37")
    assert columns() == 37
    monkeypatch.setenv("COLUMNS", "wide")
    assert columns() > 0
