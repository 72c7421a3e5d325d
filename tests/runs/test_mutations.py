"""Every kind of file that a command reads, damaged at random: one line and an exit code, or the numbers of before.

A mutation is a function of its number, so that one that fails can be looked at by itself.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import config
from engine.common.stopping import Interrupted
from engine.evaluation import evaluate_checkpoint, reports
from engine.pipelines import ffcv
from engine.runs import lifecycle
from tests.runs.test_data_runs import photographs as photographs  # a fixture
from tests.runs.test_data_runs import write_beton
from tests.runs.test_kills import accuracies
from tests.runs.test_resume import StopAt

FILES, MUTATIONS = 22, 40
"""Files under commands that read them, and mutations of each."""
SECONDS = 30
ODD_VALUES: tuple[Any, ...] = (None, True, -1, 2**70, 1e308, float("nan"), "", "text", [], {}, [[]], {"": None})


# ---------------------------------------------------------------- mutations


def flip(content: bytearray, chance: random.Random) -> None:
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def flip_some(content: bytearray, chance: random.Random) -> None:
    for _ in range(8):
        flip(content, chance)


def truncate(content: bytearray, chance: random.Random) -> None:
    del content[chance.randrange(len(content)) :]


def insert(content: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(content))
    content[at:at] = chance.randbytes(chance.randint(1, 40))


def remove(content: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(content))
    del content[at : at + chance.randint(1, 40)]


def erase(content: bytearray, chance: random.Random) -> None:
    at, length = chance.randrange(len(content)), chance.randint(1, 512)
    content[at : at + length] = bytes(len(content[at : at + length]))


def repeat(content: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(content))
    content[at:at] = content[at : at + chance.randint(1, 400)]


def empty(content: bytearray, chance: random.Random) -> None:
    content.clear()


BYTES = (flip, flip, flip_some, truncate, insert, remove, erase, repeat, empty)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of nested lists and dicts with each of its keys."""
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from places(tree[key])


def odd_value(text: bytes, chance: random.Random) -> bytes:
    """A value of a file of JSON, or of a line of one, replaced by what nobody expects there."""
    lines = text.decode().splitlines(keepends=True) if text.count(b"}\n{") else [text.decode()]
    number = chance.randrange(len(lines))
    tree = json.loads(lines[number])
    container, key = chance.choice(list(places(tree)))
    if chance.random() < 0.2:
        del container[key]
    else:
        container[key] = chance.choice(ODD_VALUES)
    lines[number] = json.dumps(tree) + "\n"
    return "".join(lines).encode()


