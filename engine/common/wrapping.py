"""Text, commands and tables for a terminal of any width: broken between words, and never inside one."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_HANG = 2
_GOES_ON = " \\"


def columns() -> int:
    """Cells of a line of the terminal, as $COLUMNS or the terminal itself tells; 80 where neither does."""
    if (given := os.environ.get("COLUMNS", "")).isdecimal() and int(given):
        return int(given)
    for stream in (1, 2, 0):
        with contextlib.suppress(OSError):
            return os.get_terminal_size(stream).columns or 80
    return 80


def wrapped(text: str, width: int, hang: int = _HANG) -> list[str]:
    """Lines of at most `width` cells; a longer word, a path say, has a line of its own.

    hang: further indentation of the lines that go on.
    """
    return [line for paragraph in text.split("\n") for line in _filled(paragraph, width, hang)]


def _filled(paragraph: str, width: int, hang: int) -> Iterator[str]:
    words = re.findall(r" *[^ ]+", paragraph)
    line = ""
    indent = 0
    for word in words:
        if not line:
            indent = min(len(word) - len(word.lstrip(" ")), width // 3)
            line = " " * indent + word.lstrip(" ")
        elif cell_len(line + word) <= width:
            line += word
        else:
            yield line
            line = " " * min(indent + hang, width // 3) + word.lstrip(" ")
    yield line


def wrapped_command(words: Sequence[str], width: int | None) -> list[str]:
    r"""A command as a shell takes it, its words quoted, over lines that end in \.

    width: of a line, in cells; None: all of it is one line.
    """
    quoted = [shlex.quote(word) for word in words]
    if width is None:
        return [" " * _HANG + " ".join(quoted)]
    lines = [" " * _HANG + quoted[0]]
    for word in quoted[1:]:
        longer = f"{lines[-1]} {word}"
        if cell_len(longer) + len(_GOES_ON) <= width:
            lines[-1] = longer
        else:
            lines.append(" " * 2 * _HANG + word)
    return [line + _GOES_ON for line in lines[:-1]] + lines[-1:]


def fitted(table: Table, console: Console) -> Table | list[str]:
    """The table with widths of columns at which no word breaks; where there are none, its rows as lines."""
    cells = [[_plain(cell) for cell in (column.header, *column.cells)] for column in table.columns]
    longest_lines = [_most(column, "\n") for column in cells]
    longest_words = [_most(column, None) for column in cells]
    unlimited = console.options.update(width=1_000_000)
    room = console.width - (console.measure(table, options=unlimited).maximum - sum(longest_lines))
    if sum(longest_words) > room:
        return [line for record in _records(table, cells) for line in wrapped(record, console.width)]
    spare, widths = room - sum(longest_words), dict(enumerate(longest_words))
    lacking = {place: longest_lines[place] - least for place, least in widths.items()}
    for place in sorted(lacking, key=lacking.__getitem__):  # columns of numbers before those of sentences
        more = min(spare, lacking[place])
        widths[place] += more
        spare -= more
    for column, width in zip(table.columns, widths.values(), strict=True):
        column.width = width
    return table


def _records(table: Table, cells: Sequence[Sequence[str]]) -> Iterator[str]:
    """Each row as a line of its first cell, and one for each of the others that is not empty."""
    heads, *rows = zip(*cells, strict=True)
    if table.title:
        yield _plain(table.title)
    if len(heads) == 2:  # a name and its value
        yield from (_labelled(name, value) for name, value in (heads, *rows))
        return
    for first, *others in rows:
        yield _labelled(heads[0], first)
        yield from ("  " + _labelled(head, cell) for head, cell in zip(heads[1:], others, strict=True) if cell)


def _plain(cell: object) -> str:
    return str(getattr(cell, "plain", cell))  # of a Text, which str gives, too, but for its marks


def _labelled(name: str, value: str) -> str:
    """Both in one line, what is empty left out."""
    return ": ".join(" ".join(each.split()) for each in (name, value) if each)


def _most(cells: Sequence[str], separator: str | None) -> int:
    return max((cell_len(part) for cell in cells for part in cell.split(separator)), default=0)
