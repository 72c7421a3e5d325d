"""Chapter of a protocol's page on the mechanism: the paper's statements beside the logs, and its figures."""

from __future__ import annotations

from bench.lib.accuracy import mechanism
from bench.lib.accuracy.chapters import Chapter, Folded, Items, Picture
from bench.lib.accuracy.collected import Collected
from engine.runs.reporting.tables import Cell, ReportTable

_SHOWN = ("Statement", "Row", "From and to", "Mean", "95 % interval", "Second half", "Verdict")


def mechanism_chapter(found: Collected) -> Chapter | None:
    """The chapter; None while no row that shows the mechanism is measured."""
    logs = mechanism.logs_drawn(found.protocol, found.results)
    if not logs:
        return None
    claims = mechanism.claims(found.protocol, found.results)
    heading, rows = mechanism.table(claims)
    places = [heading.index(name) for name in _SHOWN]
    cells: list[list[Cell]] = [[row[place] for place in places] for row in rows]
    result = Chapter("The paper's mechanism")
    result.add(
        "Statements of the paper on teacher, student and trust in the training, written down before any result "
        "was there, with what the logs of these cells say. Shares are in percent, differences in percentage "
        "points.",
        ReportTable("mechanism", _SHOWN, cells),
        Items(mechanism.BESIDE_THE_VERDICTS),
        Folded("Every statement: its place in the paper, the estimate of each seed, and what to know beside it",
               "\n\n".join(_details(heading, row) for row in rows)),
    )  # fmt: skip
    for name, figure in mechanism.FIGURES_OVER_SEEDS.items():
        result.add(Picture(name, mechanism.drawn, (figure, found.protocol, logs), figure.alt))
    return result


def _details(heading: tuple[str, ...], row: list[str]) -> str:
    return "\n".join(f"{name}: {text}" for name, text in zip(heading, row, strict=True) if text)
