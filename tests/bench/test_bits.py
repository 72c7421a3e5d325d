"""`python -m bench.bits`: digests that tell values, dtypes, shapes and order apart, and their comparison."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bench import bits
from engine import methods

ONE = torch.tensor([1.0, 2.0])
DIFFERENT: list[Any] = [
    {"a": ONE},
    {"b": ONE},
    {"a": ONE.double()},
    {"a": ONE.view(torch.int32)},  # the same bytes
    {"a": ONE[None]},
    {"a": ONE.flip(0)},
    {"a": torch.tensor([1.0, -2.0])},
    {"a": [1.0, 2.0]},
    [ONE],
    [1, 2],
    [2, 1],
    [12],
    [[1], 2],
    [[1, 2]],
    [1.0, 2.0],
    ["1", "2"],
    [None, 0.0],
    [None, -0.0],
]


def test_digests_of_what_differs_differ() -> None:
    assert len({bits.digest(tree) for tree in DIFFERENT}) == len(DIFFERENT)


def test_digests_of_what_is_equal_are_equal() -> None:
    assert bits.digest({"a": 1, "b": ONE}) == bits.digest({"b": ONE.clone(), "a": 1})
    assert bits.digest((1, float("nan"))) == bits.digest([1, float("nan")])
    images = torch.rand(2, 3, 4, 4)
    assert bits.digest(images) == bits.digest(images.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize(("changed", "code", "told"), [
    ({}, 0, "2 of 2 digests are equal\n"),
    ({"at rows": bits.digest([1, 3])}, 1, "differs: at rows\n1 of 2 digests are equal\n"),
    ({"iad1 rows": "new"}, 1, "differs: iad1 rows\n2 of 2 digests are equal\n"),
])  # fmt: skip
def test_a_changed_row_is_named_and_fails_the_command(
    changed: dict[str, str], code: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"at weights": bits.digest(ONE), "at rows": bits.digest([1, 2])}
    monkeypatch.setattr(bits, "digests_of", lambda checkout, folder, wanted: iter(found.items()))
    before = tmp_path / "before.json"
    assert CliRunner().invoke(bits.main, [str(tmp_path), "--out", str(before)]).exit_code == 0
    monkeypatch.setattr(bits, "digests_of", lambda checkout, folder, wanted: iter((found | changed).items()))
    ended = CliRunner().invoke(bits.main, [str(tmp_path), "--compare", str(before)])
    assert (ended.exit_code, ended.output) == (code, told)


def test_a_run_without_all_of_the_digests_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tmp_path / "before.json"
    before.write_text('{"at rows": "a", "at weights": "b"}')
    monkeypatch.setattr(bits, "digests_of", lambda checkout, folder, wanted: iter([("at rows", "a")]))
    ended = CliRunner().invoke(bits.main, [str(tmp_path), "--compare", str(before)])
    assert (ended.exit_code, ended.output) == (1, "differs: at weights\n1 of 2 digests are equal\n")


def run_of(folder: Path, seconds: float, loss: float = 1.0) -> Path:
    """Files of a run, timings among them."""
    folder.mkdir()
    student = {"weight": ONE}
    telemetry = {"sums": ONE, "seconds": seconds}
    torch.save({"student": student, "optimizer": {"state": {}}, "telemetry": telemetry}, folder / "last.pt")
    torch.save({"student": student}, folder / "best.pt")
    (folder / "metrics.jsonl").write_text(f'{{"loss": {loss}, "seconds": {seconds}}}\n')
    (folder / "summary.json").write_text(f'{{"best": {{"loss": {loss}, "images_per_second": {seconds}}}}}')
    return folder


def test_timings_are_left_out(tmp_path: Path) -> None:
    fast, slow, other = (
        [bits.digest(part(run)) for part in (bits._tensors, bits._rows)]
        for run in (
            run_of(tmp_path / "fast", 1.0), run_of(tmp_path / "slow", 2.0), run_of(tmp_path / "other", 1.0, 1.5)
        )
    )  # fmt: skip
    assert fast == slow
    assert (fast[0], fast[1] == other[1]) == (other[0], False)


def test_every_method_semantics_precision_and_number_of_processes_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[list[str]] = []

    class Done:
        returncode = 0

    def run(line: tuple[str, ...], **_: Any) -> Done:
        lines.append(list(line[2:]))
        return Done()

    monkeypatch.setattr("subprocess.run", run)
    for part in ("_tensors", "_rows", "_report"):
        monkeypatch.setattr(bits, part, lambda folder: [])
    names = [name for name, _ in bits.digests_of(tmp_path, tmp_path, tuple(methods.METHODS))]
    settings = itertools.product(methods.METHODS, bits.SEMANTICS, bits.PRECISIONS, bits.PROCESSES)
    assert names == [
        " ".join(map(str, (*one, part))) for one in settings for part in ("weights", "rows", "report")
    ]
    assert [line[0] for line in lines] == ["train", "eval"] * (len(names) // 3)
