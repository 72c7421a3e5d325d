"""Files of a protocol's page, from made-up cells: numbers, what is missing, escaping, pictures, the command."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from scipy import stats

from bench import accuracy
from bench.lib.accuracy import figures, page, report
from bench.lib.accuracy import protocol as protocols
from bench.lib.accuracy.cells import ResultFolder
from bench.lib.accuracy.chapters import Chapter, Folded, Picture, markdown
from bench.lib.accuracy.collected import collect
from bench.lib.accuracy.protocol import AccuracyProtocol
from bench.lib.output.csv_rows import AccuracyRow
from engine.common import yaml_text
from engine.common.pictures import new_figure
from tests.bench.accuracy.made_cells import FACTS, fill
from tests.bench.readme import documented

N = 120
TREE: dict[str, Any] = {
    "title": "Made <script>alert(1)</script> & up",
    "images": "JPEG <b>of quality 75</b>",
    "threads": 1,
    "seeds": [0, 1, 2],
    "common": {"dataset": "digits", "model": "resnet8", "epochs": 1},
    "teachers": {"teacher": {"method": "at", "seed": 100}},
    "tables": {
        "methods": {
            "title": "Methods | by one",
            "baseline": "ard",
            "attacks": {"natural": N, "pgd20": N},
            "recipes": {"ard": "table2-cifar10-at-ard", "iad1": "table2-cifar10-at-iad1"},
            "rows": {"at": {"method": "at"}, "ard": {"method": "ard"}, "iad1": {"method": "iad1"}},
        },
        "rates": {
            "title": "Rates",
            "baseline": "at",
            "attacks": {"natural": N},
            "rows": {"at": None, "at-lr1": {"method": "at", "lr": 1}},
        },
    },
}


class Tables(HTMLParser):
    """Tables of a page, by the name that their region has: texts of their cells, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.name = ""
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        label = dict(attrs).get("aria-label") or ""
        if label.startswith("Table "):
            self.name = label.removeprefix("Table ")
            self.tables[self.name] = []
        elif tag == "tr":
            self.tables[self.name].append([])
        elif tag in ("td", "th"):
            self.tables[self.name][-1].append("")
            self.inside = True
        elif tag == "br" and self.inside:
            self.tables[self.name][-1][-1] += ", "

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.tables[self.name][-1][-1] += data


class Written:
    """A protocol in a folder, and what was written of it."""

    def __init__(self, folder: Path) -> None:
        self.yaml = folder / "made.yaml"
        self.yaml.write_text(yaml_text.write(TREE))
        self.protocol: AccuracyProtocol = protocols.read(str(self.yaml))
        self.results = ResultFolder(folder / "out")

    def write(self, console: Console | None = None) -> None:
        page.write(self.protocol, self.yaml.read_text(), self.results, console)

    def text(self, name: str = "index.html") -> str:
        return (self.results.folder / name).read_text(encoding="utf-8")

    def tables(self) -> dict[str, list[list[str]]]:
        return Tables(self.text()).tables

    def bits(self, row: str, attack: str, seeds: Sequence[int] = (0, 1, 2)) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Verdicts by seed, read from the cells' files."""
        found = []
        for seed in seeds:
            content = json.loads(self.results.cell(f"{row}-seed{seed}").read_text())["accuracies"][attack]
            found.append(np.unpackbits(np.frombuffer(base64.b64decode(content["verdicts"]), np.uint8))[:N] == 1)
        return np.array(found)


