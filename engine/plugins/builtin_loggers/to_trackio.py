"""Adapter of Trackio: one log entry a row, at the row's step."""

from __future__ import annotations

import inspect
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from engine.common import optional
from engine.plugins.builtin_loggers import numbers_of
from engine.plugins.builtin_loggers.run_facts import PROJECT, OpenedRun, Row, RunFacts, Status, flat

_REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class TrackioRun:
    """A run in Trackio's local store, or in the Space or server that its environment variables name."""

    def __init__(self) -> None:
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        self._trackio: Any = optional.load("trackio", missing="loggers: trackio cannot be imported: {reason}")
        self._project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._remote = next((os.environ[key] for key in _REMOTE if os.environ.get(key)), None)
        self._run: Any = None
        self._rows = 0

    def place(self, facts: RunFacts) -> str:
        remote = (self._remote or "").partition("?")[0]  # behind it stands a token
        return f"{remote or self._trackio.TRACKIO_DIR}, project {self._project}"

    def open(self, facts: RunFacts, name: str, known: str | None) -> OpenedRun:
        hardware_off = {"auto_log_cpu": False, "auto_log_gpu": False}
        self._run = self._trackio.init(
            project=self._project,
            name=name,
            config={**facts.parameters, **flat({"provenance": facts.essentials})},
            resume="never",
            embed=False,
            **_known_by(self._trackio.init, group=facts.group, **hardware_off),
        )
        # Trackio resumes by name, and the runs of two places may have the same; an id has one run alone.
        self._run.id = known or secrets.token_hex(16)
        stored = self._stored()
        self._rows = stored or 0
        show = self.place(facts) if self._remote else f"trackio show --project {self._project}"
        return OpenedRun(self._run.id, stored, show)

    def log(self, row: Row, number: int) -> None:
        shapes = {
            name: self._trackio.Histogram(np_histogram=(shares, numbers_of.edges(shares)))
            for name, shares in numbers_of.histograms(row).items()
        }
        self._run.log(numbers_of.curves(row) | {"epoch": row["epoch"]} | shapes, step=row["step"])
        self._rows += 1

    def close(self, numbers: Mapping[str, float], step: int, status: Status) -> None:
        if numbers:
            self._run.log(dict(numbers), step=step)
        self._run.finish()
        # It only warns where it cannot write.
        if (stored := self._stored()) is not None and stored < self._rows:
            raise OSError(f"{stored} of {self._rows} rows are in the store")

    def _stored(self) -> int | None:
        """Rows of this run in a local store, its results not counted."""
        if self._remote is not None:
            return None
        storage: Any = optional.load("trackio.sqlite_storage", missing="trackio: {reason}")
        logs = storage.SQLiteStorage.get_logs(self._project, self._run.name, run_id=self._run.id)
        return sum("epoch" in entry for entry in logs)


def _known_by(function: Callable[..., object], **keywords: Any) -> dict[str, Any]:
    """Those keywords that this version of the function has."""
    parameters = inspect.signature(function).parameters
    return {key: value for key, value in keywords.items() if key in parameters}
