"""Evaluation by several processes, and evaluation that was stopped: the numbers of one that was neither."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.attacks.auto import standard
from engine.attacks.pgd import PRESETS
from engine.common.console import Reporter
from engine.common.stopping import Interrupted, Stop
from engine.evaluation import evaluate_checkpoint as evaluation
from engine.evaluation.evaluate_checkpoint import EvaluationConfig
from engine.evaluation.measure import evaluate
from engine.evaluation.partial_results import note_of, read_note
from engine.evaluation.reports import read
from engine.system.distributed import World
from tests.conftest import write_checkpoint
from tests.processes import together
from tests.system.test_survival import launched

ATTACKS = ["natural", *PRESETS, "aa"]
DIGITS: dict[str, Any] = {"dataset": "digits", "limit": 12, "batch_size": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("network") / "at.pt", 1, 10)


def evaluate_here(world: World, checkpoint: str, out: str) -> None:
    """Evaluation in one of several processes; the partial results stay, and each writes the results of all."""
    shutil.rmtree = lambda folder: None  # type: ignore[assignment]  # in a process of its own
    standard.STANDARD = standard.Steps(apgd=5, fab=5, square=50)
    report = evaluation.run(
        Path(checkpoint), EvaluationConfig(ATTACKS, device="cpu", **DIGITS), Reporter(), out=Path(out), world=world
    )
    (Path(out).parent / f"result-{world.rank}.json").write_text(json.dumps(report.results))


def notes(root: Path) -> list[tuple[str, dict[str, Any]]]:
    """Name of the attack's folder and a note, of all attacks."""
    files = sorted(root.glob("*/*.jsonl"))
    found = [(path.parent.name, read_note(line)) for path in files for line in path.read_bytes().splitlines()]
    return [(folder, note) for folder, note in found if note is not None]


def of_images(note: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Results of AutoAttack by part and image."""
    return list(
        zip(
            [note["part"]] * len(note["images"]),
            note["images"],
            note["stood"],
            note["forward"],
            note["backward"],
            strict=True,
        )
    )


def measured(root: Path) -> set[frozenset[tuple[Any, ...]]]:
    """Results of all processes by attack, but for the time; each must be there once."""
    found = notes(root)
    batches = [(folder, note) for folder, note in found if "batch" in note]
    assert len({(folder, note["batch"]) for folder, note in batches}) == len(batches) == (len(ATTACKS) - 1) * 3
    images = [row for _, note in found if "part" in note for row in of_images(note)]
    assert len({row[:2] for row in images}) == len(images)
    assert sum(part == 0 for part, *_ in images) == 12
    by_batch = {
        frozenset(tuple((note | {"seconds": 0}).items()) for folder, note in batches if folder == name)
        for name, _ in batches
    }
    return by_batch | {frozenset(images)}


def test_the_numbers_do_not_depend_on_the_number_of_processes(checkpoint: Path, tmp_path: Path) -> None:
    """To the last bit of how far each batch's farthest image lies from its origin: the noise is the same."""
    found = {}
    for size in (1, 2):
        root = tmp_path / str(size)
        root.mkdir()
        together(size, evaluate_here, str(checkpoint), str(root / "report.json"))
        found[size] = measured(root / "report.partial")
        assert [entry["attack"] for entry in read(root / "report.json")] == ATTACKS
        results = [json.loads((root / f"result-{rank}.json").read_text()) for rank in range(size)]
        assert all(result == results[0] for result in results)
        assert [result["n"] for result in results[0].values()] == [12] * len(ATTACKS)
    assert found[1] == found[2]


def test_an_evaluation_that_was_killed_goes_on_with_another_number_of_processes(
    checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copy(checkpoint, tmp_path / "at.pt")
    arguments = ["eval", str(tmp_path / "at.pt"), "--attacks", "natural,pgd20,cw,apgd-t", "--dataset", "digits"]
    arguments += ["--limit", "12", "--batch-size", "4", "--device", "cpu"]
    partial, report = tmp_path / "at.pt.eval.partial", tmp_path / "at.pt.eval.json"
    with launched(arguments, tmp_path) as running:
        while not any("part" in note for _, note in notes(partial)):
            assert running.process.poll() is None, running.process.communicate()
        for process in (running.process.pid, *running.workers()):
            os.kill(process, signal.SIGKILL)
        running.process.communicate()
    before = notes(partial)
    assert sum("batch" in note for _, note in before) == 3 * 3
    # What is remembered is taken: a time that no batch and no image has shows it.
    begun = [
        path for path in partial.glob("*/*.jsonl") if path.stat().st_size
    ]  # one may be killed as it opens its
    for victim in begun:
        first, *others = victim.read_bytes().splitlines()
        known = read_note(first)
        assert known is not None
        marked = note_of(known | {"seconds": 1e6})
        victim.write_bytes(b"\n".join([marked, *others, first[:90]]))
    with launched(arguments, tmp_path, 1) as running:
        code, printed = running.ends()
    assert code == 0, printed
    assert not partial.exists()
    found = {entry["attack"]: entry for entry in read(report)}
    assert all(entry["seconds"] > 1e6 for entry in found.values())
    whole = evaluation.run(checkpoint, EvaluationConfig(list(found), device="cpu", **DIGITS), Reporter())
    for attack, result in found.items():
        for key in whole.results[attack].keys() - {"seconds"}:
            assert timeless(result[key]) == timeless(whole.results[attack][key]), (attack, key)


def timeless(value: Any) -> Any:
    """Without the seconds of each part."""
    if not isinstance(value, dict):
        return value
    return {name: timeless(inner) for name, inner in value.items() if name != "seconds"}


def test_a_stop_is_looked_at_after_each_batch() -> None:
    stop, done = Stop(), []

    def ask(name: str, count: int, total: int) -> None:
        done.append(count)
        stop.requested = count == 10

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 5))
    data = torch.rand(30, 3, 4, 4), torch.arange(30) % 5
    with pytest.raises(Interrupted):
        evaluate(model, data, ["natural"], batch_size=5, on_batch=ask, stop=stop)
    assert done == [5, 10]
