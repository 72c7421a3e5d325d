"""Checkpoints: everything that a resumed run needs to go on as if it had not stopped.

Random numbers are pure functions of (seed, epoch, sample) and the learning rate is one of the epoch, so
progress is all there is to remember of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, StringConstraints
from torch import Tensor, nn

from engine.common.lookup import check_known
from engine.common.tensor_files import read_tensors, short_repr, tensor_fault, write_tensors
from engine.config import RunConfig
from engine.models.weights import FORMAT, Part, Record, check_own, made_by
from engine.pipelines.selection import PIPELINE_KINDS
from engine.training.learner import Learner
from engine.training.telemetry import SIX_TERMS, Totals, totals_of
from engine.training.weights import optimizer

Natural = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """{} before the first epoch; else what a run reads of it must be there."""
    wanted = {"epoch": int, "natural_accuracy": float, "robust_accuracy": float}
    if row and not all(isinstance(row.get(key), kind) for key, kind in wanted.items()):
        raise ValueError(f"a row of an epoch has {', '.join(wanted)}")
    return row


def _totals(totals: dict[str, float]) -> dict[str, float]:
    if totals and not set(totals_of(())) <= set(totals):
        raise ValueError("they are not the sums of this version")
    return totals


def _kind(kind: str) -> str:
    check_known("pipeline", kind, PIPELINE_KINDS)
    return kind


EpochRow = Annotated[dict[str, JsonValue], AfterValidator(_row)]


class Progress(Part):
    """Progress of a run.

    epoch and step_in_epoch name the next batch; step counts all batches so far. Where step_in_epoch equals the
    number of steps of an epoch, the epoch is trained and its evaluation is due.
    totals: telemetry of this epoch, read so far. best and last: epoch rows, {} before the first.
    rows_size: length of metrics.jsonl that belongs to this state. rolled_back: the rows of the event "rollback",
    by whose number the attack has more steps.
    """

    epoch: Natural = 0
    step_in_epoch: Natural = 0
    step: Natural = 0
    totals: Annotated[Totals, AfterValidator(_totals)] = Field(default_factory=dict)
    best: EpochRow = Field(default_factory=dict)
    last: EpochRow = Field(default_factory=dict)
    rows_size: Natural = 0
    rolled_back: list[EpochRow] = Field(default_factory=list)


_LATER = ("rolled_back",)  # files of before have no such key


def _whole(value: object) -> object:
    """In a file nothing may be left out."""
    wanted = [key for key in Progress.model_fields if key not in _LATER]
    if isinstance(value, dict) and (missing := [key for key in wanted if key not in value]):
        raise ValueError(f"its {missing[0]!r} is missing")
    return value


class BestCheckpoint(Record):
    """Contents of best.pt."""

    progress: Annotated[Progress, BeforeValidator(_whole)]
    metrics: EpochRow


class TelemetryState(Part):
    """Sums of steps that no row tells of yet."""

    sums: Tensor
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    terms: list[str] = Field(default_factory=lambda: list(SIX_TERMS))


class ParamGroup(Part):
    """Parameters that are optimized alike; all else that the optimizer keeps of them is in the configuration."""

    lr: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class OptimizerState(Part):
    """State of the optimizer."""

    state: dict[int, dict[str, Tensor | None]]
    param_groups: Annotated[list[ParamGroup], Field(min_length=1)]


class LastCheckpoint(BestCheckpoint):
    """Contents of last.pt."""

    optimizer: OptimizerState
    scaler: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    micro_batch: Annotated[int, Field(ge=1)] | None
    averaged: dict[str, Tensor] | None = None
    factors: dict[str, Tensor] | None = None
    telemetry: TelemetryState
    pipeline: Annotated[str, AfterValidator(_kind)]
    data_sha256: Sha256
    teachers_sha256: dict[str, Sha256]
    init_sha256: Sha256 | None = None


def student_part(student: nn.Module, config: RunConfig, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Contents of every checkpoint: the weights under `student`, and what is needed to build the network."""
    return {
        "format": FORMAT,
        "model": {"name": config.model, "num_classes": len(class_names), "normalize": config.normalize},
        "dataset": config.dataset,
        "class_names": list(class_names),
        "config": config.tree(),
        "made_by": made_by(),
        "student": student.state_dict(),
    }


def content(part: dict[str, Any], progress: Progress, **parts: object) -> dict[str, Any]:
    """Contents of a file. part: see `student_part`; parts: further state, such as optimizer and scaler."""
    return part | {"progress": progress.model_dump(), "metrics": progress.last} | parts


class Saver:
    """Writes checkpoints beside the training, one after the other, each atomically.

    A context: at its end everything is written. What goes wrong in writing is raised by the next call.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None

    def save(self, *files: tuple[Path, dict[str, Any]]) -> None:
        """Copy the contents to the host's memory, and have them written in that order; returns before they are.

        Waits only for what the call before gave.
        """
        self.wait()
        copies = [(path, _copy(content)) for path, content in files]

        def write() -> None:
            for path, content in copies:
                write_tensors(path, content)

        self._writing = self._thread.submit(write)

    def wait(self) -> None:
        """Return when everything is written. Raises OSError where it could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except OSError:
            if kind is None:  # else what happened before is told
                raise
        finally:
            self._thread.shutdown()


