"""Measured cells: a training by the protocol, attacked, and its files.

`python -m bench.lib.accuracy.cells PROTOCOL SIZE RESULTS WORK DEVICE ROW SEED` makes one, in a process of its own;
with a teacher's section in the place of ROW, and "-" for SEED, a teacher. SIZE: one of `SIZES`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench.lib import machine
from bench.lib.accuracy import protocol as protocols
from bench.lib.accuracy.protocol import AccuracyProtocol, Cell
from engine import config
from engine.common.console import ConsoleReporter
from engine.common.files import regular_file, replacing, write_json
from engine.common.stopping import Interrupted, RunFailed
from engine.evaluation import evaluate_checkpoint
from engine.evaluation.evaluate_checkpoint import EvaluationConfig
from engine.models.weights import load_model, save_safetensors, weights_sha256
from engine.plugins.builtin_loggers.numbers_of import TIMINGS
from engine.runs.lifecycle import train
from engine.runs.run_directory import RunDir, first_fault

_Content = TypeVar("_Content", bound=BaseModel)

NO_SEED = "-"
SIZES = {False: "full", True: "quick"}
STOPPED = 130


class AttackAccuracy(BaseModel):
    """Images classified correctly under an attack.

    verdicts: a bit for each image, 1 where it is classified correctly, packed and in base64. images: digest of
    which images these are.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    n: int = Field(ge=1)
    correct: int = Field(ge=0)
    seconds: float = Field(ge=0, allow_inf_nan=False)
    images: str
    verdicts: str

    @property
    def share(self) -> float:
        """In [0, 1]."""
        return self.correct / self.n

    def bits(self) -> NDArray[np.bool_]:
        """Verdicts of the images, (n,)."""
        packed = np.frombuffer(base64.b64decode(self.verdicts, validate=True), np.uint8)
        return np.unpackbits(packed, count=self.n).astype(np.bool_)


class MeasuredCell(BaseModel):
    """Content of a cell's file.

    data: SHA-256 of the images. facts: hardware, versions, date and commit. weights: SHA-256 of those that were
    attacked, of the `epoch` that did best on held-out images. epoch_seconds: of the training of an epoch, the
    median; seconds: of all epochs. peak_memory: bytes.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    protocol: str
    row: str
    seed: int | None
    settings: str
    keys: dict[str, Any]
    teachers: dict[str, str]
    threads: int
    data: str
    facts: dict[str, Any]
    weights: str
    epoch: int
    epochs: int
    epoch_seconds: float = Field(ge=0, allow_inf_nan=False)
    seconds: float = Field(ge=0, allow_inf_nan=False)
    peak_memory: int | None
    accuracies: dict[str, AttackAccuracy]


def read_file(path: Path, kind: type[_Content]) -> _Content | None:
    """Content of a file of results, None where it is not there. Raises ValueError for a damaged one."""
    try:
        return kind.model_validate(json.loads(regular_file(path).read_bytes()))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ValueError(f"{path}: {first_fault(error)}; move it away") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


class ResultFolder:
    """Folder of a protocol's results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def cell(self, name: str) -> Path:
        """File of a cell."""
        return self.folder / "cells" / f"{name}.json"

    def log(self, name: str) -> Path:
        """Rows of its training, as in the run's metrics.jsonl."""
        return self.folder / "logs" / f"{name}.jsonl"

    def teacher(self, section: str) -> Path:
        """Weights of a teacher."""
        return self.folder / "teachers" / f"{section}.safetensors"

    @property
    def costs(self) -> Path:
        """File of the seconds that steps of all rows took in turn."""
        return self.folder / "costs.json"

    def again(self, name: str, number: int) -> Path:
        """File on a cell that was measured once more."""
        return self.folder / "again" / f"{name}-{number}.json"

    def read(self, name: str) -> MeasuredCell | None:
        """The cell of that name, None where it is not measured. Raises ValueError for a damaged file."""
        path = self.cell(name)
        found = read_file(path, MeasuredCell)
        try:
            for attack, accuracy in found.accuracies.items() if found else ():
                if accuracy.bits().sum() != accuracy.correct:
                    raise ValueError(f"{attack}: verdicts and their number differ")
        except ValueError as error:
            raise ValueError(f"{path}: {error}; move it away") from None
        return found

    def data(self) -> dict[str, str]:
        """SHA-256 of the images of each cell and teacher that is measured, by name."""
        names = [path.stem for path in sorted((self.folder / "cells").glob("*.json"))]
        return {name: cell.data for name in names if (cell := self.read(name)) is not None}

    def measured(self, cell: Cell) -> MeasuredCell | None:
        """The cell as it was measured, None where it was not, or not under all attacks.

        Raises ValueError where the file is of other settings.
        """
        found = self.read(cell.name)
        if found is None:
            return None
        if differing := _differing(found, cell):
            raise ValueError(
                f"{self.cell(cell.name)} is of other settings, which differ in {', '.join(differing)}; "
                "move it away to measure it anew"
            )
        return found if _has(found, cell.attacks) else None

    def teachers(self, sections: Sequence[str]) -> dict[str, str]:
        """SHA-256 of the weights of the teachers that are there, by section."""
        paths = {section: self.teacher(section) for section in sections}
        return {
            section: weights_sha256(load_model(path).module) for section, path in paths.items() if path.exists()
        }


