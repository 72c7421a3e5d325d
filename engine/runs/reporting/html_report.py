"""`engine report`: runs and benchmark results as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import csv
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

from engine.attacks import table
from engine.common.files import regular_file, write_atomically
from engine.config import explicit, read_file
from engine.evaluation.reports import read as read_results
from engine.runs.run_directory import RunDir

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; }
h2 { border-top: 1px solid #8886; padding-top: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; margin: .8rem 0; display: block; overflow-x: auto; }
td { font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #8886; padding: .25rem .7rem; text-align: left; }
td.number { text-align: right; white-space: nowrap; }
img { max-width: 100%; background: white; }
.quiet { opacity: .7; }
"""
_EPOCH_COLUMNS = (
    "epoch", "phase", "lr", "loss", "alpha", "natural_accuracy", "robust_accuracy", "attack_steps",
    "probe_fgsm_pgd_gap", "images_per_second", "seconds",
    "share_of_peak",
)  # fmt: skip

# What tells the results of one report apart, by what it is called in a table.
_TELLING = {
    "seed": ("parameters", "seed"),
    "data": ("data", "sha256"),
    "image size": ("parameters", "image_size"),
    "model": ("model",),
    "checkpoint": ("checkpoint", "sha256"),
    "engine": ("engine",),
    "measured": ("started",),
}

Cell = object
Rows = Sequence[Sequence[Cell]]


def write(paths: Sequence[Path], out: Path) -> None:
    """Write the report of run directories and folders of benchmark results, in the order given.

    Raises ValueError, one line, for a folder that is neither, a file that cannot be read, and an `out` that cannot
    be written.
    """
    runs = [path for path in paths if (path / "config.yaml").is_file()]
    sections = [_run(path) if path in runs else _bench(path) for path in paths]
    body = "".join(
        f'<section id="s{number}"><h2>{escape(title)}</h2>{content}</section>'
        for number, (title, content) in enumerate(sections)
    )
    contents = "".join(
        f'<li><a href="#s{number}">{escape(title)}</a></li>' for number, (title, _) in enumerate(sections)
    )
    compared = _comparison(runs) if len(runs) > 1 else ""
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>engine report</title>'
        f"<style>{_STYLE}</style></head>"
        f"<body><h1>engine report</h1><ul>{contents}</ul>{compared}{body}</body></html>\n"
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page.encode())
    except OSError as error:
        raise ValueError(f"--out: cannot write {out}: {error.strerror}") from None


# ---------------------------------------------------------------- runs


def _run(path: Path) -> tuple[str, str]:
    """Title and content of a run's section."""
    config = read_file(path / "config.yaml")
    run = RunDir(path)
    summary = run.read_summary() or {}
    rows = list(run.rows())
    epochs, back = ([row for row in rows if row.get("event") == event] for event in ("epoch", "rollback"))
    title = f"{config.get('method')} on {config.get('dataset')}, {config.get('model')}, {path}"
    parts = [] if summary else [_note(f"Not finished: {len(epochs)} of {config.get('epochs')} epochs so far.")]
    parts += [_accuracies(summary), *(_evaluation(file) for file in sorted(path.glob("*.eval.json")))]
    parts += [_epochs(epochs)]
    parts += [_note(f"Epoch {row['epoch']} was rolled back: {row.get('overfitting')}") for row in back]
    parts += [_pictures(path), "<h3>Settings</h3>", _mapping(explicit(config))]
    for provenance in run.sessions()[-1:]:
        known = {key: provenance[key] for key in ("engine", "commit", "started", "pipeline") if key in provenance}
        groups = ("versions", "hardware", "precision", "kernels", "data", "teachers")
        parts += ["<h3>Provenance</h3>", _mapping(known | {key: provenance.get(key, {}) for key in groups})]
    return title, "".join(parts)


def _comparison(paths: Iterable[Path]) -> str:
    """A line for each run."""
    lines, attacks = [], []
    for path in paths:
        config, summary = read_file(path / "config.yaml"), RunDir(path).read_summary() or {}
        best = summary.get("test_of_best", {})
        attacks += [name for name in best if name not in attacks]
        speed = summary.get("last", {}).get("images_per_second")
        lines.append((path, config, summary, best, speed))
    rows = [
        (
            str(path), config.get("method"), config.get("semantics"), config.get("model"), config.get("dataset"),
            summary.get("selected_on", "not finished"), *(_percent(best.get(name)) for name in attacks), speed,
        )
        for path, config, summary, best, speed in lines
    ]  # fmt: skip
    head = ("run", "method", "semantics", "model", "dataset", "selected on", *attacks, "images/s")
    return "<h2>Runs compared</h2>" + _note("Test images, the best epoch of each run.") + _table(head, rows)


