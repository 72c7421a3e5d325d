from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine import config, methods, models
from engine.attacks import table
from engine.common import stopping
from engine.common.tensor_files import write_tensors
from engine.config import semantics
from engine.models.normalize import CONSTANTS
from engine.pipelines.datasets import DATASETS
from engine.plugins import imports
from engine.plugins.loggers import LOGGERS
from engine.plugins.origins import REGISTERED
from engine.runs import checkpoints, format_probe
from engine.system import precision
from tests.fake_cuda import cuda_library as cuda_library
from tests.fake_cuda import fake_cuda as fake_cuda

# Tests, and the commands they start, compute on tiny tensors: a second thread costs more than it gives.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

CLASSES = ("circle", "square", "triangle")


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("ENGINE_CACHE", str(tmp_path_factory.mktemp("cache")))


_REGISTERED: tuple[dict[str, Any] | dict[tuple[str, str], Any], ...] = (
    methods.METHODS, semantics._OTHERS, models.TABLE, CONSTANTS, DATASETS, table._added, LOGGERS, REGISTERED,
    imports._loaded,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_name_stays_registered() -> Iterator[None]:
    """Names that a test registers are gone after it."""
    before = [dict(each) for each in _REGISTERED]
    yield
    for each, entries in zip(_REGISTERED, before, strict=True):
        each.clear()
        each.update(entries)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """--amp chooses the same on every processor that runs the tests."""
    gains = {"float32": 1.0, "winograd": 1.0, "bfloat16": 2.0}
    monkeypatch.setattr(format_probe, "gains_of", lambda config: gains)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of three classes of 8x8 images, 14 for training and 6 for testing of each."""
    root = tmp_path_factory.mktemp("tiny")
    generator = np.random.default_rng(0)
    for split, count in (("train", 14), ("test", 6)):
        for index, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 120, (8, 8, 3), dtype=np.uint8)
                pixels[:, :, index] += 100
                Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    return root


def write_checkpoint(path: Path, seed: int, num_classes: int = len(CLASSES)) -> Path:
    """A checkpoint of an untrained resnet8."""
    torch.manual_seed(seed)
    names = (
        CLASSES if num_classes == len(CLASSES) else tuple(map(str, range(num_classes)))
    )  # tiny_folder's, or digits'
    part = checkpoints.student_part(
        models.build("resnet8", num_classes),
        config.load({"model": "resnet8", "dataset": "folder", "method": "at"}),
        names,
    )
    write_tensors(path, checkpoints.content(part, checkpoints.Progress()))
    return path


@dataclass(frozen=True)
class Tiny:
    """Files of a run that takes a fraction of a second."""

    folder: Path
    teacher: Path
    teacher_st: Path

    def config(self, **keys: Any) -> dict[str, Any]:
        """Nested keys of a run over 42 images in batches of 8: 6 steps an epoch, the last one of 2 images."""
        base: dict[str, Any] = {
            "dataset": "folder",
            "data": str(self.folder),
            "model": "resnet8",
            "epochs": 2,
            "batch_size": 8,
            "validation": 0,
            "device": "cpu",
            "log_every": 4,
            "attack": {"num_steps": 2},
            "loss": {"warmup": 1},
            "teacher": {"checkpoint": str(self.teacher)},
            "teacher_st": {"checkpoint": str(self.teacher_st)},
            "eval": {"final": ["natural", "pgd10"], "probe_size": 8},
        }
        return config.merge(base, keys)

    def flags(self, **keys: Any) -> list[str]:
        """The same as arguments of `engine train`."""

        def flatten(tree: dict[str, Any], prefix: str = "") -> list[str]:
            result = []
            for key, value in tree.items():
                if isinstance(value, dict):
                    result += flatten(value, f"{prefix}{key}.")
                else:
                    result += ["--set", f"{prefix}{key}={'null' if value is None else value}"]
            return result

        return ["train", *flatten(self.config(**keys))]


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("teachers")
    return Tiny(tiny_folder, write_checkpoint(root / "at.pt", 1), write_checkpoint(root / "st.pt", 2))


@pytest.fixture(scope="session")
def real_images() -> Path:
    """The folder of real images that $ENGINE_DATA names."""
    given = os.environ.get("ENGINE_DATA")
    if not given:
        pytest.skip("ENGINE_DATA names no folder of real images")
    return Path(given)


@pytest.fixture
def bf16() -> None:
    """Without it, bfloat16 on a CPU is emulated: many times slower, and rounded in other places."""
    if not precision.cpu_has_bfloat16():
        pytest.skip("this processor has no bfloat16 arithmetic")


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs `engine ARGUMENTS` in this process."""
    from engine.commands.cli import main

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr("sys.argv", ["engine", *arguments])
        handlers = {number: signal.getsignal(number) for number in stopping.SIGNALS}
        try:
            with pytest.raises(SystemExit) as leaving:
                main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return Outcome(int(leaving.value.code or 0), captured.out, captured.err)

    return run
