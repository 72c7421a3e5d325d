"""Adapter of Weights & Biases: one row of the history a row, drawn over the steps of the training."""

from __future__ import annotations

import json
import netrc
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from engine.common import optional
from engine.common.lookup import look_up
from engine.plugins.builtin_loggers import numbers_of
from engine.plugins.builtin_loggers.run_facts import PROJECT, OpenedRun, Row, RunFacts, Status

_SEEN: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(("online", "run", "shared"), lambda run: str(run.url)),
    **dict.fromkeys(("offline", "dryrun"), lambda run: f"wandb sync {Path(run.dir).parent}"),
    "disabled": lambda run: "nothing is kept, since WANDB_MODE is disabled",
}
"""Where a run is seen, by wandb's modes."""
_EXIT_CODES = {"finished": 0, "failed": 1, "killed": 130}
_SECONDS_TO_FINISH = 20


class WandbRun:
    """A run of wandb: online where there is a key, else in files of the run directory for `wandb sync`."""

    def __init__(self) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._wandb: Any = optional.load("wandb", missing="loggers: wandb cannot be imported: {reason}")
        self._project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        self._where = look_up("WANDB_MODE", self._mode, _SEEN)
        if self._mode in ("online", "run") and not _has_key():  # it would ask for one, and wait
            raise ValueError(f"WANDB_MODE={self._mode} needs a key: `wandb login`, or WANDB_API_KEY")
        self._run: Any = None

    def place(self, facts: RunFacts) -> str:
        return f"{self._mode}, project {self._project}"

    def open(self, facts: RunFacts, name: str, known: str | None) -> OpenedRun:
        folder = os.environ.get("WANDB_DIR", str(facts.path))
        rows = None if known is None else _rows_in_files(Path(folder), known)
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
        return OpenedRun(self._run.id, rows, self._where(self._run))

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
            "x_transaction_log_flush_interval": 1.0,  # what is not on the disk a kill takes
        }
        if self._wandb.run is not None:  # a run of the program that calls, which stays what it is
            wanted["reinit"] = "create_new"
        return self._wandb.Settings(**{key: value for key, value in wanted.items() if key in known})


def _rows_in_files(folder: Path, known: str) -> int | None:
    """Number of the last row of a run in files of sessions without a server; None where no file tells.

    A killed session may have lost its last rows. wandb itself reads its files.
    """
    last = None
    for session in folder.glob(f"wandb/offline-run-*-{known}"):
        command = [sys.executable, "-I", "-m", "wandb", "leet", "inspect", "--json", str(session)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
        if done.returncode != 0:  # an earlier version has no such command
            return None
        records = (json.loads(line) for line in done.stdout.splitlines())
        steps = [record["history"]["item"]["_step"] for record in records if record["type"] == "history"]
        last = max(last or 0, *steps, 0)
    return last


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
