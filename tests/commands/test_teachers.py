"""`engine teachers` on the command line: its tables, its files, and its one line for wrong use."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from engine.commands.teachers import TABLES, rank_teachers
from engine.evaluation.candidates import MEASURES
from engine.runs.compare_teachers import TeachersConfig
from tests.conftest import write_checkpoint


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """Checkpoints of untrained networks for the digits."""
    return [
        str(write_checkpoint(tmp_path / f"{name}.pt", seed, num_classes=10)) for name, seed in (("a", 1), ("b", 2))
    ]


def test_two_checkpoints_on_the_digits(two: list[str], cli: Any, tmp_path: Path) -> None:
    call = ["teachers", *two, "--dataset", "digits", "--limit", "30", "--student", two[0], "--device", "cpu"]
    outcome = cli(*call, "--out", str(tmp_path / "out"), "--sort-by", "natural")
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "out" / "teachers.json").read_text())
    assert f"Written: {tmp_path / 'out' / 'teachers.png'}" in outcome.out
    natural = [entry["measures"]["natural"]["value"] for entry in report["candidates"]]
    assert natural == sorted(natural, reverse=True)
    for entry in report["candidates"]:
        (line,) = re.findall(
            rf"^ +{entry['rank']} +{entry['label']} .*%.*%.*%.*%.*78,042", outcome.out, re.MULTILINE
        )
        assert f"{entry['measures']['natural']['value']:.2%}" in line
        assert f"\n{entry['rank']}: {entry['path']}\n" in outcome.out
    assert "natural *" in outcome.out
    assert "x: 30 test images of digits" in outcome.out
    assert "L-inf, epsilon 8/255, 10 steps of 2/255, random start, cross-entropy, BN eval" in outcome.out
    for measure in MEASURES.values():
        assert measure.definition in outcome.out
    fooled = report["candidates"][0]["measures"]["effective"]["n"]
    assert f"(higher is better, n = {fooled})" in outcome.out
    # Neither is trained.
    assert re.search(r"by natural, 1 cannot be told apart from 2 \(p = [0-9.]+\) on 30 images", outcome.out)
    refused = cli(*call, "--out", str(tmp_path / "out"))
    assert (refused.code, "exists already" in refused.err, refused.err.count("\n")) == (2, True, 1)


def test_the_tables_show_every_measure_once() -> None:
    shown = [name for _, names in TABLES for name in names]
    assert sorted(shown) == sorted(MEASURES)


def test_the_options_have_the_defaults_of_the_function() -> None:
    given = {parameter.name: parameter.default for parameter in rank_teachers.params}
    for field in dataclasses.fields(TeachersConfig):
        if field.default is not None:
            assert given[field.name] == field.default, field.name


def test_the_page_defines_every_column() -> None:
    text = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text()
    found = re.findall(r"^\| (`.*?) \| (.*?) \| .* \| (highest|lowest) \|$", text, re.MULTILINE)
    documented = {
        name: (title, best)
        for names, titles, best in found
        for name, title in zip(re.findall(r"`(\w+)`", names), titles.split(", "), strict=True)
    }
    assert documented == {
        name: (measure.title, "highest" if measure.higher else "lowest") for name, measure in MEASURES.items()
    }


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "Missing argument 'CANDIDATE...'"),
        (["none.pt", "--dataset", "digits"], "none.pt"),
        (["a.pt", "--limit", "0"], "--limit"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], told: str, cli: Any) -> None:
    outcome = cli("teachers", *arguments)
    assert outcome.code == 2
    assert told in outcome.err
    assert outcome.err.count("\n") == 1