def _accuracies(summary: Mapping[str, Any]) -> str:
    parts = ""
    for key, which in (("test_of_best", "best"), ("test_of_last", "last")):
        if results := summary.get(key):
            epoch, by = summary.get(which, {}).get("epoch"), summary.get("selected_by", "")
            chosen = f", selected on {summary.get('selected_on')} by {by}" if which == "best" else ""
            parts += f"<h3>{escape(f'Test images, {which} epoch ({epoch}{chosen})')}</h3>{_results(results)}"
    return parts


def _evaluation(file: Path) -> str:
    """Every result of a report, with what tells them apart."""
    entries = read_results(file)
    told = [[_of(entry, keys) for keys in _TELLING.values()] for entry in entries]
    differ = [len({row[column] for row in told}) > 1 for column in range(len(_TELLING))]
    head = ("attack", "accuracy", "n", "with", *itertools.compress(_TELLING, differ))
    rows = [
        (*_result(entry["attack"], entry), *itertools.compress(row, differ))
        for entry, row in zip(entries, told, strict=True)
    ]
    warnings = [str(text) for entry in entries for text in entry.get("warnings", ())]
    return f"<h3>{escape(file.name)}</h3>{_table(head, rows)}" + "".join(map(_note, dict.fromkeys(warnings)))


def _of(entry: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Value of an entry under nested keys, short."""
    value: Any = entry
    for key in keys:
        value = value.get(key, "") if isinstance(value, Mapping) else ""
    return str(value)[:19]  # of a hash enough to tell it from others, and of a time all but the zone


def _results(results: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [_result(name, result) for name, result in results.items()]
    return _table(("attack", "accuracy", "n", "with"), rows)


def _result(name: str, result: Mapping[str, Any]) -> tuple[Cell, ...]:
    parts = result.get("parts")
    is_whole = name != "aa" or not isinstance(parts, Mapping) or not parts
    missing = "" if is_whole else table.title(name, result).partition(" without ")[2]
    shown = f"{name} without {missing}" if missing else name
    return shown, _percent(result), result.get("n"), result.get("description")


def _percent(result: Mapping[str, Any] | None) -> str:
    return "" if result is None else f"{result['accuracy']:.2%}"


def _epochs(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    columns = [name for name in _EPOCH_COLUMNS if any(name in row for row in rows)]
    return "<h3>Epochs</h3>" + _table(columns, [[row.get(name, "") for name in columns] for row in rows])


# ---------------------------------------------------------------- benchmarks


def _bench(path: Path) -> tuple[str, str]:
    """Title and content of the section of a folder of results."""
    files = sorted(path.glob("*.csv"))
    if not files:
        raise ValueError(
            f"{path} is neither a run directory (config.yaml) nor a folder of benchmark results (*.csv)"
        )
    return f"Benchmarks, {path}", "".join(map(_csv, files)) + _pictures(path)


def _csv(file: Path) -> str:
    """Columns that are the same in all rows once, and the rest as a table."""
    try:
        head, *rest = csv.reader(StringIO(_bytes(file).decode(), newline=""), strict=True)
    except (ValueError, csv.Error):  # ValueError: not UTF-8, or without a single line
        raise ValueError(f"{file} is no table of comma-separated values") from None
    for number, cells in enumerate(rest, 2):
        if len(cells) != len(head):
            raise ValueError(f"{file}: row {number} has {len(cells)} cells, and the first {len(head)}")
    rows = [dict(zip(head, cells, strict=True)) for cells in rest]
    same = [name for name in head if len(rows) > 1 and len({row[name] for row in rows}) == 1]
    told = "; ".join(f"{name} {rows[0][name]}" for name in same if rows[0][name])
    columns = [name for name in head if name not in same]
    table = _table(columns, [[_number(row[name]) for name in columns] for row in rows])
    return f"<h3>{escape(file.name)}</h3>{_note(told) if told else ''}{table}"


def _number(text: str) -> Cell:
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?\d+(\.\d*)?(e[+-]?\d+)?", text) else text


# ---------------------------------------------------------------- pieces


def _table(head: Sequence[str], rows: Rows) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"


def _cell(value: Cell) -> str:
    if isinstance(value, float):
        return f'<td class="number">{value:.5g}</td>'
    is_number = isinstance(value, int) or (isinstance(value, str) and re.fullmatch(r"[\d.]+%", value))
    return f"<td{' class=number' * bool(is_number)}>{escape('' if value is None else str(value))}</td>"


def _mapping(values: Mapping[str, Any]) -> str:
    """Nested keys as lines of a table."""
    return _table(("key", "value"), [(key, str(value)) for key, value in _flat(values)])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _pictures(path: Path) -> str:
    parts = ""
    for file in sorted(path.glob("*.png")):
        data = base64.b64encode(_bytes(file)).decode()
        parts += f'<p><img alt="{escape(file.stem)}" src="data:image/png;base64,{data}"></p>'
    return parts


def _note(text: str) -> str:
    return f'<p class="quiet">{escape(text)}</p>'


def _bytes(file: Path) -> bytes:
    """A file's content. Raises ValueError where it cannot be read."""
    try:
        return regular_file(file).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from None
