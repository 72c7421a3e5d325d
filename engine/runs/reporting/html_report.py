"""`engine report`: runs, evaluations and benchmark results as one HTML file that needs nothing beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.common.files import write_atomically
from engine.runs.reporting import page
from engine.runs.reporting.benchmarks import bench_section
from engine.runs.reporting.comparison import comparison, headline
from engine.runs.reporting.curves import curves
from engine.runs.reporting.lines import ComparedLine, is_report, lines_of, runs_of, teachers_of
from engine.runs.reporting.paper_rows import beside_paper, costs
from engine.runs.reporting.reading import EvalFile, RunFiles, eval_file
from engine.runs.reporting.run_section import report_section, run_section, seeds_section
from engine.runs.reporting.tables import ReportTable


@dataclass
class _Given:
    """The paths of a report by their kind, each once, in their order. runs: of seeds and teachers too."""

    runs: list[RunFiles] = field(default_factory=list)
    reports: list[EvalFile] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)


def write(paths: Sequence[Path], out: Path, tables: Path | None = None) -> None:
    """Write the report of run directories, seeds, reports of evaluations and folders of benchmark results.

    tables: folder for every table as NAME.csv and NAME.tex.
    Raises ValueError, one line, for a path that is none of these, a file that cannot be read, and an `out` or
    `tables` that cannot be written.
    """
    given = _read(paths)
    lines = lines_of(given.runs, given.reports)
    sections = list(_sections(given, lines))
    content = page.document(headline(lines), sections)
    _write_files("--out", out.parent, {out.name: content})
    if tables is not None:
        _write_files("--tables", tables, dict(_table_files([each for part in sections for each in part.tables])))


def _read(paths: Sequence[Path]) -> _Given:
    given, known = _Given(), set()
    for path in paths:
        members = runs_of(path)
        for each in members or [path]:
            place = each.resolve()
            if place in known:
                continue
            known.add(place)
            if members:
                run = RunFiles(each)
                given.runs += [
                    run,
                    *(teacher for teacher in teachers_of(run) if teacher.path.resolve() not in known),
                ]
                known |= {run.path.resolve() for run in given.runs}
            elif is_report(each):
                given.reports.append(eval_file(each))
            else:
                given.folders.append(each)
    return given


def _sections(given: _Given, lines: Sequence[ComparedLine]) -> Iterator[page.PageSection]:
    """The parts of the page in their order; first all runs together, then each by itself."""
    if lines:
        yield comparison(lines)
        yield from filter(None, (curves(lines), beside_paper(lines), costs(lines)))
    numbers = iter(range(1, 1 + len(given.runs) + len(given.reports) + len(given.folders)))
    for line in lines:
        named = [(_name(next(numbers), run.path), run) for run in line.runs]
        if line.is_group:
            yield seeds_section(f"Seeds of {line.label}, {line.path}", named)
        elif named:
            yield run_section(named[0][1], named[0][0])
    for report in given.reports:
        yield report_section(report, _name(next(numbers), report.path))
    for folder in given.folders:
        yield bench_section(folder, _name(next(numbers), folder))


def _name(number: int, path: Path) -> str:
    return f"{number}-{_plain(path.name)}"


def _plain(text: str) -> str:
    """A file's name of letters, digits, '.', '_' and '-'."""
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII).strip("-.") or "table"


def _table_files(tables: Sequence[ReportTable]) -> Iterator[tuple[str, str]]:
    """Names and contents of the files of tables; a name that comes twice is numbered."""
    taken: set[str] = set()
    for table in tables:
        name, number = _plain(table.name), 2
        while name in taken:
            name, number = f"{_plain(table.name)}-{number}", number + 1
        taken.add(name)
        yield f"{name}.csv", table.csv()
        yield f"{name}.tex", table.latex()


def _write_files(option: str, folder: Path, contents: dict[str, str]) -> None:
    for name, content in contents.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / name, content.encode())
        except OSError as error:
            raise ValueError(f"{option}: cannot write {folder / name}: {error.strerror}") from None
