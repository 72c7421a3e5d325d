"""Runs and reports as they stand on the disk, checked, and as a page compares them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from engine.attacks import table
from engine.attacks.autoattack import NO_ATTACK
from engine.attacks.pgd import NORMS
from engine.common.files import regular_file
from engine.config import RunConfig, load, read_file
from engine.evaluation.reports import SUFFIX, Entry, checkpoint_of
from engine.evaluation.reports import read as read_report
from engine.evaluation.statistics.intervals import wilson
from engine.runs.reporting.tables import Percent
from engine.runs.run_directory import RunDir, first_fault

_Share = Annotated[float, Field(ge=0, le=1)]
TEACHER_FOLDERS = {"teacher": "teacher", "teacher_st": "standard teacher"}
"""Folders of teachers in the run directory of their student, and what they are called."""


class _EpochRow(BaseModel):
    """Keys that are read of an epoch's row."""

    epoch: Annotated[int, Field(ge=1)]
    phase: str = ""
    loss: float | None = None
    alpha: float | None = None
    lr: float | None = None
    seconds: Annotated[float | None, Field(ge=0)] = None
    images_per_second: Annotated[float | None, Field(ge=0)] = None
    peak_memory: Annotated[int | None, Field(ge=0)] = None
    natural_accuracy: _Share | None = None
    robust_accuracy: _Share | None = None
    measured_on: str = ""
    measured_n: Annotated[int | None, Field(ge=1)] = None
    train_student_adversarial_accuracy: _Share | None = None
    probe_student_adversarial_accuracy: _Share | None = None
    probe_teacher_natural_accuracy: _Share | None = None
    probe_teacher_adversarial_accuracy: _Share | None = None
    probe_alpha_histogram: list[_Share] | None = None
    probe_cases: dict[str, _Share] | None = None


class _Accuracy(BaseModel):
    """Keys that are read of a result."""

    accuracy: _Share
    n: Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class AccuracyMeasure:
    """All that two accuracies must have in common to be compared.

    data: data set and size of its images, in words. on: which of its images. n: None where a run has not recorded
    it. ball: of the attack, in words; empty without one.
    """

    attack: str
    title: str
    data: str
    on: str
    n: int | None
    ball: str

    @property
    def text(self) -> str:
        """All of it, of one line."""
        return ", ".join(filter(None, (f"{self.title} on {self.data} {self.on}", *self.numbers)))

    @property
    def numbers(self) -> tuple[str, str]:
        """N and the ball."""
        return "n not recorded" if self.n is None else f"n = {self.n:,}", self.ball

    @property
    def is_attack(self) -> bool:
        """False for the accuracy on images as they are."""
        return self.attack != NO_ATTACK


@dataclass(frozen=True)
class MeasuredAccuracy:
    """An accuracy in [0, 1], by its measure. ball: epsilon and threat model, where they are told."""

    measure: AccuracyMeasure
    accuracy: float
    ball: tuple[float, str] | None = None

    @property
    def percent(self) -> Percent:
        """The accuracy with its interval (Wilson), where n is known."""
        if self.measure.n is None:
            return Percent(self.accuracy)
        return Percent(self.accuracy, *interval(self.accuracy, self.measure.n))


@dataclass(frozen=True)
class EvalFile:
    """A .eval.json. earlier: numbers of the results that are of an earlier content of the checkpoint."""

    path: Path
    entries: Sequence[Entry]
    earlier: frozenset[int]


class RunFiles:
    """Content of a run directory. Raises ValueError, one line naming the file, where it is damaged.

    role: "" of a run that was asked for, else what it is to its student.
    """

    def __init__(self, path: Path, role: str = "") -> None:
        self.path, self.role = path, role
        self.run = RunDir(path)
        self.config = _config(self.run.config)
        self.summary = self.run.read_summary()
        rows = list(self.run.rows())
        self.epochs = [row for row in rows if row.get("event") == "epoch"]
        self.rolled_back = [row for row in rows if row.get("event") == "rollback"]
        _check_rows(self.run.metrics, self.epochs)
        _check_summary(self.run.summary, self.summary or {})
        self.sessions = self.run.sessions()
        self.evaluations = [eval_file(file) for file in sorted(path.glob(f"*{SUFFIX}"))]

    @property
    def is_finished(self) -> bool:
        """True if there is a summary."""
        return self.summary is not None

    @cached_property
    def best(self) -> Mapping[str, Any]:
        """The row of the best epoch; empty where it is not known."""
        found: Mapping[str, Any] = self.summary["best"] if self.summary else {}
        return found

    @property
    def selected_on(self) -> str:
        """The images by which the best epoch was chosen."""
        return str(self.summary["selected_on"]) if self.summary else ""

    @property
    def ball(self) -> tuple[float, str]:
        """Epsilon and threat model of the training, and of every evaluation unless it says otherwise."""
        return self.config.attack.epsilon, self.config.attack.threat_model

    @property
    def data_sha256(self) -> str:
        """Hash of the data of the last session; empty where it is not told."""
        data = self.sessions[-1].get("data") if self.sessions else None
        return str(data.get("sha256", "")) if isinstance(data, dict) else ""

    @property
    def data(self) -> str:
        """Data set and size of its images, in words."""
        config = self.config
        return data_in_words(config.dataset, config.data, config.image_size)

    @cached_property
    def held_out(self) -> list[MeasuredAccuracy]:
        """Accuracies of the best epoch by which it was chosen."""
        row, found = self.best, []
        for attack, key in ((NO_ATTACK, "natural_accuracy"), (self.config.eval.attack, "robust_accuracy")):
            if key in row:
                n = row.get("measured_n")
                images = f"{row['measured_on']} images"
                found.append(measured(attack, {"accuracy": row[key]}, n, self.ball, self.data, images))
        return found

    @cached_property
    def tested(self) -> list[MeasuredAccuracy]:
        """Accuracies of the best epoch's network on test images: of the summary, then of evaluations.

        Of one measure the lowest, see `lowest`.
        """
        results = (self.summary or {}).get("test_of_best") or {}
        found = [measured(name, result, result["n"], self.ball, self.data) for name, result in results.items()]
        for file in self.evaluations:
            if file.path.name == self.run.best.name + SUFFIX:
                found += of_entries(file, self.config, self.data)
        return lowest(found)


