"""Adapter of Weights & Biases: one row of the history a row, drawn over the steps of the training."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from engine.common import optional
from engine.plugins.builtin_loggers import numbers_of
from engine.plugins.builtin_loggers.run_facts import PROJECT, Opened, Row, RunFacts, Status

_EXIT_CODES = {"finished": 0, "failed": 1, "killed": 130}
_SECONDS_TO_FINISH = 20


class WandbRun:
    """A run of wandb: online where there is a key, else in files of the run directory for `wandb sync`."""

    def __init__(self) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._wandb: Any = optional.load("wandb", missing="loggers: wandb cannot be imported: {reason}")
        self._project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        self._run: Any = None

    def place(self, facts: RunFacts) -> str:
        return f"{self._mode}, project {self._project}"

    def open(self, facts: RunFacts, name: str, known: str | None) -> Opened:
        if self._mode == "online" and not _has_key():  # it would ask for one, and wait
            raise ValueError("WANDB_MODE=online needs a key: `wandb login`, or WANDB_API_KEY")
        folder = os.environ.get("WANDB_DIR", str(facts.path))
        self._run = self._wandb.init(
            project=self._project,
            name=os.environ.get("WANDB_NAME", name),
            group=os.environ.get("WANDB_RUN_GROUP", facts.group),
            id=known or secrets.token_hex(8),
            resume="allow",
            config={**facts.config, "provenance": facts.essentials},
            allow_val_change=True,
            dir=folder,
            mode=self._mode,
            settings=self._settings(),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        files = Path(self._run.dir).parent
        return Opened(self._run.id, None, self._run.url if self._mode == "online" else f"wandb sync {files}")

    def log(self, row: Row, number: int) -> None:
        shapes = {
            name: self._wandb.Histogram(np_histogram=(shares, numbers_of.edges(shares)))
            for name, shares in numbers_of.histograms(row).items()
        }
        # Its own step has to grow from row to row, and an epoch's row has the step of the one before.
        place = {"epoch": row["epoch"], "step": row["step"]}
        self._run.log(numbers_of.curves(row) | place | shapes, step=number, commit=True)

    def close(self, numbers: Mapping[str, float], step: int, status: Status) -> None:
        self._run.summary.update({**numbers, "status": status})
        self._run.finish(exit_code=_EXIT_CODES[status])

    def _settings(self) -> Any:
        """Nothing on the terminal, no copy of code or of what is printed; those keys that this version has."""
        known = self._wandb.Settings.model_fields
        wanted = {
            "silent": True,
            "show_warnings": False,
            "console": "off",
            "disable_git": True,
            "disable_code": True,
            "save_code": False,
            "finish_timeout": _SECONDS_TO_FINISH,
        }
        return self._wandb.Settings(**{key: value for key, value in wanted.items() if key in known})


def _has_key() -> bool:
    """True if wandb would find a key without asking: in its variable, or in the file .netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    places = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for place in places:
        try:
            if netrc.netrc(Path(place).expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError, RuntimeError):
            continue
    return False
