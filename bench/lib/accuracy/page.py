"""Files that a reader sees of a protocol's cells: cells.csv, index.html, README.md and pictures."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from bench.lib.accuracy import chapters, report
from bench.lib.accuracy.cells import MeasuredCell, ResultFolder
from bench.lib.accuracy.collected import Collected, collect
from bench.lib.accuracy.protocol import AccuracyProtocol
from bench.lib.output import csv_rows
from bench.lib.output.csv_rows import AccuracyRow
from engine.common.files import write_atomically


def write(protocol: AccuracyProtocol, source: str, results: ResultFolder, console: Console | None = None) -> None:
    """Write all files from the cells that are there. source: text of the protocol's file.

    console: prints the tables, too. Raises ValueError for damaged cells, and for some of other settings.
    """
    found = collect(protocol, results)
    parts = report.chapters(found, source)
    title, headline = f"Accuracies by the protocol {protocol.name}", report.headline(found)
    results.folder.mkdir(parents=True, exist_ok=True)
    if rows := list(lines(found)):
        csv_rows.write(results.folder / "cells.csv", rows)
    for picture in (picture for part in parts for picture in part.pictures):
        write_atomically(results.folder / f"{picture.name}.png", picture.png())
    write_atomically(results.folder / "README.md", chapters.markdown(title, headline, parts).encode())
    write_atomically(results.folder / "index.html", chapters.html(title, headline, parts).encode())
    if console is not None:
        for sentence in headline:
            console.print(sentence, markup=False)
        chapters.show(console, parts)
        console.print(f"written: {results.folder / 'index.html'}, README.md and cells.csv", markup=False)


def lines(found: Collected) -> Iterator[AccuracyRow]:
    """Lines of cells.csv: a cell, or a teacher, under each of its attacks."""
    for cell in (*found.teachers.values(), *found.cells.values()):
        yield from _lines(cell)


def _lines(cell: MeasuredCell) -> Iterator[AccuracyRow]:
    for attack, accuracy in cell.accuracies.items():
        yield AccuracyRow(
            **cell.facts,
            protocol=cell.protocol,
            row=cell.row,
            seed=cell.seed,
            settings=cell.settings,
            method=cell.keys["method"],
            model=cell.keys["model"],
            epochs=cell.epochs,
            attack=attack,
            n=accuracy.n,
            correct=accuracy.correct,
            accuracy=accuracy.share,
            attack_seconds=accuracy.seconds,
            epoch_seconds=cell.epoch_seconds,
            seconds=cell.seconds,
            peak_memory=cell.peak_memory,
            weights=cell.weights,
        )
