"""The benchmark of the pipelines: arithmetic with numbers made by hand, protocol, and a small run of it."""

from __future__ import annotations

import csv
import mmap
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from bench import gate, pipelines
from bench.lib import loading, memory, photographs, timing
from bench.lib.machine import Facts
from bench.lib.output import chart, csv_rows, targets
from bench.lib.output.csv_rows import PipelineRow
from engine.pipelines import ffcv
from engine.pipelines.reading import beton
from engine.pipelines.splits import Split
from tests.bench.readme import documented

CPU = torch.device("cpu")
FACTS = Facts(
    date="2026-01-02T03:04:05+00:00", commit="abc", device="cpu", processor="A CPU", cores=4, threads=2,
    python="3.12", torch="2.11", triton="",
)  # fmt: skip


def rows(samples: dict[str, Sequence[tuple[float, float]]], images: int = 1000) -> list[PipelineRow]:
    return csv_rows.pipeline_rows(FACTS, "cifar10", 32, 128, images, samples)


def test_a_row_holds_what_its_rounds_say() -> None:
    baseline, tensor = rows(
        {"dataloader": [(10, 6), (20, 9), (40, 12)], "tensor": [(1, 0.5), (4, 0.25), (5, 2)]}, images=2000
    )
    assert (baseline.pipeline, tensor.pipeline) == ("dataloader", "tensor")
    assert (baseline.speedup, tensor.speedup) == (1, 8)  # of the ratios 10, 5 and 8
    assert (baseline.images_per_s, tensor.images_per_s) == (100, 500)
    assert (tensor.q10_images_per_s, tensor.q90_images_per_s) == pytest.approx((420, 1700))
    assert (baseline.cpu_s_per_10k_images, tensor.cpu_s_per_10k_images) == (45, 2.5)
    assert (tensor.data, tensor.size, tensor.batch_size, tensor.images, tensor.rounds) == (
        "cifar10",
        32,
        128,
        2000,
        3,
    )
    assert tensor.date == FACTS["date"]


def test_the_file_has_the_documented_columns(tmp_path: Path) -> None:
    csv_rows.write(tmp_path / "pipelines.csv", rows({"dataloader": [(1, 1), (1, 1)], "ffcv": [(1, 1), (3, 2)]}))
    with (tmp_path / "pipelines.csv").open(newline="") as file:
        _, second = csv.DictReader(file)
    shared = [*Facts.__annotations__]
    assert list(second) == [field.name for field in fields(PipelineRow)] == shared + documented("pipelines.csv")
    assert (second["pipeline"], float(second["cpu_s_per_10k_images"])) == ("ffcv", 15)


def test_verdicts_are_those_of_the_speedups_on_two_threads() -> None:
    (made,) = rows({"dataloader": [(1, 1), (1, 1)]})
    measured = [
        replace(made, pipeline="tensor", speedup=30.0),
        replace(made, pipeline="ffcv", speedup=6.9),
        replace(made, pipeline="dali", speedup=4.0, threads=3),
        replace(made, pipeline="ffcv", data="jpeg224", speedup=1.4),
        replace(made, pipeline="dali", data="jpeg224", speedup=1.2),
    ]
    words = [line.partition(":")[0] for line in targets.pipeline_verdicts(measured, 399.0)]
    assert words == ["reached", "not reached", "not measured", "reached", "not reached", "reached"]
    assert targets.pipeline_verdicts(measured, 401.0)[-1].startswith("not reached: ")
    assert targets.pipeline_verdicts(measured, None)[-1].startswith("not measured: ")
    assert "at least 7x; measured 6.9x" in targets.pipeline_verdicts(measured, None)[1]


def test_rounds_are_interleaved_and_the_first_is_not_counted() -> None:
    begun: list[tuple[str, int]] = []

    def epoch(name: str) -> Any:
        def run(number: int) -> Iterator[int]:
            begun.append((name, number))
            yield from range(3)

        return run

    samples = pipelines.measure({name: epoch(name) for name in "ab"}, 2, CPU)
    assert begun == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 2, "b": 2}
    assert all(each.wall >= 0 and each.cpu >= 0 for taken in samples.values() for each in taken)


def test_processors_seconds_are_those_of_children_too() -> None:
    before = timing.processor_seconds()
    code = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert 0.3 <= timing.processor_seconds() - before < 30


