"""Protocols of bench.accuracy: what is refused, which cells there are, and what their settings are made of."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench.lib.accuracy import protocol as protocols
from bench.lib.accuracy.protocol import PROTOCOLS, AccuracyProtocol
from engine.common import yaml_text
from engine.config import load, merge

TEACHERS = {"teacher": "t" * 64, "teacher_st": "s" * 64}
SMALL: dict[str, Any] = {
    "title": "small",
    "threads": 1,
    "seeds": [3, 5],
    "common": {"dataset": "digits", "model": "resnet8", "epochs": 2, "lr": 0.05},
    "teachers": {"teacher": {"method": "at", "seed": 100, "epochs": 3}},
    "tables": {
        "methods": {
            "title": "methods",
            "baseline": "ard",
            "attacks": {"natural": 20, "pgd20": 10},
            "rows": {"at": {"method": "at"}, "ard": {"method": "ard"}},
        },
        "rates": {
            "title": "rates",
            "baseline": "at",
            "attacks": {"natural": 30, "fgsm": 5},
            "rows": {"at": None, "at-lr0.1": {"method": "at", "lr": 0.1}},
        },
    },
}


def written(folder: Path, *changes: dict[str, Any]) -> str:
    path = folder / "small.yaml"
    path.write_text(yaml_text.write(merge(SMALL, *changes)))
    return str(path)


@pytest.fixture
def small(tmp_path: Path) -> AccuracyProtocol:
    return protocols.read(written(tmp_path))


@pytest.mark.parametrize("name", [path.stem for path in sorted(PROTOCOLS.glob("*.yaml"))])
def test_the_protocols_that_there_are_can_be_run(name: str) -> None:
    protocol = protocols.read(name)
    found = list(protocols.cells(protocol, TEACHERS))
    assert {(cell.row, cell.seed) for cell in found} == {
        (row, seed) for row in protocol.rows() for seed in protocol.seeds
    }
    assert len({cell.settings for cell in found}) == len(found)


def test_all_that_was_promised_of_the_protocol_for_a_cpu() -> None:
    protocol = protocols.read("cpu")
    methods = protocol.tables["methods"]
    assert set(methods.rows) >= {"at", "trades", "ard", "rslad", "iad1", "akd2", "iad2", "adaad"}
    assert methods.baseline == "ard"
    assert methods.attacks == {"natural": 10_000, "pgd20": 10_000, "aa": 1000}
    assert len(protocol.seeds) >= 3


def test_cells_come_by_table_and_seed_and_each_once(small: AccuracyProtocol) -> None:
    assert [cell.name for cell in protocols.cells(small, TEACHERS)] == [
        "at-seed3", "ard-seed3", "at-seed5", "ard-seed5", "at-lr0.1-seed3", "at-lr0.1-seed5",
    ]  # fmt: skip
    of_rates = protocols.cells(small, TEACHERS, ["rates"])
    assert [cell.name for cell in of_rates] == ["at-seed3", "at-lr0.1-seed3", "at-seed5", "at-lr0.1-seed5"]


def test_a_row_of_two_tables_is_attacked_by_both(small: AccuracyProtocol) -> None:
    assert small.attacks_of("at") == {"natural": 30, "pgd20": 10, "fgsm": 5}
    assert small.attacks_of("ard") == {"natural": 20, "pgd20": 10}


def test_a_cell_has_the_keys_of_its_row_and_the_teachers_that_it_reads(small: AccuracyProtocol) -> None:
    at, ard = (protocols.cell_of(small, row, 3, TEACHERS) for row in ("at", "ard"))
    assert at.teachers == {}
    assert ard.teachers == {"teacher": TEACHERS["teacher"]}
    expected = load(SMALL["common"], {"method": "ard", "seed": 3}).tree()
    assert ard.keys == {
        key: value for key, value in expected.items() if key not in ("out", "device", "teacher", "teacher_st")
    }
    assert small.teacher_config("teacher").epochs == 3
    assert small.teacher_config("teacher").lr == 0.05


def test_settings_are_those_that_decide_the_training() -> None:
    cell = protocols.cell_of(protocols.read("cpu"), "iad1", 0, TEACHERS)
    same = dataclasses.replace(cell, attacks={"natural": 1}, evaluation_seed=0)
    assert same.settings == cell.settings
    changes: list[dict[str, Any]] = [
        {"keys": {**cell.keys, "lr": 0.3}},
        {"keys": {**cell.keys, "seed": 1}},
        {"teachers": {"teacher": "u" * 64}},
        {"threads": 2},
    ]
    for change in changes:
        assert dataclasses.replace(cell, **change).settings != cell.settings


def test_a_run_s_place_and_device_are_no_settings(small: AccuracyProtocol) -> None:
    keys = small.config_of("at", 3)
    elsewhere = keys.model_copy(update={"device": "cuda", "out": "runs/x"})
    assert protocols.chosen_keys(elsewhere) == protocols.chosen_keys(keys)


def test_a_quick_protocol_has_the_same_rows_at_tiny_sizes() -> None:
    whole, quick = protocols.read("cpu"), protocols.read("cpu", quick=True)
    assert list(quick.rows()) == list(whole.rows())
    assert quick.name == "cpu-quick"
    for keys in (quick.config_of("iad2", 0), quick.teacher_config("teacher")):
        assert (keys.dataset, keys.model, keys.epochs, keys.limit_train) == ("digits", "resnet8", 2, 100)
    assert quick.config_of("iad1-beta1", 0).loss.beta == 1
    assert set(quick.attacks_of("iad1")) == {"natural", "pgd20", "aa-fast"}


TABLES = SMALL["tables"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thread": 2}, "thread"),
        ({"seeds": [1, 1]}, r"seeds: each once, got \[1, 1\]"),
        ({"seeds": []}, "seeds"),
        ({"threads": 0}, "threads"),
        ({"common": {"epochz": 2}}, "epochz"),
        ({"common": {"data": "/images"}}, "common: 'data' is the protocol's to decide"),
        ({"common": {"seed": 2}}, "common: 'seed' is the protocol's to decide"),
        ({"tables": {"methods": {"rows": {"ard": {"teacher": {}}}}}}, "ard: 'teacher' is the protocol's"),
        ({"tables": {"methods": {"baseline": "arf"}}}, "tables.methods.baseline: 'arf' is not known"),
        ({"tables": {"methods": {"attacks": {"pgd_20": 5}}}}, "pgd_20"),
        ({"tables": {"methods": {"attacks": {"fgsm": 0}}}}, "attacks.fgsm: at least 1 image"),
        ({"tables": {"methods": {"rows": {"iad2": {"method": "iad2"}}}}}, "reads 'teacher_st', which is not"),
        ({"tables": {"rates": {"rows": {"none": None}}}}, "row 'none' has no keys"),
        ({"tables": {"rates": {"rows": {"ard": {"method": "ard"}}}}}, "row 'ard' has keys in another table"),
        ({"tables": {"rates": {"rows": {"a/b": {"method": "at"}}}}}, "'a/b' is no name of a row"),
        ({"tables": {"rates": {"recipes": {"at": "table2-cifar10-att"}}}}, "table2-cifar10-att"),
        ({"tables": {"rates": {"recipes": {"at-lr0.1": "table2-cifar10-at"}}}}, "the baseline 'at' needs one too"),
        ({"teachers": {"tutor": {"method": "at"}}}, "teachers: 'tutor' is not known"),
        ({"teachers": {"teacher": {"method": "att"}}}, "att"),
    ],
)  # fmt: skip
def test_what_no_cell_could_be_made_of_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^protocol: [^\n]*{message}[^\n]*$"):
        protocols.read(written(tmp_path, change))


def test_an_unknown_protocol_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^protocol: 'cup' is not known; [^\n]*cpu"):
        protocols.read("cup")
    with pytest.raises(ValueError, match=r"^protocol: cannot read [^\n]*none\.yaml"):
        protocols.read(str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match=r"^protocol: [^\n]*list\.yaml has no keys"):
        protocols.read(str(tmp_path / "list.yaml"))


def test_an_unknown_row_and_table_are_refused(small: AccuracyProtocol) -> None:
    with pytest.raises(ValueError, match=r"^row: 'art' is not known; [^\n]*ard"):
        protocols.cell_of(small, "art", 3, TEACHERS)
    with pytest.raises(ValueError, match=r"^table: 'method' is not known; [^\n]*methods"):
        list(protocols.cells(small, TEACHERS, ["method"]))