def _has(found: MeasuredCell, attacks: Mapping[str, int]) -> bool:
    return all(name in found.accuracies and found.accuracies[name].n >= n for name, n in attacks.items())


def _differing(found: MeasuredCell, cell: Cell) -> list[str]:
    """Names of the settings that differ."""
    before, now = config.flat(protocols.completed_keys(found.keys)), config.flat(dict(cell.keys))
    names = [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]
    names += [name for name in ("teachers", "threads") if getattr(found, name) != getattr(cell, name)]
    return names


def differences(before: tuple[MeasuredCell, Path], after: tuple[MeasuredCell, Path]) -> list[str]:
    """Parts in which two measurements of a cell, each with its log, differ: not seconds and memory."""
    (old, old_log), (new, new_log) = before, after
    parts = [name for name in ("data", "weights", "epoch") if getattr(old, name) != getattr(new, name)]
    for name in dict.fromkeys((*old.accuracies, *new.accuracies)):
        found = [cell.accuracies.get(name) for cell in (old, new)]
        verdicts = [one and (one.n, one.images, one.verdicts) for one in found]
        if verdicts[0] != verdicts[1]:
            parts.append(name)
    return parts + ["log"] * (_numbers(old_log) != _numbers(new_log))


def _numbers(log: Path) -> list[dict[str, Any]]:
    """Rows of a log without what depends on the machine's speed and memory."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def measure(
    protocol: AccuracyProtocol, cell: Cell, results: ResultFolder, work: Path, device: torch.device
) -> MeasuredCell:
    """Train a cell, or go on with it, attack it, and write its files. work: folder for what is not kept."""
    teachers = {section: {"checkpoint": str(results.teacher(section))} for section in cell.teachers}
    wanted = protocol.config_of(cell.row, cell.seed).tree() | {"device": str(device)}
    run = work / f"{cell.name}-{cell.settings}"
    measured = _trained(
        config.load(wanted, teachers, {"out": str(run)}), cell.attacks, cell.evaluation_seed, results,
        protocol=protocol.name, row=cell.row, seed=cell.seed, settings=cell.settings, keys=dict(cell.keys),
        teachers=dict(cell.teachers), threads=cell.threads,
    )  # fmt: skip
    _write(results, cell.name, measured, RunDir(run))
    return measured


def measure_teacher(
    protocol: AccuracyProtocol, section: str, results: ResultFolder, work: Path, device: torch.device
) -> MeasuredCell:
    """Train a teacher of the protocol, attack it as the first table's rows, and keep its weights."""
    wanted = protocol.teacher_config(section)
    keys = protocols.chosen_keys(wanted)
    settings = protocols.digest(keys, {}, protocol.threads)
    run = work / f"{section}-{settings}"
    attacks = next(iter(protocol.tables.values())).attacks
    measured = _trained(
        config.load(wanted.tree(), {"device": str(device), "out": str(run)}), attacks, protocol.evaluation_seed,
        results, protocol=protocol.name, row=section, seed=None, settings=settings, keys=keys, teachers={},
        threads=protocol.threads,
    )  # fmt: skip
    _write(results, section, measured, RunDir(run))
    path = results.teacher(section)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        save_safetensors(load_model(RunDir(run).best), beside)
    return measured