@pytest.fixture(autouse=True, scope="module")
def nothing_of_logs() -> Iterator[None]:
    """No further chapters: the cells that are made up have no logs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "FURTHER", ())
        yield


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """All cells, with the pictures."""
    written = Written(tmp_path_factory.mktemp("full"))
    fill(written.protocol, written.results)
    written.write()
    return written


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """No cells yet, and a picture of one dot in the place of each."""
    dot = io.BytesIO()
    Image.new("RGB", (1, 1)).save(dot, "PNG")
    monkeypatch.setattr(Picture, "png", lambda *given: dot.getvalue())
    return Written(tmp_path)


# ---------------------------------------------------------------- numbers


def test_accuracies_are_means_and_spreads_of_the_verdicts(full: Written) -> None:
    head, *rows = full.tables()["methods-accuracies"]
    assert head == ["row", f"natural, n = {N}", f"pgd20, n = {N}"]
    assert [row[0] for row in rows] == ["at", "ard (baseline)", "iad1"]
    for row in rows:
        for attack, told in zip(("natural", "pgd20"), row[1:], strict=True):
            shares = 100 * full.bits(row[0].split()[0], attack).mean(1)
            assert told == f"{shares.mean():.2f}% ± {shares.std(ddof=1):.2f}"


@pytest.mark.parametrize("attack", ["natural", "pgd20"])
def test_differences_are_those_of_an_analysis_of_variance(full: Written, attack: str) -> None:
    bits = {row: full.bits(row, attack) for row in ("at", "ard", "iad1")}
    shares = 100 * np.array([each.mean(1) for each in bits.values()])
    left = shares - shares.mean(1, keepdims=True) - shares.mean(0) + shares.mean()
    error = np.sqrt((left**2).sum() / 4 * 2 / 3)
    head, *rows = full.tables()[f"methods-{attack}-differences"]
    assert head[1:4] == ["minus ard, points", "95% interval, other seeds", "p"]
    assert [row[0] for row in rows] == ["at", "iad1"]
    for name, points, interval, p_value, _, images, by_seed in rows:
        by_image = 100.0 * (bits[name] * 1.0 - bits["ard"]).mean(0)
        value = by_image.mean()
        low, high = stats.t(4, value, error).interval(0.95)
        assert points == f"{value:+.2f}"
        assert interval == f"{low:+.2f} to {high:+.2f}"
        expected = 2 * stats.t.sf(abs(value) / error, 4)
        assert p_value == (f"{expected:.3f}" if expected >= 0.001 else "< 0.001")
        low, high = stats.norm(value, by_image.std(ddof=1) / np.sqrt(N)).interval(0.95)
        assert images == f"{low:+.2f} to {high:+.2f}"
        signs = 100 * (bits[name].mean(1) - bits["ard"].mean(1))
        assert by_seed == ", ".join(f"{sign:+.2f}" if sign else "0.00" for sign in signs)
    bound = error * (stats.t.ppf(0.975, 4) + stats.t.ppf(0.8, 4))
    assert f"{bound:.2f} points ({attack})" in full.text()


def test_directions_are_beside_the_paper_s(full: Written) -> None:
    _, *rows = full.tables()["directions"]
    assert [(row[0], row[1], row[4]) for row in rows] == [
        ("iad1 - ard", "natural", "-1.04"), ("iad1 - ard", "pgd20", "+0.78"),
    ]  # fmt: skip
    for row in rows:
        low, high = map(float, row[3].split(" to "))
        same = (low > 0) == (row[4] > "+") if low > 0 or high < 0 else None
        assert row[5] == {True: "agrees", False: "disagrees", None: "not resolved"}[same]


def test_costs_are_by_those_of_the_baseline(full: Written) -> None:
    """Made up: 40 + 3 k + seed seconds and 700 + 20 k MiB of the row number k."""
    _, *rows = full.tables()["methods-costs"]
    assert rows == [
        ["at", "41.0", f"{41 / 44:.2f}", "700", f"{700 / 720:.2f}"],
        ["ard", "44.0", "1.00", "720", "1.00"],
        ["iad1", "47.0", f"{47 / 44:.2f}", "740", f"{740 / 720:.2f}"],
    ]


def test_the_readme_has_the_same_tables(full: Written) -> None:
    lines = full.text("README.md").splitlines()
    for name, rows in full.tables().items():
        for row in rows:
            expected = "| " + " | ".join(cell.replace("<", "&lt;").replace("_", r"\_") for cell in row) + " |"
            assert expected in lines, name


def test_cells_csv_has_a_line_for_each_cell_and_attack(full: Written) -> None:
    with (full.results.folder / "cells.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    own = [field.name for field in fields(AccuracyRow)]
    assert list(lines[0]) == own
    assert own[-len(documented("cells.csv")) :] == documented("cells.csv")
    # at, ard and iad1 under two attacks, at-lr1 under one, three seeds each; the teacher under two
    assert len(lines) == 3 * (3 * 2 + 1) + 2
    for line in lines:
        name = line["row"] if line["seed"] == "" else f"{line['row']}-seed{line['seed']}"
        content = json.loads(full.results.cell(name).read_text())
        found = content["accuracies"][line["attack"]]
        assert (int(line["n"]), int(line["correct"])) == (found["n"], found["correct"])
        assert float(line["accuracy"]) == pytest.approx(found["correct"] / found["n"], rel=1e-5)
        assert (line["weights"], line["processor"]) == (content["weights"], FACTS["processor"])
        assert line["method"] == content["keys"]["method"]


# ---------------------------------------------------------------- what is missing


def test_of_a_half_measured_protocol_the_page_tells_what_is_missing(made: Written) -> None:
    fill(made.protocol, made.results, lambda row: {"at": (0, 1, 2), "ard": (0, 1)}.get(row, ()))
    made.write()
    text, tables = made.text(), made.tables()
    assert "5 of 12 cells are measured" in text
    assert "Seeds 0 and 1, which all rows with numbers have: 2 trainings each." in text
    assert "Left out, since not all of them have it: seed 2." in text
    assert "Not measured, or without a seed in common: iad1." in text
    assert [row[1] == "not measured" for row in tables["methods-accuracies"][1:]] == [False, False, True]
    assert tables["methods-natural-differences"][2][:2] == ["iad1", "not measured"]
    shares = 100 * made.bits("at", "natural", (0, 1)).mean(1)
    assert tables["methods-accuracies"][1][1] == f"{shares.mean():.2f}% ± {shares.std(ddof=1):.2f}"
    assert "Differences that the paper has: not measured." in text


def test_one_seed_tells_nothing_of_others(made: Written) -> None:
    fill(made.protocol, made.results, lambda row: (1,))
    made.write()
    assert "Seed 1 alone: one training each, so nothing is known of other seeds." in made.text()
    assert "there is no interval for other seeds" in made.text()
    row = made.tables()["methods-natural-differences"][1]
    assert (row[2], row[3], row[4]) == ("", "", "")
    assert " to " in row[5]


def test_without_any_cell_there_is_a_page(made: Written) -> None:
    made.write()
    assert "0 of 12 cells are measured" in made.text()
    assert "None of its rows is measured: at, ard, iad1." in made.text()
    assert made.tables()["teachers"][1][:2] == ["teacher", "not measured"]
    assert not (made.results.folder / "cells.csv").exists()


def test_seconds_of_different_machines_are_not_compared(made: Written) -> None:
    fill(made.protocol, made.results)
    path = made.results.cell("iad1-seed1")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"facts": FACTS | {"processor": "Q"}, "epoch_seconds": 4700.0}))
    made.write()
    warning = "Warning: cells of the table methods were measured on 2 different machines"
    assert warning in made.text()
    assert f"{warning} (P, 2 cores, 1 thread; Q, 2 cores, 1 thread)" in made.text("README.md")
    assert made.tables()["methods-costs"][3][:3] == ["iad1", "47.0", f"{np.mean([46 / 43, 48 / 45]):.2f}"]
    assert [row[1] for row in made.tables()["hardware"][1:]] == ["P", "Q"]


def test_a_page_that_cannot_be_written_stops_no_cell(made: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*given: Any) -> None:
        raise ValueError("damaged")

    def finished(workers: accuracy.Workers, wanted: Any) -> Any:
        for name in ("at-seed0", "ard-seed0"):
            measured.append(name)
            yield name

    fill(made.protocol, made.results)
    measured: list[str] = []
    monkeypatch.setattr(page, "write", write)
    monkeypatch.setattr(accuracy.Workers, "finished", finished)
    told = CliRunner().invoke(
        accuracy.main, [str(made.yaml), "--table", "rates", "--out", str(made.results.folder), "--device", "cpu"]
    )
    assert measured == ["at-seed0", "ard-seed0"]
    assert told.output.count("no page: damaged") == 2
    assert told.exit_code == 2  # told again in the end


# ---------------------------------------------------------------- text


def test_text_of_the_protocol_is_escaped(full: Written) -> None:
    text, readme = full.text(), full.text("README.md")
    assert "<script" not in text + readme.partition("```")[0]
    assert "Made &lt;script&gt;alert(1)&lt;/script&gt; &amp; up" in text
    assert "JPEG &lt;b&gt;of quality 75&lt;/b&gt;" in text
    assert r"## Methods \| by one" in readme
    assert "baseline: ard" in text
    assert "baseline: ard" in readme


def test_the_protocol_s_text_ends_no_fence() -> None:
    text = markdown("T", [], [Chapter("C", [Folded("S", "````\n<b>\n")])])
    assert "\n`````\n````\n<b>\n`````\n" in text


def test_the_terminal_has_the_tables(made: Written) -> None:
    fill(made.protocol, made.results)
    console = Console(file=io.StringIO(), width=160)
    made.write(console)
    assert isinstance(console.file, io.StringIO)
    told = console.file.getvalue()
    for row in made.tables()["methods-accuracies"][1:]:
        assert all(cell in told for cell in row)


def test_a_further_chapter_is_on_the_page(made: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "FURTHER", (lambda found: Chapter("Mechanism", ["a <claim>"]), lambda found: None))
    made.write()
    assert "Mechanism</h2><p>a &lt;claim&gt;</p>" in made.text()
    assert "## Mechanism\n\na &lt;claim&gt;\n" in made.text("README.md")


# ---------------------------------------------------------------- pictures


def test_pictures_lie_beside_the_page_and_the_readme_shows_them(full: Written) -> None:
    names = {path.name for path in full.results.folder.glob("*.png")}
    of_methods = {f"methods-{what}.png" for what in ("accuracies", "differences", "trade-off", "costs")}
    assert of_methods | {f"rates-{what}.png" for what in ("accuracies", "differences", "costs")} == names
    for name in names:
        assert f"]({name})" in full.text("README.md")
        with Image.open(full.results.folder / name) as picture:
            assert picture.width == 1000
    assert full.text().count("<picture>") == len(names)


def test_a_picture_is_drawn_again_where_its_data_changed() -> None:
    drawn = []

    def draw(data: int) -> Figure:
        drawn.append(data)
        return new_figure(0.1, 0.1)

    for data in (1, 1, 2, 2):
        Picture("of-a-test", draw, (data,), "alt").png()
    assert drawn == [1, 2]


def test_the_paper_s_difference_is_a_hollow_mark(full: Written) -> None:
    found = collect(full.protocol, full.results)
    drawn = figures.differences(found.compared(full.protocol.tables["methods"]))
    for axes, paper in zip(drawn.axes, (-0.0104, 0.0078), strict=True):
        (mark,) = [line for line in axes.lines if line.get_label() == "the paper"]
        assert np.asarray(mark.get_xdata()) == pytest.approx(paper)
        assert mark.get_markerfacecolor() == "none"
        assert [label.get_text() for label in axes.get_yticklabels()] == ["at", "iad1"]


# ---------------------------------------------------------------- the command


def test_the_page_alone_trains_nothing(made: Written) -> None:
    fill(made.protocol, made.results)
    told = CliRunner().invoke(
        accuracy.main, [str(made.yaml), "--page", "--out", str(made.results.folder), "--device", "cpu"]
    )
    assert told.exit_code == 0, told.output
    assert "12 of 12 cells are measured" in told.output
    assert (made.results.folder / "index.html").exists()
    assert not (made.results.folder / "teachers").exists()


@pytest.mark.parametrize(("changes", "told"), [
    ({"settings": "other"}, "of other settings"), ({"facts": {}}, "no 'commit'"), ({"epoch": "x"}, "move it away"),
])  # fmt: skip
def test_a_cell_that_is_damaged_or_of_other_settings_is_refused(
    made: Written, changes: dict[str, Any], told: str
) -> None:
    fill(made.protocol, made.results, lambda row: (0,))
    path = made.results.cell("at-seed0")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    result = CliRunner().invoke(
        accuracy.main, [str(made.yaml), "--page", "--out", str(made.results.folder), "--device", "cpu"]
    )
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())
