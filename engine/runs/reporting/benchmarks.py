"""A section for a folder of benchmark results: its tables of comma-separated values, and its pictures."""

from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path

from engine.runs.reporting.page import PageSection, h3, note
from engine.runs.reporting.reading import content_of
from engine.runs.reporting.run_section import found_pictures
from engine.runs.reporting.tables import ReportTable, number_of

_MOST_ROWS = 12
"""Rows up to which a table is shown; a longer one is folded."""


def bench_section(path: Path, name: str) -> PageSection:
    """All results of a folder. Raises ValueError where there are none, and for a damaged file."""
    files = sorted(path.glob("*.csv"))
    if not files:
        raise ValueError(
            f"{path} is neither a run directory (config.yaml) nor a folder of benchmark results (*.csv), nor of "
            "runs seed-0, seed-1, ..., nor a report of an evaluation (*.eval.json)"
        )
    section = PageSection(f"Benchmarks, {path}")
    for file in files:
        _add_csv(section, file, f"{name}-{file.stem}")
    section.add(found_pictures(path))
    return section


def _add_csv(section: PageSection, file: Path, name: str) -> None:
    """Columns that are the same in all rows once, and the rest as a table."""
    try:
        head, *rest = csv.reader(StringIO(content_of(file).decode(), newline=""), strict=True)
    except (ValueError, csv.Error):  # ValueError: not UTF-8, or without a single line
        raise ValueError(f"{file} is no table of comma-separated values") from None
    for number, cells in enumerate(rest, 2):
        if len(cells) != len(head):
            raise ValueError(f"{file}: row {number} has {len(cells)} cells, and the first {len(head)}")
    rows = [dict(zip(head, cells, strict=True)) for cells in rest]
    same = [key for key in head if len(rows) > 1 and len({row[key] for row in rows}) == 1]
    told = "; ".join(f"{key} {rows[0][key]}" for key in same if rows[0][key])
    columns = [key for key in head if key not in same]
    table = ReportTable(name, columns, [[number_of(row[key]) for key in columns] for row in rows])
    section.add(h3(file.name), note(told) if told else "")
    if len(rows) > _MOST_ROWS:
        section.add_folded(f"{len(rows)} rows", table)
    else:
        section.add_table(table)