def _trained(
    wanted: config.RunConfig, attacks: Mapping[str, int], attack_seed: int, results: ResultFolder, **told: Any
) -> MeasuredCell:
    """Figures of the best epoch's student. Raises ValueError where other cells have other images."""
    console = ConsoleReporter()
    run = RunDir(train(wanted, console, again=True).path)
    data = run.sessions()[-1]["data"]["sha256"]
    for name, other in results.data().items():
        if other != data:
            raise ValueError(f"data: the images are not those of {results.cell(name)}, which cannot be compared")
    rows = [row for row in run.rows() if row["event"] == "epoch"]
    summary = run.read_summary()
    assert summary is not None
    accuracies = {name: _attacked(run.best, name, images, attack_seed, wanted) for name, images in attacks.items()}
    peaks = [row["peak_memory"] for row in rows if row.get("peak_memory") is not None]
    return MeasuredCell(
        **told,
        data=data,
        facts=dict(machine.facts(torch.device(wanted.device))),
        weights=weights_sha256(load_model(run.best).module),
        epoch=summary["best"]["epoch"],
        epochs=wanted.epochs,
        epoch_seconds=statistics.median(row["seconds"] for row in rows),
        seconds=math.fsum(row["seconds"] for row in rows),
        peak_memory=max(peaks) if peaks else None,
        accuracies=accuracies,
    )


def _attacked(checkpoint: Path, attack: str, images: int, seed: int, wanted: config.RunConfig) -> AttackAccuracy:
    """Accuracy under an attack; goes on where it was stopped."""
    chosen = EvaluationConfig(
        [attack], limit=images, limit_aa=images, data=wanted.data, seed=seed, device=wanted.device
    )
    path = checkpoint.with_name(f"{checkpoint.name}.eval.json")
    found = evaluate_checkpoint.run(checkpoint, chosen, ConsoleReporter(), out=path).results[attack]
    verdicts = np.array([digit == "1" for digit in found["images"]["correct"]], np.bool_)
    if len(verdicts) != images:
        raise ValueError(f"attacks.{attack}: {images} test images are wanted, and there are {len(verdicts)}")
    return AttackAccuracy(
        n=found["n"],
        correct=found["correct"],
        seconds=found["seconds"],
        images=hashlib.sha256(json.dumps(found["images"]["samples"]).encode()).hexdigest()[:12],
        verdicts=base64.b64encode(np.packbits(verdicts).tobytes()).decode(),
    )


def _write(results: ResultFolder, name: str, measured: MeasuredCell, run: RunDir) -> None:
    """Write the log, then the cell, which says that all is there."""
    for path in (results.log(name), results.cell(name)):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(results.log(name)) as beside:
        beside.write_text("".join(json.dumps(row) + "\n" for row in run.rows()), encoding="utf-8")
    write_json(results.cell(name), measured.model_dump())


def main(arguments: Sequence[str]) -> int:
    """Measure a cell, or a teacher."""
    name, size, folder, work, device_name, row, seed = arguments
    protocol, results = protocols.read(name, quick=size == SIZES[True]), ResultFolder(Path(folder))
    device = machine.device(device_name)
    if device.type == "cpu":
        torch.set_num_threads(protocol.threads)
    try:
        if seed == NO_SEED:
            measure_teacher(protocol, row, results, Path(work), device)
        else:
            cell = protocols.cell_of(protocol, row, int(seed), results.teachers(list(protocol.teachers)))
            measure(protocol, cell, results, Path(work), device)
    except Interrupted:
        return STOPPED
    except (ValueError, RunFailed) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