def mutated(content: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Other content: bytes changed, another file's, or one of its values made odd."""
    which = chance.random()
    if which < 0.1:
        return chance.choice(others)
    if which < 0.5 and content[:1] == b"{":
        return odd_value(content, chance)
    result = bytearray(content)
    chance.choice(BYTES)(result, chance)
    return bytes(result)


# ---------------------------------------------------------------- what is read


@dataclass(frozen=True)
class Case:
    """A command that reads a file of a folder, which is copied for each mutation. file: a pattern of one file.

    numbers: what a command that ends well has computed, from the folder; None where nothing can tell a changed
    file from another one, such as the user's own images, or a log.
    """

    file: str
    command: Callable[[Path], list[str]]
    numbers: Callable[[Path], Any] | None = None

    def path(self, at: Path) -> Path:
        (found,) = at.glob(self.file)
        return found

    def content(self, at: Path) -> Any:
        """Contents of a checkpoint, whose every bit is verified, and of a configuration; else None.

        What cannot be read says nothing of what it said before.
        """
        path = self.path(at)
        with contextlib.suppress(Exception):
            if path.suffix == ".pt":
                return list(leaves(torch.load(path, weights_only=True)))
            return config.load(config.read_file(path)) if path.suffix == ".yaml" else None
        return path.read_bytes()


def leaves(tree: Any) -> Iterator[Any]:
    """Keys and values of nested dicts and lists, tensors as their bits."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from leaves(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from leaves(value)
    else:
        yield (tree.dtype, tree.shape, tree.numpy().tobytes()) if isinstance(tree, torch.Tensor) else tree


def weights(run: Path) -> list[bytes]:
    student = torch.load(run / "last.pt", weights_only=True)["student"]
    return [value.numpy().tobytes() for value in student.values()]


def resume(at: Path) -> list[str]:
    return ["train", "--resume", str(at / "stopped")]


def finished(at: Path) -> list[str]:
    return ["train", "--resume", str(at / "finished")]


def report(at: Path) -> list[str]:
    return ["report", str(at / "finished"), str(at / "stopped"), "--out", str(at / "report.html")]


def report_benchmarks(at: Path) -> list[str]:
    return ["report", str(at / "bench"), "--out", str(at / "report.html")]


def evaluate(at: Path) -> list[str]:
    return ["eval", str(at / "finished"), "--attacks", "natural,fgsm", "--device", "cpu"]


def evaluate_on(at: Path) -> list[str]:
    return ["eval", str(at / "stopped"), "--attacks", "fgsm", "--device", "cpu", "--batch-size", "6"]


def with_teacher(at: Path) -> list[str]:
    teacher = ["--teacher", str(at / "finished" / "best.pt")]
    return [*training(at / "student", at / "images.zip"), "--method", "ard", "--set", "eval.final=[]", *teacher]


def configured(at: Path) -> list[str]:
    return ["train", "--config", str(at / "stopped" / "config.yaml"), "--out", str(at / "again")]


def training(out: Path, data: Path, *further: str) -> list[str]:
    keys = {"attack.num_steps": 1, "eval.final": "[natural]", "eval.probe_size": 6, "validation": 0}
    command = ["train", "--method", "at", "--dataset", "folder", "--model", "resnet8", "--device", "cpu"]
    command += ["--epochs", "2", "--batch-size", "8", "--data", str(data), "--out", str(out), *further]
    return [*command, *(part for key, value in keys.items() for part in ("--set", f"{key}={value}"))]


def photograph_keys(at: Path, data: str) -> list[str]:
    return training(at / "run", at / data, "--image-size", "16", "--epochs", "1", "--method", "st")


CASES = {
    "config.yaml, resumed": Case("stopped/config.yaml", resume, lambda at: weights(at / "stopped")),
    "config.yaml, given": Case("stopped/config.yaml", configured),
    "config.yaml, of a finished run": Case("finished/config.yaml", finished),
    "config.yaml, reported": Case("finished/config.yaml", report),
    "last.pt, resumed": Case("stopped/last.pt", resume, lambda at: weights(at / "stopped")),
    "best.pt, evaluated": Case("finished/best.pt", evaluate, lambda at: accuracies(at / "finished")),
    "best.pt, a teacher": Case("finished/best.pt", with_teacher, lambda at: weights(at / "student")),
    "metrics.jsonl, resumed": Case("stopped/metrics.jsonl", resume, lambda at: weights(at / "stopped")),
    "metrics.jsonl, reported": Case("finished/metrics.jsonl", report),
    "provenance.json, resumed": Case("stopped/provenance.json", resume, lambda at: weights(at / "stopped")),
    "provenance.json, reported": Case("finished/provenance.json", report),
    "summary.json, resumed": Case("finished/summary.json", finished),
    "summary.json, reported": Case("finished/summary.json", report),
    "best.pt.eval.json, evaluated": Case(
        "finished/best.pt.eval.json", evaluate, lambda at: accuracies(at / "finished")
    ),
    "best.pt.eval.json, reported": Case("finished/best.pt.eval.json", report),
    "notes of a stopped evaluation": Case(
        "stopped/*.partial/*/*.jsonl", evaluate_on, lambda at: accuracies(at / "stopped")
    ),
    "loss.png, reported": Case("finished/loss.png", report),
    "step.csv, reported": Case("bench/step.csv", report_benchmarks),
    "images.zip": Case("images.zip", lambda at: training(at / "run", at / "images.zip")),
    "an image": Case("photographs/train/circle/3.jpg", lambda at: photograph_keys(at, "photographs")),
    "a .beton file": Case("photographs.beton", lambda at: photograph_keys(at, "photographs.beton")),
    "a .beton file, listed": Case("photographs.beton", lambda at: ["data", "info", str(at / "photographs.beton")]),
}
assert len(CASES) == FILES
NEEDS_FFCV = ("an image", "a .beton file", "a .beton file, listed")


@pytest.fixture(scope="module")
def made(tiny: Any, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stopped run, a finished and evaluated one, benchmark results, and data of each format."""
    at = tmp_path_factory.mktemp("made")
    with zipfile.ZipFile(at / "images.zip", "w") as archive:
        for path in sorted(tiny.folder.rglob("*.png")):
            archive.write(path, path.relative_to(tiny.folder))
    shutil.copytree(photographs, at / "photographs")
    if not missing("a .beton file"):
        write_beton(photographs, at / "photographs.beton")
    keys = {"data": str(at / "images.zip"), "method": "at", "eval": {"final": ["natural"], "probe_size": 6}}
    lifecycle.train(tiny.config(**keys, out=str(at / "finished")))
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(**keys, out=str(at / "stopped")), StopAt(8))
    subprocess.run([sys.executable, "-m", "engine", *evaluate(at)], check=True, capture_output=True)
    best = at / "stopped" / "best.pt"
    wanted = evaluate_checkpoint.EvaluationConfig(["fgsm"], batch_size=6, device="cpu")
    with pytest.raises(Interrupted):
        evaluate_checkpoint.run(best, wanted, StopAt(12), out=reports.path_of(best, None))
    (at / "bench").mkdir()
    (at / "bench" / "step.csv").write_text("date,method,median_s\n2026-01-01,iad1,1.5\n2026-01-01,iad2,2.5\n")
    return at


