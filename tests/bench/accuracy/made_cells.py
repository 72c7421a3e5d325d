"""Made-up cells of a protocol, with verdicts of images by a model of rows, seeds and images."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.lib.accuracy import protocol as protocols
from bench.lib.accuracy.cells import AttackAccuracy, MeasuredCell, ResultFolder
from bench.lib.accuracy.protocol import AccuracyProtocol
from engine.common.files import write_json

FACTS = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "device": "cpu", "processor": "P", "cores": 2,
    "threads": 1, "python": "3.11.7", "torch": "2.14.1", "triton": "",
}  # fmt: skip
TEACHERS = {"teacher": "t" * 64, "teacher_st": "s" * 64}
HARDNESS = {"natural": 0.9, "pgd20": -0.2, "aa": -0.5}


def accuracy(verdicts: NDArray[np.bool_], images: str = "aaaaaaaaaaaa") -> AttackAccuracy:
    """The record of verdicts."""
    packed = base64.b64encode(np.packbits(verdicts).tobytes()).decode()
    return AttackAccuracy(
        n=len(verdicts), correct=int(verdicts.sum()), seconds=1.5, images=images, verdicts=packed
    )


def made(row_effect: float, seed: int, attack: str, n: int, noise: int) -> AttackAccuracy:
    """Verdicts by the difficulty of each image, the row, the seed, and chance."""
    difficulty = np.random.default_rng(1).normal(size=10_000)[:n]
    chance = np.random.default_rng([noise, seed, n]).normal(size=n)
    seeds = 0.02 * np.random.default_rng(seed).normal() + 0.01 * np.random.default_rng([noise, seed]).normal()
    return accuracy(HARDNESS.get(attack, 0.0) + row_effect + seeds > 0.9 * difficulty + 0.4 * chance)


def fill(
    protocol: AccuracyProtocol,
    results: ResultFolder,
    seeds: Callable[[str], tuple[int, ...]] | None = None,
    **changes: Any,
) -> None:
    """Write teachers and cells. seeds: those of a row, all if None. changes: of each cell."""
    for section, weights in TEACHERS.items():
        if section in protocol.teachers:
            keys = protocols.chosen_keys(protocol.teacher_config(section))
            attacks = next(iter(protocol.tables.values())).attacks
            _write(results, section, attacks, 0.2, 0, {
                "protocol": protocol.name, "row": section, "seed": None, "settings": "x", "keys": keys,
                "teachers": {}, "threads": protocol.threads, "weights": weights, "epochs": 16,
            } | changes)  # fmt: skip
    rows = list(protocol.rows())
    for cell in protocols.cells(protocol, TEACHERS):
        if seeds is not None and cell.seed not in seeds(cell.row):
            continue
        number = rows.index(cell.row)
        _write(results, cell.name, cell.attacks, 0.03 * (number % 5), number, {
            "protocol": protocol.name, "row": cell.row, "seed": cell.seed, "settings": cell.settings,
            "keys": dict(cell.keys), "teachers": dict(cell.teachers), "threads": cell.threads, "weights": "w" * 64,
            "epochs": 8, "epoch_seconds": 40.0 + 3 * number + cell.seed,
            "peak_memory": (700 + 20 * number) * 2**20,
        } | changes)  # fmt: skip


def _write(
    results: ResultFolder, name: str, attacks: Mapping[str, int], effect: float, number: int, told: dict[str, Any]
) -> None:
    seed = told["seed"] or 0
    usual = {
        "facts": FACTS,
        "data": "d" * 64,
        "epoch": 7,
        "epoch_seconds": 30.0,
        "seconds": 400.0,
        "peak_memory": 2**30,
    }
    accuracies = {attack: made(effect, seed, attack, n, number) for attack, n in attacks.items()}
    path = results.cell(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {**usual, **told, "accuracies": accuracies}
    write_json(path, MeasuredCell(**given).model_dump())
