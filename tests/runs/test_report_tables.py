"""Tables of a report: a CSV that readers and spreadsheets take as it is, and LaTeX that says what was said."""

from __future__ import annotations

import csv
import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.runs.reporting.tables import Name, Number, Percent, ReportTable, latex

FORMULA = "=+-@\t\r"
SPECIAL = {
    r"\textbackslash{}": "\\", r"\{": "{", r"\}": "}", r"\$": "$", r"\&": "&", r"\#": "#", r"\_": "_", r"\%": "%",
    r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textless{}": "<", r"\textgreater{}": ">",
    r"\textbar{}": "|", r"\textquotedbl{}": '"', r"$\pm$": "±", "--": "–",
    r"\textasciigrave{}": "`", r"\textquotesingle{}": "'", "{}": "",
}  # fmt: skip
TABLE = ReportTable(
    "t",
    ("run", "PGD-20\nn = 200", "seconds", "note"),
    [
        [Name("iad1, x", "runs/a"), Percent(0.5, 0.43123, 0.56877), Number(61.5, "1 min"), 'says "a, b"'],
        [Name("ard & co", "=runs/b"), Percent(0.25, deviation=0.01234, seeds=3), None, "=1+1"],
        [Name("at", "runs/c"), "in 1 of 3 seeds", Number(2.0, "2 s"), "100% #1_{x}"],
    ],
)


def test_a_csv_has_numbers_and_their_spread_in_columns_of_their_own() -> None:
    head, *rows = csv.reader(io.StringIO(TABLE.csv(), newline=""), strict=True)
    assert head == [
        "run", "path", "PGD-20, n = 200 (%)", "PGD-20, n = 200, 95% low", "PGD-20, n = 200, 95% high",
        "PGD-20, n = 200, std", "PGD-20, n = 200, seeds", "seconds", "note",
    ]  # fmt: skip
    assert rows == [
        ["iad1, x", "runs/a", "50.0", "43.123", "56.877", "", "", "61.5", 'says "a, b"'],
        ["ard & co", "'=runs/b", "25.0", "", "", "1.234", "3", "", "'=1+1"],
        ["at", "runs/c", "in 1 of 3 seeds", "", "", "", "", "2.0", "100% #1_{x}"],
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.text(), min_size=2, max_size=2), min_size=1, max_size=4))
def test_every_text_comes_back_from_a_csv_and_none_is_a_formula(rows: list[list[str]]) -> None:
    text = ReportTable("t", ("a", "b"), rows).csv()
    _, *found = csv.reader(io.StringIO(text, newline=""), strict=True)
    for cells, row in zip(found, rows, strict=True):
        for cell, given_text in zip(cells, row, strict=True):
            is_formula = given_text[:1] in FORMULA and given_text
            assert cell == (f"'{given_text}" if is_formula else given_text)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("".join(SPECIAL.values()) + "ab-. ")))
def test_latex_sets_every_text_as_it_is(text: str) -> None:
    pattern = "|".join(sorted(map(re.escape, SPECIAL), key=len, reverse=True))
    assert re.sub(pattern, lambda match: SPECIAL[match[0]], latex(text)) == text


def test_the_latex_of_a_table() -> None:
    assert TABLE.latex().splitlines() == [
        r"% needs \usepackage{booktabs}",
        r"\begin{tabular}{lrrl}",
        r"\toprule",
        r"run & PGD-20, n = 200 & seconds & note \\",
        r"\midrule",
        r"iad1, x & 50.00\% & 1 min & says \textquotedbl{}a, b\textquotedbl{} \\",
        r"ard \& co & 25.00\% $\pm$ 1.23 &  & =1+1 \\",
        r"at & in 1 of 3 seeds & 2 s & 100\% \#1\_\{x\} \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


@pytest.mark.parametrize(
    ("cell", "text"), [(0.000123456, "0.00012346"), (12, "12"), (None, ""), ("<b>", "&lt;b&gt;")]
)
def test_cells_of_a_page(cell: float | str | None, text: str) -> None:
    assert f">{text}</td>" in ReportTable("t", ("a",), [[cell]]).html()


def test_names_without_a_path_have_no_column_of_paths() -> None:
    table = ReportTable("t", ("row", "x"), [[Name("a"), 1], [Name("b"), None]])
    assert table.csv() == "row,x\r\na,1\r\nb,\r\n"
    assert table.texts() == [["a", "1"], ["b", ""]]
