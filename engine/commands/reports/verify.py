"""`engine verify`: the adversarial images of a report, checked again."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from engine.commands.completion import FILE
from engine.commands.options import SEED, device_option, import_option
from engine.common.stopping import EXIT_FAILED

_ALL = "all"


@click.command()
@click.argument("report", type=FILE, metavar="REPORT")
@click.option(
    "--images",
    default="100",
    show_default=True,
    metavar="N|all",
    help="Images that stood, chosen at random, to be attacked once more.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of their choice and attack.")
@click.option("--checkpoint", type=FILE, help="Where the checkpoint lies. [where it was, or beside the report]")
@click.option("--data", type=FILE, help="Where the data set lies. [where it was]")
@device_option
@import_option
def verify(report: str, images: str, seed: int, checkpoint: str | None, data: str | None, device: str) -> None:
    """Check the adversarial images that `engine eval --save-adversarial` has written.

    REPORT is the JSON that the evaluation wrote. The exit code is 1 where something does not hold.
    """
    from engine.common.console import ConsoleReporter
    from engine.evaluation.files.verification import Verification, verify

    count = None if images == _ALL else int(images) if images.isdecimal() and len(images) < 10 else -1
    if count is not None and count < 0:
        raise ValueError(f"--images: a whole number from 0 on, or {_ALL!r}, is expected, got {images!r:.40}")
    reporter = ConsoleReporter()
    choices = Verification(count, seed, device, Path(checkpoint) if checkpoint else None, data)
    findings = verify(Path(report), choices, reporter)
    for line in findings:
        reporter.message(line)
    reporter.message(f"{len(findings)} findings: {report}" if findings else f"All holds: {report}")
    if findings:
        sys.exit(EXIT_FAILED)