def missing(name: str) -> str:
    """Why a case cannot run here; "" where it can."""
    try:
        if name in NEEDS_FFCV:
            ffcv.check_installed()
    except ValueError as error:
        return str(error)
    return ""


@contextmanager
def bounded() -> Iterator[None]:
    """Whoever takes longer hangs."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- the verdict


def complaint(case: Case, at: Path, expected: Any, cli: Any, *, same: bool = True) -> str:
    """Fault of a command in taking the file; "" where there is none.

    expected: the numbers of the whole file, None where there are none. same: the file says what it said.
    """
    try:
        with bounded():
            outcome = cli(*case.command(at))
    except BaseException as error:  # whatever it is, a user would see a traceback
        return f"{type(error).__name__}: {error}"
    lines = outcome.err.strip().splitlines()
    if outcome.code == 0:
        if case.file.endswith(".pt") and not same:
            return "exit 0 with another content"
        unchanged = case.numbers is None or expected is None or not same or case.numbers(at) == expected
        return "" if unchanged else "exit 0 with other numbers"
    if outcome.code not in (1, 2) or len(lines) != 1 or not lines[0].startswith("engine: "):
        return f"exit {outcome.code}: {outcome.err!r}"
    return f"unforeseen: {lines[0]}" if any(word in lines[0] for word in UNFORESEEN) else ""


UNFORESEEN = ("Traceback", "engine: unforeseen")
"""Words in the line of an exception that nothing in the engine expects."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CASES)
def test_damaged_files_end_in_one_line_or_change_nothing(name: str, made: Path, cli: Any, tmp_path: Path) -> None:
    if reason := missing(name):
        pytest.skip(reason)
    case = CASES[name]
    content = case.path(made).read_bytes()
    others = [
        path.read_bytes() for path in made.rglob("*") if path.is_file() and path.suffix != case.path(made).suffix
    ]
    whole = copied(made, tmp_path / "whole")
    assert complaint(case, whole, None, cli) == ""
    expected = case.numbers(whole) if case.numbers is not None else None
    found = []
    for number in range(MUTATIONS):
        at = copied(made, tmp_path / "damaged")
        case.path(at).write_bytes(mutated(content, others, random.Random(f"{name} {number}")))
        same = case.content(at) == case.content(made)
        if fault := complaint(case, at, expected, cli, same=same):
            found.append(f"mutation {number}: {fault}")
    assert not found, "\n".join(found)


def copied(made: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(made, to))


@pytest.mark.parametrize("mutation", BYTES)
def test_a_mutation_changes_the_content(mutation: Callable[[bytearray, random.Random], None]) -> None:
    for seed in range(20):
        content = bytearray(b"0123456789" * 100)
        mutation(content, random.Random(seed))
        assert content != b"0123456789" * 100
