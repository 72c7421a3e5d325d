"""A table as HTML, as CSV and as LaTeX, from the same cells."""

from __future__ import annotations

import base64
import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO

# Text that a spreadsheet would take for a formula gets an apostrophe in front.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "\n": " ",
    "`": r"\textasciigrave{}", "'": r"\textquotesingle{}", "±": r"$\pm$", "–": "--",
}  # fmt: skip


@dataclass(frozen=True)
class Percent:
    """A share in [0, 1], shown in percent.

    low, high: its interval. deviation: sample standard deviation over as many seeds.
    """

    value: float
    low: float | None = None
    high: float | None = None
    deviation: float | None = None
    seeds: int = 1

    @property
    def text(self) -> str:
        """The share, and its spread over seeds."""
        spread = "" if self.deviation is None else f" ± {100 * self.deviation:.2f}"
        return f"{self.value:.2%}{spread}"

    @property
    def interval(self) -> str:
        """The interval in percent; empty where there is none."""
        return "" if self.low is None or self.high is None else f"{100 * self.low:.1f} to {100 * self.high:.1f}"


@dataclass(frozen=True)
class Number:
    """A number and the text by which a page shows it."""

    value: float
    text: str


@dataclass(frozen=True)
class Name:
    """The name of a line, and its path, if it has one, which a page shows below it."""

    text: str
    path: str = ""


Cell = str | int | float | None | Percent | Number | Name
Rows = Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class ReportTable:
    """A table of a report. name: of its files, without their endings. head: where it may break, a line break."""

    name: str
    head: Sequence[str]
    rows: Rows

    def html(self, rows: Rows | None = None, *, links: bool = True) -> str:
        """Table that scrolls in its own container, and a link to its CSV. rows: those to show, if not all."""
        kinds = [_class(*self._column(index)) for index in range(len(self.head))]
        heads = zip(self.head, kinds, strict=True)
        top = "".join(f'<th scope="col"{kind}>{_lines(name)}</th>' for name, kind in heads)
        lines = "".join(f"<tr>{''.join(map(_html, row))}</tr>" for row in (self.rows if rows is None else rows))
        table = f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"
        label = escape(self.name, quote=True)
        box = f'<div class="scroll" tabindex="0" role="region" aria-label="Table {label}">{table}</div>'
        return box + (self._link() if links else "")

    def csv(self) -> str:
        """Comma-separated values (RFC 4180): percentages as numbers, interval and spread in columns beside."""
        columns = [
            column
            for index, name in enumerate(self._heads())
            for column in _csv_columns(name, self._column(index))
        ]
        text = StringIO(newline="")
        writer = csv.writer(text, lineterminator="\r\n")
        writer.writerow(_no_formula(name) for name, _ in columns)
        writer.writerows(zip(*(cells for _, cells in columns), strict=True))
        return text.getvalue()

    def latex(self) -> str:
        r"""A tabular of booktabs; numbers are aligned to the right."""
        lines = [
            r"% needs \usepackage{booktabs}",
            rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in self._numbers())}}}",
            r"\toprule",
            f"{' & '.join(map(latex, self._heads()))} \\\\",
            r"\midrule",
            *(f"{' & '.join(map(latex, row))} \\\\" for row in self.texts()),
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return "\n".join(lines) + "\n"

    def texts(self) -> list[list[str]]:
        """Texts of the cells, without what a page shows below one."""
        return [[_text(cell) for cell in row] for row in self.rows]

    def _heads(self) -> list[str]:
        """Names of the columns, each of one line."""
        return [name.replace("\n", ", ") for name in self.head]

    def _numbers(self) -> list[bool]:
        """True for each column that holds a number."""
        return [any(map(_is_number, self._column(index))) for index in range(len(self.head))]

    def _column(self, index: int) -> list[Cell]:
        return [row[index] for row in self.rows]

    def _link(self) -> str:
        data = base64.b64encode(self.csv().encode()).decode()
        name = escape(self.name, quote=True)
        return (
            f'<p class="download"><a download="{name}.csv" href="data:text/csv;charset=utf-8;base64,{data}">'
            f"{name}.csv</a></p>"
        )


def latex(text: str) -> str:
    """Text that LaTeX sets as it is; two hyphens make no dash."""
    parts = re.split(r"(?<=[-–])(?=[-–])", text)
    return "{}".join("".join(_LATEX.get(letter, letter) for letter in part) for part in parts)


def number_of(text: str) -> Cell:
    """The number that a text is, else the text."""
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?\d+(\.\d*)?(e[+-]?\d+)?", text) else text


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, int | float | Percent | Number)


def _text(cell: Cell) -> str:
    if isinstance(cell, Percent | Number | Name):
        return cell.text
    if isinstance(cell, float):
        return f"{cell:.5g}"
    return "" if cell is None else str(cell)


def _html(cell: Cell) -> str:
    below = cell.interval if isinstance(cell, Percent) else cell.path if isinstance(cell, Name) else ""
    breakable = escape(below).replace("/", "/<wbr>")
    small = f'<br><small class="quiet">{breakable}</small>' if below else ""
    return f"<td{_class(cell)}>{escape(_text(cell))}{small}</td>"


def _class(*cells: Cell) -> str:
    """Class of a cell, or of the head above cells."""
    if any(isinstance(cell, Name) for cell in cells):
        return ' class="name"'
    return ' class="number"' if any(map(_is_number, cells)) else ""


def _lines(text: str) -> str:
    return "<br>".join(map(escape, text.split("\n")))


def _no_formula(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text


def _plain(cell: Cell) -> Cell:
    """A cell's content in a CSV."""
    if isinstance(cell, Percent):
        return round(100 * cell.value, 4)
    if isinstance(cell, Number):
        return cell.value
    if isinstance(cell, Name):
        return _no_formula(cell.text)
    return _no_formula(cell) if isinstance(cell, str) else cell


_EXTRAS: tuple[tuple[str, Callable[[Percent], Cell]], ...] = (
    ("95% low", lambda cell: None if cell.low is None else round(100 * cell.low, 4)),
    ("95% high", lambda cell: None if cell.high is None else round(100 * cell.high, 4)),
    ("std", lambda cell: None if cell.deviation is None else round(100 * cell.deviation, 4)),
    ("seeds", lambda cell: None if cell.deviation is None else cell.seeds),
)


def _csv_columns(name: str, cells: Sequence[Cell]) -> list[tuple[str, list[Cell]]]:
    """A column of a CSV, and those of intervals and spreads where a cell has one."""
    if any(isinstance(cell, Name) for cell in cells):
        paths: list[Cell] = [_no_formula(cell.path) if isinstance(cell, Name) else None for cell in cells]
        return [(name, [_plain(cell) for cell in cells]), *([("path", paths)] if any(paths) else [])]
    if not any(isinstance(cell, Percent) for cell in cells):
        return [(name, [_plain(cell) for cell in cells])]
    found = [(f"{name} (%)", [_plain(cell) for cell in cells])]
    for extra, value in _EXTRAS:
        values = [value(cell) if isinstance(cell, Percent) else None for cell in cells]
        if any(each is not None for each in values):
            found.append((f"{name}, {extra}", values))
    return found
