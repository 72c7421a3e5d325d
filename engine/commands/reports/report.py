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
    metavar="RUN_OR_BENCH...",
)
@click.option(
    "--out",
    default="report.html",
    show_default=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
)
@import_option
def report(paths: tuple[Path, ...], out: Path) -> None:
    """Put run directories and folders of benchmark results into one HTML file, with tables and pictures."""
    from engine.common.console import ConsoleReporter
    from engine.runs.reporting import html_report

    html_report.write(paths, out)
    ConsoleReporter().message(f"Written: {out}")
