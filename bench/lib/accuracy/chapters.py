"""A chapter of a protocol's page, and all of them as HTML, as Markdown and as lines of a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from engine.common.pictures import DARK, LIGHT, Palette, png, style
from engine.runs.reporting import page
from engine.runs.reporting.tables import Number, Percent, ReportTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_drawn: dict[tuple[str, Palette], tuple[str, bytes]] = {}


@dataclass(frozen=True)
class Picture:
    """A picture. name: of its file, without the ending. draw: makes the figure of data, inside `style`.

    alt: what is seen on it. data: all that decides it, by which one that was drawn before is known.
    """

    name: str
    draw: Callable[..., Figure]
    data: tuple[Any, ...]
    alt: str
    caption: str = ""

    def png(self, palette: Palette = LIGHT) -> bytes:
        """The file's content."""
        key, of = (self.name, palette), repr((self.draw.__qualname__, self.data))
        if _drawn.get(key, ("",))[0] != of:
            with style(palette):
                _drawn[key] = of, page.small(png(self.draw(*self.data)))
        return _drawn[key][1]


@dataclass(frozen=True)
class Folded:
    """Text as it is, which a page shows when it is asked for."""

    summary: str
    text: str


@dataclass(frozen=True)
class Heading:
    """A heading inside a chapter."""

    text: str


@dataclass(frozen=True)
class Items:
    """Sentences, each a line of a list."""

    sentences: Sequence[str]


Part = str | Heading | Items | ReportTable | Picture | Folded
"""A part of a chapter; a text is a paragraph."""


@dataclass
class Chapter:
    """A chapter of the page."""

    title: str
    parts: list[Part] = field(default_factory=list)

    def add(self, *parts: Part) -> None:
        """Append parts."""
        self.parts += parts

    @property
    def pictures(self) -> list[Picture]:
        """All of them, in their order."""
        return [part for part in self.parts if isinstance(part, Picture)]


# ---------------------------------------------------------------- HTML


def html(title: str, headline: Sequence[str], chapters: Sequence[Chapter]) -> str:
    """The whole page, which needs nothing beside it."""
    return page.document(headline, [_section(chapter) for chapter in chapters], title)


def _section(chapter: Chapter) -> page.PageSection:
    section = page.PageSection(chapter.title)
    pictures: list[str] = []
    for part in chapter.parts:
        if isinstance(part, Picture):
            pictures.append(page.drawn(page.Drawn(part.png(), part.png(DARK), part.alt), part.caption))
            continue
        section.add(page.grid(pictures))
        pictures = []
        if isinstance(part, ReportTable):
            section.add_table(part)
        else:
            section.add(_html(part))
    section.add(page.grid(pictures))
    return section


def _html(part: str | Heading | Items | Folded) -> str:
    if isinstance(part, Heading):
        return page.h3(part.text)
    if isinstance(part, Items):
        return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in part.sentences)}</ul>"
    if isinstance(part, Folded):
        return page.details(part.summary, f'<pre class="scroll">{escape(part.text)}</pre>')
    return f"<p>{escape(part)}</p>"


# ---------------------------------------------------------------- Markdown


def markdown(title: str, headline: Sequence[str], chapters: Sequence[Chapter]) -> str:
    """The same for a forge; pictures are files beside it."""
    parts = [f"# {_plain(title)}", *map(_plain, headline)]
    for chapter in chapters:
        parts += [f"## {_plain(chapter.title)}", *map(_markdown, chapter.parts)]
    return "\n\n".join(parts) + "\n"


def _markdown(part: Part) -> str:
    if isinstance(part, Heading):
        return f"### {_plain(part.text)}"
    if isinstance(part, Items):
        return "\n".join(f"- {_plain(sentence)}" for sentence in part.sentences)
    if isinstance(part, ReportTable):
        return _markdown_table(part)
    if isinstance(part, Picture):
        below = f"\n\n{_plain(part.caption)}" if part.caption else ""
        return f"![{_plain(part.alt)}]({part.name}.png){below}"
    if isinstance(part, Folded):
        longest = max(map(len, re.findall("`+", part.text)), default=0)
        fence = "`" * max(3, longest + 1)
        summary = f"<details><summary>{escape(part.summary)}</summary>"
        return f"{summary}\n\n{fence}\n{part.text.rstrip()}\n{fence}\n\n</details>"
    return _plain(part)


def _markdown_table(table: ReportTable) -> str:
    rule = ["---:" if right else "---" for right in _numbers(table)]
    rows = [[head.replace("\n", ", ") for head in table.head], *table.texts()]
    head, *others = ("| " + " | ".join(map(_plain, row)) + " |" for row in rows)
    return "\n".join([head, f"| {' | '.join(rule)} |", *others])


def _plain(text: str) -> str:
    """Text of which Markdown and HTML take nothing for their own."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", escape(text, quote=False))


# ---------------------------------------------------------------- terminal


def show(console: Console, chapters: Sequence[Chapter]) -> None:
    """Print the tables of the chapters, each under its chapter's title and its own heading."""
    for chapter in chapters:
        heading = chapter.title
        for part in chapter.parts:
            if isinstance(part, Heading):
                heading = f"{chapter.title}: {part.text}"
            elif isinstance(part, ReportTable):
                console.print(_terminal(part, heading))


def _terminal(table: ReportTable, title: str) -> Table:
    result = Table(title=escape_markup(title), title_justify="left", box=box.SIMPLE)
    for number, (head, right) in enumerate(zip(table.head, _numbers(table), strict=True)):
        result.add_column(escape_markup(head), justify="right" if right else "left", no_wrap=not number)
    for row in table.texts():
        result.add_row(*map(escape_markup, row))
    return result


def _numbers(table: ReportTable) -> list[bool]:
    """True for each column that holds a number."""
    kinds = int | float | Number | Percent
    return [any(isinstance(row[index], kinds) for row in table.rows) for index in range(len(table.head))]
