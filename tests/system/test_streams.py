"""Lanes on a CPU: the same code, in order, and the same bits. What they do on a GPU: test_cuda_step.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.pipelines.base import Batch
from engine.runs import lifecycle
from engine.system.streams import Lanes

METHODS = ("st", "at", "trades", "ard", "akd2", "iad1", "iad1-down", "iad2")


@pytest.mark.parametrize("method", METHODS)
def test_lanes_give_the_bits_of_one_lane(method: str, tiny: Any, tmp_path: Path) -> None:
    states = []
    for lanes in ("on", "off"):
        keys = {"method": method, "epochs": 1, "loss": {"warmup": 0}, "eval": {"final": []}}
        run = lifecycle.train(tiny.config(**keys, lanes=lanes, out=str(tmp_path / lanes)))
        states.append(torch.load(run.path / "last.pt", weights_only=True))
    for part in ("student", "optimizer"):
        left, right = (flat(state[part]) for state in states)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)


def flat(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, dict):
        return {key: leaf for name, item in value.items() for key, leaf in flat(item, f"{path}.{name}").items()}
    return {path: value} if isinstance(value, torch.Tensor) else {}


def batches(made: list[int], count: int = 4) -> Any:
    for number in range(count):
        made.append(number)
        x = torch.full((1, 1, 1, 1), float(number))
        yield Batch(x, torch.zeros(1, dtype=torch.int64), torch.tensor([number]))


def test_on_a_cpu_no_batch_is_made_before_it_is_asked_for() -> None:
    made: list[int] = []
    taken = Lanes(torch.device("cpu")).prefetched(batches(made))
    for number, batch in enumerate(taken):
        assert int(batch.sample) == number
        assert made == list(range(number + 1))
    assert made == [0, 1, 2, 3]


def test_work_beside_runs_at_once() -> None:
    lanes, done = Lanes(torch.device("cpu")), []
    with lanes.teachers():
        done.append(1)
    assert done == [1]
    lanes.join()
