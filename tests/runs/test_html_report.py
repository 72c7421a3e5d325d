"""The HTML report: its numbers are those of the files, it needs nothing beside it, and it trusts no name."""

from __future__ import annotations

import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import engine
from engine.runs.reporting import html_report, run_section


class Page(HTMLParser):
    """Tables as lists of rows of texts, headings, and everything that points anywhere."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.headings: list[str] = []
        self.targets: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._into: list[str] | None = None
        self._is_small = False  # an interval or a path below the content of a cell
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.targets += [value for key, value in attrs if key in ("src", "href", "srcset")]
        self._is_small |= tag == "small"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._into = self.tables[-1][-1]
            self._into.append("")
        elif tag in ("h2", "h3"):
            self._into = self.headings
            self._into.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "h2", "h3"):
            self._into = None
        self._is_small &= tag != "small"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._into is not None and not self._is_small:
            self._into[-1] += data

    def table(self, *head: str) -> list[list[str]]:
        """The rows of the first table with these columns."""
        return next(table[1:] for table in self.tables if table[0] == list(head))


@pytest.fixture(scope="module")
def runs(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    for name in ("at", "iad1"):
        engine.train(tiny.config(method=name, out=str(root / name)))
    return root / "at", root / "iad1"


def bench(path: Path, name: str = "x") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "speed.csv").write_text(f"device,op,seconds,speedup\ncpu,{name},0.001234567,2\ncpu,b,12.5,\n")
    Image.new("RGB", (4, 4), "red").save(path / "speed.png")
    (path / "trace.json").write_text("{}")
    return path


def made(tmp_path: Path, *paths: Path) -> Page:
    html_report.write(paths, tmp_path / "report.html")
    return Page(tmp_path / "report.html")


def test_a_run_s_numbers(runs: tuple[Path, Path], tmp_path: Path) -> None:
    page = made(tmp_path, runs[1])
    summary = json.loads((runs[1] / "summary.json").read_text())
    for row, (name, result) in zip(
        page.table("attack", "accuracy", "n", "with"), summary["test_of_best"].items(), strict=True
    ):
        assert row == [name, f"{result['accuracy']:.2%}", str(result["n"]), result["description"]]
    rows = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    epochs = [row for row in rows if row["event"] == "epoch"]
    table = next(table for table in page.tables if table[0][:2] == ["epoch", "phase"])
    for line, row in zip(table[1:], epochs, strict=True):
        cells = dict(zip(table[0], line, strict=True))
        assert cells["phase"] == row["phase"]
        assert float(cells["loss"]) == pytest.approx(row["loss"], rel=1e-4)
        assert float(cells["robust_accuracy"]) == pytest.approx(row["robust_accuracy"], rel=1e-4)
    settings = {row[0]: row[1] for row in page.table("key", "value")}
    assert settings["method"] == "iad1"
    assert settings["attack.num_steps"] == "2"
    assert "batch_size" in settings
    assert "lr" not in settings  # the default
    provenance = [table for table in page.tables if table[0] == ["key", "value"]][1]
    torch_version = json.loads((runs[1] / "provenance.json").read_text())["versions"]["torch"]
    assert ["versions.torch", torch_version] in provenance
    # Loss, accuracy and Figures 1 to 4, each in light and in dark.
    assert page.tags.count("img") == page.tags.count("source") == 6
    assert sum(target.startswith("data:image/png;base64,") for target in page.targets) == 12


def test_runs_are_compared(runs: tuple[Path, Path], tmp_path: Path) -> None:
    page = made(tmp_path, *runs)
    head, *rows = page.tables[0]
    assert [row[0] for row in rows] == ["at, resnet8", "iad1, resnet8"]
    for path, row in zip(runs, rows, strict=True):
        best = json.loads((path / "summary.json").read_text())["test_of_best"]
        n = best["pgd10"]["n"]
        assert row[head.index(f"PGD-10n = {n}L-inf epsilon 8/255")] == f"{best['pgd10']['accuracy']:.2%}"
        assert row[head.index(f"Naturaln = {n}")] == f"{best['natural']['accuracy']:.2%}"
    assert "Runs compared" not in made(tmp_path, runs[0]).headings


def test_a_run_that_is_not_finished(runs: tuple[Path, Path], tmp_path: Path) -> None:
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text((runs[0] / "config.yaml").read_text())
    lines = (runs[0] / "metrics.jsonl").read_text().splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if '"epoch"' in line.partition(",")[0])
    (unfinished / "metrics.jsonl").write_text("".join(lines[: first + 1]) + '{"event": "st')
    page = made(tmp_path, unfinished, runs[1])
    assert "Not finished: 1 of 2 epochs so far." in page.text
    head, row, *_ = page.tables[0]
    assert row[head.index("selected on")] == "not finished"


def test_evaluations_of_checkpoints(runs: tuple[Path, Path], tmp_path: Path) -> None:
    copied = tmp_path / "run"
    copied.mkdir()
    (copied / "config.yaml").write_text((runs[0] / "config.yaml").read_text())
    results = {"aa": {"accuracy": 0.4321, "n": 100, "description": "AutoAttack standard"}}
    (copied / "best.eval.json").write_text(json.dumps({"results": results}))
    page = made(tmp_path, copied)
    assert page.table("attack", "accuracy", "n", "with") == [["aa", "43.21%", "100", "AutoAttack standard"]]


def test_results_of_a_report_are_told_apart(runs: tuple[Path, Path], tmp_path: Path) -> None:
    copied = tmp_path / "run"
    copied.mkdir()
    (copied / "config.yaml").write_text((runs[0] / "config.yaml").read_text())
    base = {
        "attack": "pgd20",
        "accuracy": 0.5,
        "n": 10,
        "description": "d",
        "started": "2026-01-01T00:00:00+00:00",
    }
    entries = [
        base | {"checkpoint": {"sha256": sha256 * 64}, "parameters": {"seed": seed}, "warnings": warnings}
        for sha256, seed, warnings in (("a", 0, []), ("a", 1, ["<b>doubt"]), ("b", 0, []))
    ]  # fmt: skip
    (copied / "best.pt.eval.json").write_text(json.dumps({"format": 2, "results": entries}))
    page = made(tmp_path, copied)
    rows = page.table("attack", "accuracy", "n", "with", "seed", "checkpoint")
    assert [row[4:] for row in rows] == [["0", "a" * 19], ["1", "a" * 19], ["0", "b" * 19]]
    assert "<b>doubt" in page.text


def test_autoattack_of_few_classes_is_told_by_its_name() -> None:
    result = {"accuracy": 0.5, "n": 4, "description": "numbers"}
    parts = dict.fromkeys(("natural", "apgd-ce", "fab-t", "square"), 0.5)
    assert run_section.name_of("aa", result | {"parts": parts}) == "aa without APGD-T"
    assert run_section.name_of("aa", result | {"parts": parts | {"apgd-t": 0.5}}) == "aa"
    assert run_section.name_of("aa", result) == "aa"  # as earlier reports have it


def test_a_folder_of_benchmarks(tmp_path: Path) -> None:
    page = made(tmp_path, bench(tmp_path / "bench"))
    assert page.table("op", "seconds", "speedup") == [["x", "0.0012346", "2"], ["b", "12.5", ""]]
    assert "device cpu" in page.text
    (picture,) = (target for target in page.targets if target.startswith("data:image/"))
    assert picture.startswith("data:image/png;base64,")


def test_the_results_of_this_project(tmp_path: Path) -> None:
    folder = Path(__file__).resolve().parents[2] / "bench" / "results" / "cpu"
    page = made(tmp_path, folder)
    assert {"kernels.csv", "pipelines.csv"} <= set(page.headings)


def test_it_needs_nothing_beside_it(runs: tuple[Path, Path], tmp_path: Path) -> None:
    page = made(tmp_path, *runs, bench(tmp_path / "bench"))
    assert page.targets
    inside = ("data:image/png;base64,", "data:text/csv;charset=utf-8;base64,", "#s")
    assert all(target.startswith(inside) for target in page.targets)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in (tmp_path / "report.html").read_text()


def test_names_are_no_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    folder = bench(tmp_path / "a<b>&c", evil)
    run = tmp_path / "run"
    run.mkdir()
    tree = {"method": "at", "dataset": "digits", "data": f"/{evil}"}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    epoch = {"epoch": 1, "natural_accuracy": 1.0, "robust_accuracy": 1.0, "measured_on": evil}
    summary = {"best": epoch, "last": epoch, "selected_on": evil, "selected_by": evil}
    result = {"accuracy": 1.0, "n": 1, "description": f'"{evil}'}
    (run / "summary.json").write_text(json.dumps(summary | {"test_of_best": {evil: result}}))
    page = made(tmp_path, folder, run)
    assert "script" not in page.tags
    assert page.text.count(evil) >= 4
    assert any("a<b>&c" in heading for heading in page.headings)


def test_the_same_input_gives_the_same_bytes(runs: tuple[Path, Path], tmp_path: Path) -> None:
    pages = []
    for name in ("a", "b"):
        html_report.write([*runs, bench(tmp_path / "bench")], tmp_path / f"{name}.html")
        pages.append((tmp_path / f"{name}.html").read_bytes())
    assert pages[0] == pages[1]


@pytest.mark.parametrize("kind", ["absent", "empty", "broken"])
def test_what_is_no_run_is_told(kind: str, tmp_path: Path, cli: Any) -> None:
    folder, words = (
        tmp_path / "folder",
        "is neither a run directory (config.yaml) nor a folder of benchmark results",
    )
    if kind != "absent":
        folder.mkdir()
    if kind == "broken":
        (folder / "config.yaml").write_text("method: at\n")
        (folder / "summary.json").write_text("{")
        words = "summary.json is damaged"
    outcome = cli("report", str(folder), "--out", str(tmp_path / "report.html"))
    assert outcome.code == 2
    (line,) = outcome.err.strip().splitlines()
    assert words in line
    assert str(folder) in line
    assert not (tmp_path / "report.html").exists()


DAMAGED = {
    "a row that is no UTF-8": ("metrics.jsonl", b"\xff\n"),
    "a row that is a number": ("metrics.jsonl", b"1\n"),
    "a row that is cut off": ("metrics.jsonl", b'{"event": "epo\n{}\n'),
    "a summary that is a list": ("summary.json", b"[]"),
    "results that are null": ("summary.json", None),
    "a result that is no share": ("summary.json", None),
    "provenance that is a list": ("provenance.json", b"[]"),
    "a table with a longer row": ("step.csv", b"a,b\n1,2\n1,2,3\n"),
    "a table with a shorter row": ("step.csv", b"a,b\n1\n"),
    "a table that is no UTF-8": ("step.csv", b"a,b\n\xff,1\n"),
    "a table without a line": ("step.csv", b""),
    "a table with a quote left open": ("step.csv", b'a,b\n"1,2\n'),
    "a row whose accuracy is no share": (
        "metrics.jsonl",
        b'{"event": "epoch", "epoch": 1, "robust_accuracy": 2}\n',
    ),
    "a row whose cases are a number": ("metrics.jsonl", b'{"event": "epoch", "epoch": 1, "probe_cases": 1}\n'),
    "an evaluation that is no JSON": ("best.pt.eval.json", b"{"),
    "a configuration of another type": ("config.yaml", b"epochs: many\n"),
    # Not loss.png: what the rows give is drawn anew, in light and in dark.
    "a picture that is a folder": ("other.png", None),
    "a picture that is not there": ("other.png", None),
    "a table that is a FIFO": ("step.csv", None),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_damaged_is_told(kind: str, runs: tuple[Path, Path], tmp_path: Path, cli: Any) -> None:
    name, content = DAMAGED[kind]
    file = tmp_path / "folder" / name
    if name == "step.csv":
        file.parent.mkdir()
    else:
        shutil.copytree(runs[0], file.parent)
        file.unlink(missing_ok=True)
    if content is not None:
        file.write_bytes(content)
    elif kind == "results that are null":
        summary = json.loads((runs[0] / name).read_text())
        file.write_text(json.dumps(summary | {"test_of_best": None}))
    elif kind == "a result that is no share":
        summary = json.loads((runs[0] / name).read_text())
        summary["test_of_best"]["pgd10"]["accuracy"] = 52.1
        file.write_text(json.dumps(summary))
    elif kind == "a picture that is a folder":
        file.mkdir()
    elif kind == "a picture that is not there":
        file.symlink_to(tmp_path / "nowhere")
    elif kind == "a table that is a FIFO":
        os.mkfifo(file)
    outcome = cli("report", str(file.parent), "--out", str(tmp_path / "report.html"))
    assert outcome.code == 2, outcome.err
    (line,) = outcome.err.strip().splitlines()
    assert str(file) in line
    assert not (tmp_path / "report.html").exists()


def test_a_row_that_is_being_written_is_left_out(runs: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    whole = made(tmp_path, tmp_path / "run").text
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "epo')
    assert made(tmp_path, tmp_path / "run").text == whole


def test_the_command(runs: tuple[Path, Path], tmp_path: Path, cli: Any) -> None:
    outcome = cli("report", str(runs[0]), "--out", str(tmp_path / "new" / "report.html"))
    assert outcome.code == 0, outcome.err
    assert f"Written: {tmp_path / 'new' / 'report.html'}" in outcome.out
    headings = Page(tmp_path / "new" / "report.html").headings
    assert any(heading.startswith("at on folder, resnet8") for heading in headings)
    (tmp_path / "file").write_text("")
    outcome = cli("report", str(runs[0]), "--out", str(tmp_path / "file" / "report.html"))
    assert outcome.code == 2
    assert "--out: cannot write" in outcome.err
