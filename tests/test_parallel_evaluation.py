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

from engine import evaluation
from engine.distributed import World
from engine.evaluate import COLUMNS, evaluate
from engine.ledger import Ledger, Measured
from engine.reporter import Reporter
from engine.stopping import Interrupted, Stop
from tests.conftest import write_checkpoint
from tests.processes import together
from tests.test_survival import launched

ATTACKS = list(COLUMNS)
DIGITS: dict[str, Any] = {"dataset": "digits", "limit": 12, "batch_size": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("network") / "at.pt", 1, 10)


def evaluate_here(world: World, checkpoint: str, out: str) -> None:
    """Every process keeps a copy of what was measured, and writes what it was told of all."""
    report = evaluation.run(
        Path(checkpoint), ATTACKS, Reporter(), out=Path(out), world=world, device="cpu", **DIGITS
    )
    (Path(out).parent / f"result-{world.rank}.json").write_text(json.dumps(report.results))


def measured(folder: Path) -> dict[str, dict[int, tuple[int, float]]]:
    """By attack and batch, what any process found; every batch must be there once."""
    lines = [json.loads(line) for path in folder.glob("process-*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == len({(line["attack"], line["batch"]) for line in lines}) == len(ATTACKS) * 3
    return {
        attack: {line["batch"]: (line["correct"], line["excess"]) for line in lines if line["attack"] == attack}
        for attack in ATTACKS
    }


def test_the_numbers_do_not_depend_on_the_number_of_processes(checkpoint: Path, tmp_path: Path) -> None:
    """To the last bit of how far each batch's farthest image lies from its origin: the noise is the same."""
    found = {}
    for size in (1, 2):
        root = tmp_path / str(size)
        root.mkdir()
        together(size, evaluate_here, str(checkpoint), str(root / "report.json"))
        found[size] = measured(root / "report.partial")
        results = [json.loads((root / f"result-{rank}.json").read_text()) for rank in range(size)]
        assert all(result == results[0] for result in results)
        for attack, result in results[0].items():
            assert result["n"] == 12
            assert result["correct"] == sum(correct for correct, _ in found[size][attack].values())
    assert found[1] == found[2]


def test_an_evaluation_that_was_killed_goes_on_with_another_number_of_processes(
    checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copy(checkpoint, tmp_path / "at.pt")
    arguments = ["eval", str(tmp_path / "at.pt"), "--attacks", "natural,pgd20,cw,aa", "--dataset", "digits"]
    arguments += ["--limit", "12", "--batch-size", "4", "--device", "cpu"]
    partial, report = tmp_path / "at.eval.partial", tmp_path / "at.eval.json"

    def entries() -> list[dict[str, Any]]:
        lines = [line for path in partial.glob("*.jsonl") for line in path.read_text().splitlines()]
        return [json.loads(line) for line in lines]

    with launched(arguments, tmp_path) as running:
        while len(entries()) < 5:
            assert running.process.poll() is None, running.process.communicate()
        for process in (running.process.pid, *running.workers()):
            os.kill(process, signal.SIGKILL)
        running.process.communicate()
    before = entries()
    assert 5 <= len(before) < 4 * 3
    # What is remembered is taken: a time that no batch has shows it.
    victim = next(iter(partial.glob("*.jsonl")))
    lines = victim.read_text().splitlines()
    marked = json.loads(lines[0]) | {"seconds": 1e6}
    victim.write_text("\n".join([json.dumps(marked), *lines[1:]]) + '\n{"identity": "torn')
    with launched(arguments, tmp_path, 1) as running:
        code, printed = running.ends()
    assert code == 0, printed
    assert not partial.exists()
    results = json.loads(report.read_text())["results"]
    assert results[marked["attack"]]["seconds"] > 1e6
    whole = evaluation.run(checkpoint, list(results), Reporter(), device="cpu", **DIGITS)
    for attack, result in results.items():
        assert (result["correct"], result["n"]) == (whole.results[attack]["correct"], 12)


def test_a_ledger_of_other_numbers_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    ledger = Ledger(tmp_path / "partial", "these")
    ledger.add("pgd20", 3, Measured(5, -0.25, 1.5))
    assert ledger.known("pgd20") == {3: Measured(5, -0.25, 1.5)}
    assert ledger.known("cw") == {}
    assert Ledger(tmp_path / "partial", "those").known("pgd20") == {}


def test_what_follows_half_a_line_is_kept(tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    ledger = Ledger(tmp_path / "partial", "these")
    ledger.add("pgd20", 0, Measured(1, 0.0, 1.0))
    with (tmp_path / "partial" / "process-0.jsonl").open("a") as file:
        file.write('{"identity": "th')
    ledger.add("pgd20", 1, Measured(2, 0.0, 1.0))
    assert ledger.known("pgd20") == {0: Measured(1, 0.0, 1.0), 1: Measured(2, 0.0, 1.0)}


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
