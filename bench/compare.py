"""Time the engines of two checkouts, in turn: `python -m bench.compare BEFORE AFTER`. README.md says how."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click
from rich import box
from rich.table import Table

from bench.lib import command
from bench.lib.output.csv_rows import speedup
from bench.lib.timing import processor_seconds, rotated
from engine import methods

LOG_EVERY = 5
"""Steps between two rows of metrics.jsonl."""
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


class Round(NamedTuple):
    """Seconds of one round; of processors where the clock is not named, which others disturb less."""

    help_clock: float
    help: float
    step_clock: float
    run: float


HEADINGS = ("engine --help, s", "engine --help, CPU s", "step, s", "engine train, CPU s")
"""Of the fields of a `Round`."""


@command.command
@click.argument("before", type=FOLDER)
@click.argument("after", type=FOLDER)
@click.option("--method", default="iad1", show_default=True, type=click.Choice(list(methods.METHODS)))
@command.model_option()
@command.batch_size_option(16)
@click.option("--amp", is_flag=True, help="Network passes in half precision.")
@click.option("--steps", default=20, show_default=True, type=click.IntRange(min=2 * LOG_EVERY), help="Of a round.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=2), help="Of each that count.")
def main(
    before: Path, after: Path, method: str, model: str, batch_size: int, amp: bool, steps: int, rounds: int
) -> None:
    """Time the start of the command line, and training steps on a CPU, by two checkouts in turn."""
    flags = (
        "--dataset", "digits", "--method", method, "--model", model, "--batch-size", str(batch_size),
        "--device", "cpu", "--limit-train", str(steps * batch_size), "--limit-test", "10", "--epochs", "1",
        "--set", "validation=0", "--set", "teacher.epochs=1", "--set", "eval.probe_size=2",
        "--set", "eval.final=[]", "--set", f"log_every={LOG_EVERY}", *["--amp"][: int(amp)],
    )  # fmt: skip
    samples = measure([before.resolve(), after.resolve()], flags, rounds)
    command.new_console().print(table(*samples))


def measure(checkouts: Sequence[Path], flags: Sequence[str], rounds: int) -> list[list[Round]]:
    """Samples of each checkout; a round begins with the next one each time. A first round is not counted."""
    samples: list[list[Round]] = [[] for _ in checkouts]
    for turn in range(rounds + 1):
        for index, checkout in rotated(list(enumerate(checkouts)), turn):
            samples[index].append(sample(checkout, flags))
    return [taken[1:] for taken in samples]


def sample(checkout: Path, flags: Sequence[str]) -> Round:
    """One round of a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        clock, processor = _run(checkout, Path(folder), "--help")
        _, run = _run(checkout, Path(folder), "train", *flags, "--out", "run")
        return Round(clock, processor, step_seconds(Path(folder) / "run"), run)


def _run(checkout: Path, folder: Path, *arguments: str) -> tuple[float, float]:
    """Seconds on the clock and of processors that a command of the checkout's engine takes."""
    variables = {**os.environ, "ENGINE_CACHE": str(folder / "cache")}
    line = (sys.executable, str(checkout / "engine" / "__main__.py"), *arguments)
    before, start = processor_seconds(), time.perf_counter()
    done = subprocess.run(line, cwd=folder, env=variables, capture_output=True, text=True)  # noqa: S603  # no shell
    seconds, processor = time.perf_counter() - start, processor_seconds() - before
    if done.returncode:
        raise click.ClickException(f"{' '.join(line)}\n{done.stderr}")
    return seconds, processor


def step_seconds(run: Path) -> float:
    """Seconds of a step, the least of the rows of a run: what disturbs it adds to it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[int, float] = {row["step"]: row["seconds"] for row in rows if row["event"] == "step"}
    return min(seconds for step, seconds in found.items() if step % LOG_EVERY == 0) / LOG_EVERY


def table(before: Sequence[Round], after: Sequence[Round]) -> Table:
    """Medians and least values of both, and the median of the ratios of a round."""
    result = Table(box=box.SIMPLE)
    for heading in ("", "before", "least", "after", "least", "after / before"):
        result.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for heading, one, other in zip(HEADINGS, zip(*before, strict=True), zip(*after, strict=True), strict=True):
        cells = (f"{value:.4g}" for taken in (one, other) for value in (statistics.median(taken), min(taken)))
        result.add_row(heading, *cells, f"{speedup(other, one):.3f}")
    return result


if __name__ == "__main__":
    main()
