"""`python -m bench.compare`: two checkouts in turn, and the ratios of a round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench import compare
from bench.compare import Round


@pytest.fixture
def checkouts(tmp_path: Path) -> list[Path]:
    """Two empty folders."""
    found = [tmp_path / "before", tmp_path / "after"]
    for folder in found:
        folder.mkdir()
    return found


def test_checkouts_take_turns_and_the_first_round_does_not_count(
    checkouts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def sample(checkout: Path, flags: Any) -> Round:
        asked.append(checkout.name)
        return Round(len(asked), 1, 1, 1)

    monkeypatch.setattr(compare, "sample", sample)
    before, after = compare.measure(checkouts, (), 2)
    assert asked == ["before", "after", "after", "before", "before", "after"]
    assert ([one.help_clock for one in before], [one.help_clock for one in after]) == ([4, 5], [3, 6])


def test_the_table_has_medians_least_values_and_ratios_of_rounds(
    checkouts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"before": iter([99.0, 1.0, 8.0, 9.0]), "after": iter([99.0, 2.0, 4.0, 9.0])}
    monkeypatch.setattr(compare, "sample", lambda checkout, flags: Round(next(seconds[checkout.name]), 1, 1, 3))
    ended = CliRunner().invoke(compare.main, [*map(str, checkouts), "--rounds", "3"])
    assert ended.exit_code == 0, ended.output
    lines = [line.split() for line in ended.output.splitlines() if line.startswith("  engine --help, s")]
    assert lines == [["engine", "--help,", "s", "8", "1", "4", "2", "1.000"]]  # the median of 2, 0.5 and 1


def test_a_step_is_the_fastest_of_the_rows_of_whole_intervals(tmp_path: Path) -> None:
    rows = [
        {"event": "step", "step": 5, "seconds": 4.0},
        {"event": "step", "step": 10, "seconds": 2.0},
        {"event": "step", "step": 12, "seconds": 0.5},  # of two steps
        {"event": "epoch", "step": 12, "seconds": 0.1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare.step_seconds(tmp_path) == 2.0 / compare.LOG_EVERY


def test_a_checkout_that_fails_is_told(checkouts: list[Path]) -> None:
    (checkouts[0] / "engine").mkdir()
    (checkouts[0] / "engine" / "__main__.py").write_text("raise SystemExit('no engine')")
    ended = CliRunner().invoke(compare.main, list(map(str, checkouts)))
    assert ended.exit_code == 1
    assert "no engine" in ended.output
