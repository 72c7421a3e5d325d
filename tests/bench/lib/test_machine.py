"""Facts of the machine in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bench
from bench.lib import machine
from bench.lib.machine import Facts

CPU = torch.device("cpu")


def test_the_last_level_of_cache_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CACHES", tmp_path)
    assert machine.cache_bytes(CPU) == 0
    for index, (level, size) in enumerate([(1, "32K"), (1, "48K"), (3, "32768K"), (2, "1024K")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "level").write_text(f"{level}\n")
        (folder / "size").write_text(f"{size}\n")
    assert machine.cache_bytes(CPU) == 2**25


def test_the_threads_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 17)
    facts = machine.facts(CPU)
    assert (facts["threads"], facts["device"], facts["torch"]) == (17, "cpu", torch.__version__)


@pytest.mark.parametrize(("device", "name"), [("cpu", "amd-epyc-tm-7"), ("NVIDIA H100 80GB", "nvidia-h100-80gb")])
def test_results_lie_under_what_computed_them_and_the_day(device: str, name: str) -> None:
    given: Any = {"device": device, "processor": "AMD EPYC(tm) 7", "date": "2026-01-02T03:04:05+00:00"}
    facts: Facts = given
    assert machine.results_folder(facts) == Path(bench.__file__).parent / "results" / f"{name}-2026-01-02"


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="cuda:99"):
        machine.device("cuda:99")
