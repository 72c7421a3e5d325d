"""Several processes train as one: the same numbers, whatever their number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import config, methods, trainer
from engine.distributed import World
from engine.precision import Precision
from engine.reporter import Reporter
from tests.conftest import write_checkpoint
from tests.processes import together

F64 = Precision(torch.device("cpu"), torch.float64)


def run_of(method: str, data: dict[str, Any], teachers: Path, **keys: Any) -> dict[str, Any]:
    """Ten steps in float64: 35 images in batches of 8, the last of 3: of four processes one has none."""
    base = {
        "method": method, "model": "resnet8", "epochs": 2, "batch_size": 8, "limit_train": 35, "limit_test": 20,
        "validation": 0, "dtype": "float64", "device": "cpu", "sync_bn": "on", "log_every": 4,
        "attack": {"num_steps": 2}, "loss": {"warmup": 1},
        "teacher": {"checkpoint": str(teachers / "at.pt")}, "teacher_st": {"checkpoint": str(teachers / "st.pt")},
        "eval": {"attack": "fgsm", "final": ["natural", "fgsm"], "probe_size": 10, "batch_size": 4},
    }  # fmt: skip
    return config.merge(base, data, keys)


def train_each(world: World, runs: dict[str, dict[str, Any]]) -> None:
    for out, keys in runs.items():
        trainer.train(keys | {"out": out}, Reporter(), world=world)


def state(path: Path) -> dict[str, Tensor]:
    """Weights, running statistics, momentum."""
    saved = torch.load(path / "last.pt", weights_only=True)
    momentum = {f"momentum {key}": value["momentum_buffer"] for key, value in saved["optimizer"]["state"].items()}
    return {**saved["student"], **momentum}


def assert_near(left: dict[str, Tensor], right: dict[str, Tensor], within: float = 1e-9) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.allclose(right[name].double(), value.double(), rtol=within, atol=within), name


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def assert_same_trajectory(alone: Path, together: Path) -> None:
    assert_near(state(alone), state(together))
    left, right = rows(alone), rows(together)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds", "images_per_second", "share_of_peak"}:
            same = one[key] if isinstance(one[key], str) else pytest.approx(one[key], rel=1e-9, abs=1e-12)
            assert other[key] == same, key
    tested = [json.loads((path / "summary.json").read_text())["test_of_last"] for path in (alone, together)]
    assert tested[0].keys() == tested[1].keys()
    for name in tested[0]:
        assert tested[0][name]["correct"] == tested[1][name]["correct"]


@pytest.fixture(scope="module")
def ten_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    for seed, name in enumerate(("at", "st"), 1):
        write_checkpoint(root / f"{name}.pt", seed, 10)
    return root


def trajectories(data: dict[str, Any], teachers: Path, root: Path, names: tuple[str, ...], **keys: Any) -> None:
    """Runs of each method by 1, 2 and 4 processes."""
    for size in (1, 2, 4):
        runs = {str(root / f"{name}-{size}"): run_of(name, data, teachers, **keys) for name in names}
        together(size, train_each, runs)
    for name in names:
        for size in (2, 4):
            assert_same_trajectory(root / f"{name}-1", root / f"{name}-{size}")


def test_processes_train_as_one_on_digits(ten_classes: Path, tmp_path: Path) -> None:
    trajectories({"dataset": "digits"}, ten_classes, tmp_path, tuple(methods.TABLE))


def test_processes_train_as_one_on_photographs(real_images: Path, ten_classes: Path, tmp_path: Path) -> None:
    data = {"dataset": "cifar10", "data": str(real_images)}
    trajectories(data, ten_classes, tmp_path, ("iad2",))


@pytest.mark.slow
def test_processes_train_as_one_on_photographs_by_every_method(
    real_images: Path, ten_classes: Path, tmp_path: Path
) -> None:
    data = {"dataset": "cifar10", "data": str(real_images)}
    trajectories(data, ten_classes, tmp_path, tuple(methods.TABLE))
