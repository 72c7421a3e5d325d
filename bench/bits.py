"""Compare two checkouts bit for bit: `python -m bench.bits CHECKOUT --out FILE`, then `--compare FILE`.

For each method, semantics, precision and number of processes: a run of 20 steps with its teachers, and an
evaluation of its best checkpoint. Of each a SHA-256 of the weights, of the metrics rows and of the report,
timings left out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from bench.lib import command
from engine import methods
from engine.plugins.builtin_loggers.numbers_of import TIMINGS

SEMANTICS = ("paper", "official")
PRECISIONS = {"float32": (), "bfloat16": ("--amp", "--set", "amp_dtype=bfloat16")}
PROCESSES = {1: (), 2: ("--procs", "2")}
RUN_FLAGS = (
    "--dataset", "digits", "--model", "resnet8", "--device", "cpu", "--epochs", "2", "--batch-size", "16",
    "--limit-train", "178", "--limit-test", "60", "--set", "validation=0.1", "--set", "attack.num_steps=3",
    "--set", "attack.epsilon=28/255", "--set", "attack.step_size=14/255", "--set", "log_every=5",
    "--set", "eval.probe_size=20", "--set", "teacher.epochs=1", "--set", "teacher_st.epochs=1",
    "--set", "eval.final=[natural, pgd10]",
)  # fmt: skip
EVALUATION = ("--attacks", "natural,fgsm,pgd20,cw", "--limit", "60", "--device", "cpu")
RESULT = ("attack", "correct", "n", "description", "zero_gradients", "non_finite_gradients", "masked", "parts")
"""Keys of a report's entry that are compared, beside the hash of the weights."""


@command.command
@click.argument("checkout", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path), help="Write the digests there, as JSON.")
@click.option("--compare", type=click.Path(path_type=Path, exists=True), help="Digests of another checkout.")
def main(checkout: Path, out: Path | None, compare: Path | None) -> None:
    """Digest what the engine of a checkout computes; exit code 1 where it differs from another's.

    With --compare, of the methods that the other checkout has.
    """
    before: dict[str, str] = {} if compare is None else json.loads(compare.read_text())
    wanted = dict.fromkeys(name.partition(" ")[0] for name in before) or dict.fromkeys(methods.METHODS)
    with tempfile.TemporaryDirectory() as folder:
        digests = dict(digests_of(checkout.resolve(), Path(folder), tuple(wanted)))
    if out is not None:
        out.write_text(json.dumps(digests, indent=1))
    if compare is not None:
        different = [name for name in sorted(before.keys() | digests) if before.get(name) != digests.get(name)]
        for name in different:
            click.echo(f"differs: {name}")
        equal = sum(digests.get(name) == value for name, value in before.items())
        click.echo(f"{equal} of {len(before)} digests are equal")
        sys.exit(bool(different))


def digests_of(checkout: Path, folder: Path, wanted: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Digests by name, e.g. "iad1 paper float32 2 rows", of runs of those methods in that folder."""
    environment = {**os.environ, "ENGINE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}

    def engine(*arguments: str) -> None:
        line = (sys.executable, str(checkout / "engine" / "__main__.py"), *arguments)
        done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)  # noqa: S603
        if done.returncode:
            raise click.ClickException(f"{' '.join(line)}\n{done.stderr}")

    for method, semantics, amp, processes in itertools.product(wanted, SEMANTICS, PRECISIONS, PROCESSES):
        name = f"{method} {semantics} {amp} {processes}"
        run = folder / name.replace(" ", "-")
        click.echo(name)
        keys = ("--method", method, "--semantics", semantics)
        engine("train", *keys, *RUN_FLAGS, *PRECISIONS[amp], *PROCESSES[processes], "--out", run.name)
        engine("eval", run.name, *EVALUATION, *PROCESSES[processes])
        yield f"{name} weights", digest(_tensors(run))
        yield f"{name} rows", digest(_rows(run))
        yield f"{name} report", digest(_report(run))


def _tensors(run: Path) -> dict[str, Any]:
    """Student and momentum of the last checkpoint, student of the best one."""
    found: dict[str, Any] = {}
    for name in ("last.pt", "best.pt"):
        content = torch.load(run / name, map_location="cpu", weights_only=True)
        found |= {f"{name}.{key}": content[key] for key in ("student", "optimizer") if key in content}
    return found


def _rows(run: Path) -> Any:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [_untimed(json.loads(line)) for line in lines], _untimed(json.loads((run / "summary.json").read_text()))


def _report(run: Path) -> Any:
    content = json.loads((run / "best.pt.eval.json").read_text())
    return [[entry["parameters"]["weights"], *(entry[key] for key in RESULT)] for entry in content["results"]]


def _untimed(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _untimed(value) for key, value in tree.items() if key not in TIMINGS}
    return [_untimed(value) for value in tree] if isinstance(tree, list) else tree


def digest(tree: Any) -> str:
    """SHA-256 of nested dicts, lists, numbers, texts and tensors, of these the bytes, the dtype and the shape."""
    hashed = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            hashed.update(b"{")
            for key in sorted(value, key=str):
                add(str(key))
                add(value[key])
            hashed.update(b"}")
        elif isinstance(value, list | tuple):
            hashed.update(b"[")
            for one in value:
                add(one)
            hashed.update(b"]")
        elif isinstance(value, Tensor):
            hashed.update(f"{value.dtype} {tuple(value.shape)}".encode())
            hashed.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            hashed.update(repr(value).encode() + b",")

    add(tree)
    return hashed.hexdigest()


if __name__ == "__main__":
    main()
