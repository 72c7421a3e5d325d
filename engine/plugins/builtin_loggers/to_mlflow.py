"""Adapter of MLflow: a row is one batch of metrics at its step, and the number of rows a tag of the run."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.common import optional
from engine.plugins.builtin_loggers import numbers_of
from engine.plugins.builtin_loggers.run_facts import PROJECT, OpenedRun, Row, RunFacts, Status, flat

_BATCH = 100
_ROWS = "engine.rows"
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


class MlflowRun:
    """A run in the store of MLFLOW_TRACKING_URI."""

    def __init__(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._tracking: Any = optional.load(
            "mlflow.tracking", missing="loggers: mlflow cannot be imported: {reason}"
        )
        self._entities: Any = optional.load(
            "mlflow.entities", missing="loggers: mlflow cannot be imported: {reason}"
        )
        self._experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        self._client: Any = None
        self._id = ""

    def place(self, facts: RunFacts) -> str:
        store = re.sub(r"//[^/@]*@", "//", self._tracking.get_tracking_uri())  # without a password
        return f"{store}, experiment {os.environ.get('MLFLOW_EXPERIMENT_ID', self._experiment)}"

    def open(self, facts: RunFacts, name: str, known: str | None) -> OpenedRun:
        self._client = self._tracking.MlflowClient()
        if known is None:
            tags = {"mlflow.source.name": "engine"} | ({} if facts.group is None else {"group": facts.group})
            self._id = self._client.create_run(self._experiment_id(), run_name=name, tags=tags).info.run_id
        else:
            self._id = known
            self._client.update_run(known, status="RUNNING")
        data = self._client.get_run(self._id).data
        # A parameter cannot be changed: what a resumed run has anew stands in tags.
        now = {key: _text(value) for key, value in facts.parameters.items()}
        told = flat({"provenance": facts.essentials})
        told |= {f"config.{key}": value for key, value in now.items() if data.params.get(key, value) != value}
        for part in _parts([(key, value) for key, value in now.items() if key not in data.params]):
            self._batch(params=[self._entities.Param(key, value) for key, value in part])
        for part in _parts([(key, _text(value)) for key, value in told.items()]):
            self._batch(tags=[self._entities.RunTag(key, value) for key, value in part])
        return OpenedRun(self._id, int(data.tags.get(_ROWS, 0)), self.place(facts))

    def log(self, row: Row, number: int) -> None:
        numbers = dict(numbers_of.curves(row))
        for name, shares in numbers_of.histograms(row).items():
            numbers |= {f"{name}/{index:02d}": share for index, share in enumerate(shares)}
        numbers[f"{row['event']}/epoch"] = row["epoch"]
        self._batch(metrics=self._metrics(numbers, row["step"]), tags=[self._entities.RunTag(_ROWS, str(number))])

    def close(self, numbers: Mapping[str, float], step: int, status: Status) -> None:
        if numbers:
            self._batch(metrics=self._metrics(numbers, step))
        self._client.set_terminated(self._id, _STATUS[status])

    def _metrics(self, numbers: Mapping[str, float], step: int) -> list[Any]:
        now = int(time.time() * 1000)
        return [self._entities.Metric(_name(key), value, now, step) for key, value in numbers.items()]

    def _batch(self, **entities: Sequence[Any]) -> None:
        self._client.log_batch(self._id, **entities)

    def _experiment_id(self) -> str:
        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return given
        found = self._client.get_experiment_by_name(self._experiment)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(self._experiment))
        except Exception:  # another run has made it meanwhile
            found = self._client.get_experiment_by_name(self._experiment)
            if found is None:
                raise
            return str(found.experiment_id)


def _name(key: str) -> str:
    """A name that MLflow admits."""
    return re.sub(r"[^\w.\- :/]", "_", key)


def _text(value: object) -> str:
    return str(value)[:5000]


def _parts(items: Sequence[tuple[str, str]]) -> Iterator[Sequence[tuple[str, str]]]:
    for begin in range(0, len(items), _BATCH):
        yield items[begin : begin + _BATCH]
