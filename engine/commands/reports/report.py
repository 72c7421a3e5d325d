"""`engine report`: runs and benchmark results as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from engine.commands.options import import_option


@click.command()
@click.argument(
    "paths",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
    metavar="PATH...",
)
@click.option(
    "--out",
    default="report.html",
    show_default=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
)
@click.option(
    "--tables",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write every table of the page as CSV and as LaTeX into this folder.",
)
@import_option
def report(paths: tuple[Path, ...], out: Path, tables: Path | None) -> None:
    """Put runs into one HTML file, compared, with tables and pictures.

    PATH is a run directory, a folder of runs seed-0, seed-1, ... (of `engine train --seeds`), the .eval.json of
    another checkpoint, or a folder of benchmark results (*.csv).
    """
    from engine.common.console import ConsoleReporter
    from engine.runs.reporting import html_report

    html_report.write(paths, out, tables)
    ConsoleReporter().message(f"Written: {out}")
    if tables is not None:
        ConsoleReporter().message(f"Written: tables in {tables}")
