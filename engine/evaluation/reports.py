"""Reports of evaluations: a file of each checkpoint, to which results are added, and in which none is lost."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.common.files import regular_file, write_json

REPORT_FORMAT = 2
SUFFIX = ".eval.json"
_TRIES = 100

Entry = dict[str, Any]
"""One attack on one checkpoint: its numbers, and all that decides them under `parameters`."""


def path_of(checkpoint: Path, folder: Path | None) -> Path:
    """The report of a checkpoint: beside it, or in a folder for many under a name of its own.

    There a hash of its absolute path tells it from others of the same name.
    """
    if folder is None:
        return checkpoint.with_name(checkpoint.name + SUFFIX)
    whole = Path(os.path.abspath(checkpoint))  # noqa: PTH100  # a link keeps its name
    digest = hashlib.sha256(os.fsencode(whole)).hexdigest()[:8]
    return folder / f"{whole.parent.name[:40]}-{whole.name[:40]}-{digest}{SUFFIX}"


def notes_of(path: Path) -> Path:
    """Folder of the partial results, until the report is written."""
    return path.with_name(path.name.removesuffix(".json") + ".partial")


def read(path: Path) -> list[Entry]:
    """The results in a report, none where there is none. One from before reports had a format serves too.

    Raises ValueError for a file that is no report, and that therefore stays as it is.
    """
    try:
        content = json.loads(regular_file(path).read_bytes())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged: it is not valid JSON; move it away") from None
    results = content.get("results") if isinstance(content, dict) else None
    if isinstance(results, dict) and "format" not in content and all(map(_is_dict, results.values())):
        record = {key: value for key, value in content.items() if key != "results"}
        results = [record | {"attack": name} | result for name, result in results.items()]
    elif not isinstance(content, dict) or content.get("format") != REPORT_FORMAT:
        results = None
    if not isinstance(results, list) or not all(map(_is_entry, results)):
        raise ValueError(f"{path} is no report of evaluations of format {REPORT_FORMAT}; move it away")
    return results


def add(path: Path, entries: Sequence[Entry]) -> list[str]:
    """Add results to a report, where each replaces that of the same parameters; what the user should know of it.

    Raises ValueError as `read` does, and OSError where the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        present, said = read(path), []
        new = json.loads(json.dumps(entries))  # as they will be read: tuples are lists
        wanted = [entry["parameters"] for entry in new]
        for entry in present:
            if entry.get("parameters") in wanted:
                said.append(f"Replaced the result of {entry['attack']} of {entry.get('started')} in {path}")
        kept = [entry for entry in present if entry.get("parameters") not in wanted]
        others = {checkpoint_of(entry) for entry in kept} - {checkpoint_of(entry) for entry in new}
        if others:
            count = sum(checkpoint_of(entry) in others for entry in kept)
            said.append(
                f"Note: {count} results in {path} are of an earlier content of the checkpoint (its sha256)"
            )
        write_json(path, {"format": REPORT_FORMAT, "results": [*kept, *new]})
    return said


def check(path: Path) -> None:
    """Raise OSError where the report could not be written, and ValueError as `read` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        read(path)


def checkpoint_of(entry: Mapping[str, Any]) -> str:
    """The hash of the checkpoint that was evaluated, empty where it is not told."""
    checkpoint = entry.get("checkpoint")
    return str(checkpoint.get("sha256", "")) if isinstance(checkpoint, dict) else ""


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("attack"), str):
        return False
    accuracy = entry.get("accuracy")
    if not isinstance(entry.get("warnings", []), list):
        return False
    return isinstance(accuracy, int | float) and 0 <= accuracy <= 1 and type(entry.get("n")) is int


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Inside, no other process changes this report. The lock is a file of its own, since reports are renamed."""
    lock = path.with_name(f".{path.name}.lock")
    for _ in range(_TRIES):
        with lock.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                held = os.path.samestat(os.fstat(file.fileno()), lock.stat())
            except FileNotFoundError:  # who had it has just removed it
                held = False
            if held:
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
                return
    raise OSError(11, "too many evaluations write it at once", str(lock))
