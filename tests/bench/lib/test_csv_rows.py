"""The arithmetic of a row, the verdicts, and the file, with numbers made by hand."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.lib.calls.op_cases import OpCase
from bench.lib.machine import Facts
from bench.lib.output import chart, csv_rows, targets
from bench.lib.output.csv_rows import OpRow, PeerRow, quantiles, speedup
from tests.bench.readme import documented

FACTS = Facts(
    date="2026-01-02T03:04:05+00:00", commit="abc", device="cpu", processor="A CPU", cores=4, threads=2,
    python="3.12", torch="2.11", triton="",
)  # fmt: skip
CASE = OpCase(
    "pgd_update",
    "4x3x2x2",
    "Linf",
    torch.bfloat16,
    bytes_moved=4_000,
    footprint=2_000,
    calls=lambda _: pytest.fail("called"),
    images=6,
)


def row(**changes: Any) -> OpRow:
    (made,) = csv_rows.rows(
        FACTS, replace(CASE, dtype=torch.float32), "call", {"native": [1, 1], "copy": [1, 1]}, 0
    )
    return replace(made, **changes)


def test_speedup_is_the_median_of_the_ratios_of_the_rounds() -> None:
    assert speedup([1, 8, 9], [1, 2, 9]) == 1  # the ratio of the medians is 4
    assert speedup([6, 6, 60, 60], [3, 2, 10, 6]) == 4.5
    assert speedup(None, [1, 2]) is None


def test_quantiles_lie_between_neighbours() -> None:
    assert quantiles([11, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) == (2, 10)
    assert quantiles([0, 1]) == pytest.approx((0.1, 0.9))


def test_a_row_holds_what_its_rounds_say() -> None:
    samples = {
        "eager": [8e-6, 8e-6, 16e-6],
        "compile": [4e-6, 3e-6, 2e-6],
        "native": [2e-6, 1e-6, 4e-6],
        "copy": [1e-6, 1e-6, 8e-6],
    }
    rows = {row.implementation: row for row in csv_rows.rows(FACTS, CASE, "graph", samples, cache_bytes=2**30)}
    assert rows.keys() == {"eager", "compile", "native"}
    assert asdict(rows["native"]) == pytest.approx(
        FACTS
        | {
            "op": "pgd_update", "implementation": "native", "mode": "graph", "shape": "4x3x2x2", "setting": "Linf",
            "dtype": "bfloat16", "rounds": 3,
            "median_s": 2e-6, "q10_s": 1.2e-6, "q90_s": 3.6e-6,
            "speedup_over_eager": 4.0,  # 4, 8, 4
            "speedup_over_compile": 2.0,  # 2, 3, 0.5
            "bytes_moved": 4_000, "gb_per_s": 2.0, "copy_gb_per_s": 2.0,
            "share_of_copy": 2.0,  # 4 / 2 times 0.5, 1, 2
            "beyond_cache": False, "images_per_s": 3e6,
        }
    )  # fmt: skip
    assert rows["native"].variant == "Linf, bfloat16"
    assert rows["eager"].speedup_over_eager == 1


def test_what_was_not_timed_is_not_compared_with() -> None:
    alone = row()
    assert alone.speedup_over_eager is None
    assert alone.speedup_over_compile is None
    assert row(images_per_s=None).images_per_s is None


@pytest.mark.parametrize(("footprint", "cache", "beyond"), [
    (2**26, 0, True), (2**26 - 1, 0, False), (2**26, 2**26, False), (2**27, 2**26, True),
])  # fmt: skip
def test_beyond_the_cache_is_twice_its_size_and_64_mib(footprint: int, cache: int, beyond: bool) -> None:
    case = replace(CASE, footprint=footprint)
    (made,) = csv_rows.rows(FACTS, case, "call", {"native": [1, 1], "copy": [1, 1]}, cache)
    assert made.beyond_cache is beyond


def test_the_file_has_the_documented_columns_and_the_numbers(tmp_path: Path) -> None:
    csv_rows.write(tmp_path / "kernels.csv", [row(median_s=1.23456789e-5, images_per_s=None), row(setting="a, b")])
    with (tmp_path / "kernels.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == documented("kernels.csv") == [field.name for field in fields(OpRow)]
    assert float(first["median_s"]) == pytest.approx(1.23456789e-5, rel=1e-5)
    assert (first["images_per_s"], first["triton"], first["beyond_cache"]) == ("", "", "False")
    assert second["setting"] == "a, b"


def test_what_is_read_is_what_was_written_with_what_is_absent(tmp_path: Path) -> None:
    row = PeerRow(
        **FACTS, method="at", model="resnet18", batch_size=4, candidate="plain", source="", rounds=3,
        steps_per_round=1, median_s=1.5, q10_s=1.25, q90_s=2.0, epoch_s=10.5, speedup_over_published=None,
        speedup_over_plain=1.0, forwards=None, backwards=11.0, peak_mib=300.5, relative_memory=None,
    )  # fmt: skip
    csv_rows.write(tmp_path / "peers.csv", [row])
    assert csv_rows.read(tmp_path / "peers.csv", PeerRow) == [row]


def test_the_chart_has_a_bar_for_each_implementation_but_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn = []
    original = Axes.barh

    def barh(self: Axes, at: Any, widths: Any, *rest: Any, **keys: Any) -> Any:
        drawn.append(widths)
        return original(self, at, widths, *rest, **keys)

    monkeypatch.setattr(Axes, "barh", barh)
    rows = [
        row(implementation=name, mode=mode, shape=shape, speedup_over_eager=speed)
        for mode in ("call", "graph")
        for shape in ("1x2", "3x4")
        for name, speed in (("eager", 1.0), ("native", 4.0), ("triton", 5.0))
    ]
    chart.draw(tmp_path / "kernels.png", rows)
    assert drawn == [[4.0, 4.0], [5.0, 5.0]] * 2
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- targets


def judge(*rows: OpRow) -> dict[str, str]:
    """The word of each target, by its text."""
    lines = [line.partition(": ") for line in targets.verdicts(rows)]
    return {rest.partition(":")[0]: word for word, _, rest in lines}


DISTILL = {"op": "distill_loss", "shape": "128x10", "speedup_over_eager": 2.0, "speedup_over_compile": 1.0}
LARGER = DISTILL | {"shape": "1024x100", "speedup_over_eager": 3.0}
PGD = {"op": "pgd_update", "shape": "128x3x32x32", "speedup_over_eager": 5.0, "share_of_copy": 0.1}
BEYOND = PGD | {"shape": "8192x3x32x32", "speedup_over_eager": 1.0, "share_of_copy": 0.8, "beyond_cache": True}
CROP = {"op": "crop_flip", "shape": "128x3x32x32", "images_per_s": 800_000.0}
ALL = {
    "distill_loss over eager at 128x10": DISTILL,
    "distill_loss over eager at larger sizes": LARGER,
    "distill_loss over torch.compile": DISTILL,
    "pgd_update over eager at 128x3x32x32": PGD,
    "pgd_update of the copy's bandwidth beyond the cache": BEYOND,
    "crop_flip of 128x3x32x32": CROP,
}


def test_numbers_at_the_targets_reach_them() -> None:
    assert judge(*(row(**changes) for changes in ALL.values())) == dict.fromkeys(ALL, "reached")


@pytest.mark.parametrize(("changes", "missed"), [
    (DISTILL | {"speedup_over_eager": 1.99}, "distill_loss over eager at 128x10"),
    (LARGER | {"speedup_over_eager": 2.99}, "distill_loss over eager at larger sizes"),
    (LARGER | {"speedup_over_compile": 0.99}, "distill_loss over torch.compile"),
    (PGD | {"speedup_over_eager": 4.99}, "pgd_update over eager at 128x3x32x32"),
    (BEYOND | {"share_of_copy": 0.79}, "pgd_update of the copy's bandwidth beyond the cache"),
    (CROP | {"images_per_s": 799_999.0}, "crop_flip of 128x3x32x32"),
])  # fmt: skip
def test_one_row_below_misses_its_target_alone(changes: dict[str, Any], missed: str) -> None:
    words = judge(*(row(**good) for good in ALL.values()), row(**changes))
    assert words == dict.fromkeys(ALL, "reached") | {missed: "not reached"}


@pytest.mark.parametrize(
    "elsewhere", [{"device": "H100"}, {"threads": 1}, {"dtype": "bfloat16"}, {"implementation": "compile"}]
)
def test_other_machines_dtypes_and_implementations_are_not_judged(elsewhere: dict[str, Any]) -> None:
    assert judge(*(row(**changes | elsewhere) for changes in ALL.values())) == dict.fromkeys(ALL, "not measured")


def test_a_verdict_says_what_was_wanted_and_measured() -> None:
    lines = targets.verdicts([row(**CROP), row(**CROP | {"images_per_s": 650_000.0})])
    assert "not reached: crop_flip of 128x3x32x32: at least 800,000 images/s; measured 6.5e+05 images/s" in lines