def _copy(value: Any) -> Any:
    """Nested values with their tensors copied to the host's memory."""
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(inner) for inner in value)
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def read(path: Path, kind: type[BestCheckpoint] = LastCheckpoint) -> dict[str, Any]:
    """Read last.pt, or the best.pt, of a run. Raises ValueError, one line, where it is damaged or is none."""
    try:
        content = read_tensors(path)
        if not isinstance(content.value, dict) or "format" not in content.value:
            raise ValueError(f"{path}: is no checkpoint of a run: it has no key 'format'")
        check_own(path, content, kind)
    except ValueError as error:
        raise ValueError(f"--resume: {error}") from None
    value: dict[str, Any] = content.value
    return value


def check_fit(path: Path, saved: Mapping[str, Any], learner: Learner, steps_per_epoch: int) -> None:
    """Raise ValueError, one line naming file and key, where a checkpoint's state is not of this very training."""
    try:
        progress = Progress(**saved["progress"])
        if progress.step_in_epoch > steps_per_epoch or (
            progress.step != progress.epoch * steps_per_epoch + progress.step_in_epoch
        ):
            raise ValueError(
                f"the key 'progress' holds step {progress.step}, epoch {progress.epoch} and "
                f"{progress.step_in_epoch} steps in it, and an epoch has {steps_per_epoch}"
            )
        if (progress.epoch > 0) != bool(progress.best) or bool(progress.best) != bool(progress.last):
            raise ValueError(f"the key 'progress' holds {progress.epoch} epochs, and no rows that fit them")
        _same("student", saved["student"], learner.student.state_dict())
        _optimizer_fits(saved["optimizer"], learner)
        if learner.average is not None:
            _same("averaged", saved.get("averaged") or {}, learner.average.state_dict())
        _telemetry_fits(saved, learner)
        if learner.keeps_factors:
            _same("factors", saved.get("factors") or {}, learner.factors.state_dict())
        scaler = learner.scaler.state_dict()
        if saved["scaler"] and scaler and set(saved["scaler"]) != set(scaler):
            raise ValueError(
                f"the key 'scaler' holds {short_repr(list(saved['scaler']))}, and not {', '.join(scaler)}"
            )
    except ValueError as error:
        raise ValueError(f"--resume: {path}: {error}") from None


def _telemetry_fits(saved: Mapping[str, Any], learner: Learner) -> None:
    """The sums are of terms of this method, or of those that earlier checkpoints have sums of."""
    terms = saved["telemetry"].get("terms", SIX_TERMS)
    known = {*SIX_TERMS, *(name for phase in learner.method.phases for name in phase.term_names)}
    if unknown := [name for name in terms if name not in known]:
        raise ValueError(f"the key 'telemetry.terms' holds {short_repr(unknown)}")
    if unknown := [name for name in saved["progress"]["totals"] if name not in totals_of(tuple(known))]:
        raise ValueError(f"the key 'progress.totals' holds {short_repr(unknown)}")
    sums, count = saved["telemetry"]["sums"], len(totals_of(terms)) - 1
    if tensor_fault(sums) or sums.dim() != 2 or not len(sums) or sums.shape[1] != count:
        raise ValueError(f"the key 'telemetry.sums' holds no table of {count} sums")


def load_best(path: Path, network: nn.Module, epoch: object) -> None:
    """Give the network the weights of best.pt. Raises ValueError, one line, where that is not of this epoch."""
    saved = read(path, BestCheckpoint)
    try:
        if saved["metrics"].get("epoch") != epoch:
            raise ValueError(f"is of epoch {short_repr(saved['metrics'].get('epoch'))}, and the best is {epoch}")
        _same("student", saved["student"], network.state_dict())
    except ValueError as error:
        raise ValueError(f"--resume: {path}: {error}") from None
    network.load_state_dict(saved["student"])


def _same(where: str, state: Mapping[str, Tensor], expected: Mapping[str, Any]) -> None:
    """The names, shapes and formats are the expected ones, and the values finite numbers."""
    for key in [*expected, *state]:
        if key not in state or key not in expected:
            raise ValueError(
                f"the key {short_repr(f'{where}.{key}')} is {'missing' if key in expected else 'unknown'}"
            )
        _like(f"{where}.{key}", state[key], expected[key])


def _like(where: str, value: Tensor, expected: Tensor) -> None:
    if wrong := tensor_fault(value):
        raise ValueError(f"the key {short_repr(where)} holds {wrong}")
    if value.shape != expected.shape or value.dtype != expected.dtype:
        raise ValueError(
            f"the key {short_repr(where)} is of shape {tuple(value.shape)} and {value.dtype}, "
            f"and not {tuple(expected.shape)} and {expected.dtype}"
        )
    if not value.isfinite().all():
        raise ValueError(f"the key {short_repr(where)} holds values that are not finite")


def _optimizer_fits(saved: Mapping[str, Any], learner: Learner) -> None:
    groups = len(learner.optimizer.param_groups)
    if len(saved["param_groups"]) != groups:
        raise ValueError(f"the key 'optimizer.param_groups' holds {len(saved['param_groups'])}, and not {groups}")
    parameters = optimizer.parameters(learner.optimizer)
    for index, found in saved["state"].items():
        where = f"optimizer.state.{index}"
        expected = (
            optimizer.expected_state(parameters[index], learner.step.config)
            if 0 <= index < len(parameters)
            else {}
        )
        if not expected or set(found) != set(expected):
            raise ValueError(
                f"the key {where!r} holds {short_repr(list(found))}, and there are {len(parameters)} parameters"
            )
        for name, like in expected.items():
            if (value := found[name]) is not None:
                _like(f"{where}.{name}", value, like)