def lowest(found: Iterable[MeasuredAccuracy]) -> list[MeasuredAccuracy]:
    """Lowest accuracy of every measure, where it was taken several times: with other seeds of the attack, say."""
    kept: dict[AccuracyMeasure, MeasuredAccuracy] = {}
    for each in found:
        known = kept.get(each.measure)
        if known is None or each.accuracy < known.accuracy:
            kept[each.measure] = each
    return list(kept.values())


def interval(accuracy: float, n: int) -> tuple[float, float]:
    """Interval of a share of n images."""
    return wilson(round(accuracy * n), n)


def measured(
    attack: str,
    result: Mapping[str, Any],
    n: int | None,
    ball: tuple[float, str] | None,
    data: str,
    on: str = "test images",
) -> MeasuredAccuracy:
    """The accuracy of a result."""
    ball = None if attack == NO_ATTACK else ball
    told = "" if attack == NO_ATTACK else "epsilon not told"
    if ball is not None:
        norm = NORMS[ball[1]]
        told = f"{norm.name} epsilon {norm.length(ball[0])}"
    return MeasuredAccuracy(
        AccuracyMeasure(attack, title_of(attack, result), data, on, n, told), float(result["accuracy"]), ball
    )


def data_in_words(dataset: str, folder: object, image_size: object) -> str:
    """Name of a data set, of a folder with its place, and the size of the images where one is given."""
    place = f" {folder}" if dataset == "folder" and folder is not None else ""
    return f"{dataset}{place}{'' if image_size is None else f', {image_size} pixels'}"


def title_of(attack: str, result: Mapping[str, Any]) -> str:
    """Title of an attack's result; the name of an attack that is not known here."""
    try:
        parts = result.get("parts")
        return table.title(attack, result) if isinstance(parts, Mapping) and parts else table.find(attack).title
    except ValueError:
        return attack


def of_entries(file: EvalFile, config: RunConfig | None = None, data: str = "") -> Iterator[MeasuredAccuracy]:
    """Accuracies of the checkpoint as it is now, with the network, weights and image size that it has by itself.

    config, data: of its run; then results on other data are left out, too.
    """
    for number, entry in enumerate(file.entries):
        if number not in file.earlier and entry["n"] > 0 and not _is_of_other_settings(entry, config):
            yield measured(
                entry["attack"], entry, entry["n"], _ball(entry.get("parameters")), data or _data(entry)
            )


def _is_of_other_settings(entry: Entry, config: RunConfig | None) -> bool:
    options = entry["options"] if isinstance(entry.get("options"), dict) else {}
    if any(options.get(key) is not None for key in ("weights", "normalize", "model", "image_size")):
        return True
    data = entry["data"].get("name") if isinstance(entry.get("data"), dict) else None
    if config is None or data is None:
        return False
    return bool(data != config.dataset or (data == "folder" and options.get("data") not in (None, config.data)))


def _data(entry: Entry) -> str:
    """Data of a result, as far as it tells."""
    data, options = (entry[key] if isinstance(entry.get(key), dict) else {} for key in ("data", "options"))
    return data_in_words(str(data.get("name", "data not told")), options.get("data"), options.get("image_size"))


def _ball(parameters: object) -> tuple[float, str] | None:
    """Epsilon and threat model of an entry, where it tells them."""
    if not isinstance(parameters, dict):
        return None
    epsilon, threat_model = parameters.get("epsilon"), parameters.get("threat_model")
    if not isinstance(epsilon, int | float) or not math.isfinite(epsilon) or threat_model not in NORMS:
        return None
    return float(epsilon), threat_model


def eval_file(path: Path) -> EvalFile:
    """A report of evaluations. Raises ValueError where it is damaged or not there."""
    if not path.is_file():
        raise ValueError(f"cannot read {path}: it is no file")
    entries = read_report(path)
    hashes = [checkpoint_of(entry) for entry in entries]
    if len(set(hashes)) < 2:
        return EvalFile(path, entries, frozenset())
    checkpoint = path.with_name(path.name.removesuffix(SUFFIX))
    newest = max(range(len(entries)), key=lambda number: str(entries[number].get("started", "")))
    now = hashlib.sha256(content_of(checkpoint)).hexdigest() if checkpoint.is_file() else hashes[newest]
    return EvalFile(path, entries, frozenset(number for number, each in enumerate(hashes) if each != now))


def content_of(file: Path) -> bytes:
    """A file's content. Raises ValueError where it cannot be read."""
    try:
        return regular_file(file).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from None


def _config(path: Path) -> RunConfig:
    tree = read_file(path)
    try:
        return load(tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where a row of an epoch holds what no run writes."""
    for number, row in enumerate(rows, 1):
        _check(path, f"row of epoch {number}", _EpochRow, row)


def _check_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Raise ValueError where an accuracy is no share, or of no image."""
    if "best" in summary:
        _check(path, "best", _EpochRow, summary["best"])
    for key in ("test_of_best", "test_of_last"):
        for attack, result in summary.get(key, {}).items():
            _check(path, f"{key}: {attack}", _Accuracy, result)


def _check(path: Path, place: str, shape: type[BaseModel], content: object) -> None:
    try:
        shape.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path} is damaged: {place}: {first_fault(error)}") from None