def test_the_baseline_awaits_its_workers_and_gives_every_image_once() -> None:
    images = Split(torch.arange(20 * 12).view(20, 2, 2, 3).to(torch.uint8), torch.arange(20), tuple("ab"))
    from torchvision.transforms import ToTensor

    epoch = loading.baseline(loading.PillowImages(images, ToTensor()), CPU)
    batches = list(epoch(0))
    labels = torch.cat([batch.labels for batch in batches])
    views = torch.cat([batch.x_nat for batch in batches])
    assert labels.sort().values.tolist() == list(range(20))
    assert torch.equal(views, (images.images[labels].permute(0, 3, 1, 2).float() / 255))
    assert multiprocessing.active_children() == []


def test_made_photographs_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    one, two, other = (photographs.make(tmp_path / str(number), 6, seed) for number, seed in enumerate((0, 0, 1)))
    files = sorted(path.relative_to(one) for path in one.rglob("*.jpg"))
    assert len(files) == 6 + 2 * len(photographs.CLASSES)
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    assert all((one / file).read_bytes() != (other / file).read_bytes() for file in files)
    sizes = [(one / file).stat().st_size for file in files]
    assert 12_000 < min(sizes) <= max(sizes) < 60_000
    with Image.open(one / files[0]) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (224, 224, 3)
    assert pixels.std() > 20


def test_a_beton_of_the_photographs_has_their_very_bytes(tmp_path: Path) -> None:
    try:
        ffcv.check_installed()
    except ValueError as error:
        pytest.skip(str(error))
    found = loading.jpeg224(tmp_path, CPU, 6)
    assert list(found.epochs)[:2] == ["dataloader", "ffcv"]
    written = beton.read(tmp_path / "photographs.beton")
    files = sorted((tmp_path / "photographs" / "train").rglob("*.jpg"))
    assert [written.encoded(number) for number in range(6)] == [file.read_bytes() for file in files]


def test_what_is_absent_is_told_and_not_timed() -> None:
    def absent() -> Any:
        raise ValueError("pipeline: ffcv needs this")

    found = loading.Candidates(1, 1)
    found.offer("ffcv", absent)
    assert (found.epochs, found.absent) == ({}, ["not timed: ffcv: pipeline: ffcv needs this"])


def test_the_peak_is_what_was_held_at_most() -> None:
    most = memory.mebibytes("VmHWM")
    # Pages of its own: the C library may serve what it is asked for from memory that it had kept.
    with mmap.mmap(-1, int(most - memory.mebibytes("VmRSS") + 100) << 20) as held:
        held[:: mmap.PAGESIZE] = bytes(len(range(0, len(held), mmap.PAGESIZE)))
    assert 90 < memory.mebibytes("VmHWM") - most < 110
    assert memory.mebibytes("VmRSS") < memory.mebibytes("VmHWM")


def test_failing_tests_stop_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Sequence[Path], Sequence[str]]] = []

    def fail(paths: Sequence[Path], names: Sequence[str], device_type: str) -> bool:
        asked.append((paths, names))
        return False

    monkeypatch.setattr(gate, "tests_pass", fail)
    outcome = CliRunner().invoke(pipelines.main, ["--out", str(tmp_path / "out"), "--device", "cpu"])
    assert outcome.exit_code == 1
    assert "nothing is timed" in outcome.output
    assert not (tmp_path / "out").exists()
    ((paths, names),) = asked
    assert [path.name for path in paths] == ["test_contract.py", "test_tensor.py"]
    assert all(path.exists() for path in paths)
    assert tuple(names) == ("tensor", "ffcv", "dali", "image")


def test_a_small_run_writes_rows_and_a_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = chart.draw_pipelines

    def draw_and_count(path: Path, made: Sequence[PipelineRow]) -> None:
        drawn.append(len(made))
        draw(path, made)

    monkeypatch.setattr(gate, "tests_pass", lambda *_: True)
    monkeypatch.setattr(chart, "draw_pipelines", draw_and_count)
    monkeypatch.setattr(pipelines, "QUICK_IMAGES", 12)
    arguments = ["--quick", "--rounds", "2", "--data", "jpeg224", "--device", "cpu", "--out", str(tmp_path)]
    outcome = CliRunner().invoke(pipelines.main, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    with (tmp_path / "pipelines.csv").open(newline="") as file:
        made = list(csv.DictReader(file))
    assert made[0]["pipeline"] == "dataloader"
    assert {(row["data"], row["images"], row["size"]) for row in made} == {("jpeg224", "12", "224")}
    assert drawn == [len(made)]
    with Image.open(tmp_path / "pipelines.png") as image:
        assert image.width > 500
    assert re.search(r"^ +jpeg224 +dataloader ", outcome.output, re.MULTILINE)
    assert "not measured: peak memory" in outcome.output
