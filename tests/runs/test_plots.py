"""Pictures of a run: the rows' numbers, marks at the right epochs, and axes in percent and whole epochs."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import StepPatch
from PIL import Image

from engine.common.pictures import DARK, LIGHT, style
from engine.runs.reporting import plots
from engine.runs.reporting.reading import RunFiles
from engine.runs.run_directory import RunDir
from tests.runs.made_runs import made_run

KEYS = {
    "loss": ["loss"],
    "accuracy": ["natural_accuracy", "robust_accuracy", "train_student_adversarial_accuracy"],
    "figure-1": ["probe_teacher_natural_accuracy", "probe_teacher_adversarial_accuracy"],
    "figure-3": ["probe_teacher_adversarial_accuracy", "probe_student_adversarial_accuracy"],
}


def history(path: Path, epochs: int, best: int | None = None, **keys: Any) -> plots.EpochHistory:
    run = RunFiles(made_run(path, epochs=epochs, **keys))
    return plots.EpochHistory(run.epochs, run.config, best)


@pytest.fixture
def axes() -> Iterator[Axes]:
    with style():
        yield Figure(figsize=(5, 3.4), layout="constrained").subplots()


def is_mark(line: Line2D) -> bool:
    """True for the line of a mark, which no legend names."""
    return str(line.get_label()).startswith("_")


def curves(axes: Axes) -> list[list[tuple[float, float]]]:
    """Points of the curves, without the marks."""
    points = [np.asarray(line.get_xydata()) for line in axes.get_lines() if not is_mark(line)]
    return [[(x, y) for x, y in each.tolist()] for each in points]


@pytest.mark.parametrize("name", KEYS)
def test_curves_are_the_rows(name: str, axes: Axes, tmp_path: Path) -> None:
    of_run = history(tmp_path / "run", 10, best=7, lr=0.05)
    plots.PANELS[name].draw(axes, of_run)
    assert curves(axes) == [[(row["epoch"], row[key]) for row in of_run.rows] for key in KEYS[name]]
    title = axes.get_title()
    assert "iad1, resnet8, cifar10, L-inf epsilon 8/255" in title
    assert ("n = 500, PGD-10" in title) == (name == "accuracy")


@pytest.mark.parametrize("rare", [0.0, 0.01])
def test_the_kinds_of_samples(rare: float, axes: Axes, tmp_path: Path) -> None:
    of_run = history(tmp_path / "run", 4)
    for row in of_run.rows:
        row["probe_cases"]["only_adversarial_right"] = rare
    plots.PANELS["figure-2"].draw(axes, of_run)
    legend = axes.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == [
        "T(x) = y, T(x~) = y", "T(x) = y, T(x~) ≠ y", "T(x) ≠ y, T(x~) ≠ y", *["T(x) ≠ y, T(x~) = y"] * (rare > 0),
    ]  # fmt: skip
    assert curves(axes)[1] == [(row["epoch"], row["probe_cases"]["only_natural_right"]) for row in of_run.rows]


@pytest.mark.parametrize(("epochs", "chosen"), [(1, [1]), (2, [1, 2]), (9, [1, 5, 9])])
def test_alpha_in_the_first_the_middle_and_the_last_epoch(
    epochs: int, chosen: list[int], axes: Axes, tmp_path: Path
) -> None:
    of_run = history(tmp_path / "run", epochs)
    plots.PANELS["figure-4"].draw(axes, of_run)
    stairs = [patch for patch in axes.patches if isinstance(patch, StepPatch)]
    drawn = [(patch.get_label(), list(patch.get_data()[0])) for patch in stairs]
    rows = {row["epoch"]: row for row in of_run.rows}
    assert drawn == [(f"epoch {epoch}", rows[epoch]["probe_alpha_histogram"]) for epoch in chosen]
    assert "beta = 0.1" in axes.get_title()


def test_the_end_of_the_warm_up_and_the_best_epoch_are_marked(axes: Axes, tmp_path: Path) -> None:
    of_run = history(tmp_path / "run", 10, best=7)
    assert of_run.marks == {
        "warm-up (ard) ends": 3.5,
        "best epoch: 7": 7,
    }  # made_run warms up in 0.3 of the epochs
    plots.PANELS["loss"].draw(axes, of_run)
    at = [np.asarray(line.get_xdata())[0] for line in axes.get_lines() if is_mark(line)]
    assert at == [3.5, 7]
    assert [text.get_text() for text in axes.texts] == ["warm-up (ard) ends", "best epoch: 7"]
    assert history(tmp_path / "at", 3, method="at").marks == {}


@pytest.mark.parametrize("epochs", [1, 2, 18, 200])
def test_axes_are_in_whole_epochs_and_percent(epochs: int, axes: Axes, tmp_path: Path) -> None:
    plots.PANELS["accuracy"].draw(axes, history(tmp_path / "run", epochs, best=1))
    axes.figure.canvas.draw()
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert all(tick == int(tick) and 1 <= tick <= epochs for tick in ticks)
    assert 1 <= len(ticks) <= 9
    assert [text.get_text() for text in axes.get_yticklabels()][1:-1] == ["0%", "20%", "40%", "60%", "80%", "100%"]
    first = axes.get_lines()[0]
    assert (first.get_marker() == "o") == (epochs <= 40)  # a point alone is seen
    assert low < 1
    assert high > epochs


def test_labels_lie_inside_the_picture_and_beside_each_other(tmp_path: Path) -> None:
    for best in range(1, 21):
        of_run = history(tmp_path / str(best), 20, best=best)
        with style():
            figure = Figure(figsize=(5, 3.4), layout="constrained")
            panel = figure.subplots()
            plots.PANELS["loss"].draw(panel, of_run)
            figure.canvas.draw()
            boxes = [text.get_window_extent() for text in panel.texts]
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
        assert not boxes[0].overlaps(boxes[1]), best
        assert not any(box.overlaps(panel.title.get_window_extent()) for box in boxes), best


def test_files_and_what_is_left_out(tmp_path: Path) -> None:
    with_teacher, without = made_run(tmp_path / "iad1"), made_run(tmp_path / "at", method="at")
    assert plots.draw(RunDir(with_teacher)) == ["loss.png", "accuracy.png", "reliability.png"]
    assert plots.draw(RunDir(without)) == ["loss.png", "accuracy.png"]
    (without / "metrics.jsonl").write_text(json.dumps({"event": "step", "epoch": 1}) + "\n")
    assert plots.draw(RunDir(without)) == []
    for name in plots.FILES:
        with Image.open(with_teacher / name) as picture:
            assert picture.size[0] == 1000  # two pixels for each where it is shown 500 wide


def test_a_page_has_each_panel_in_both_palettes(tmp_path: Path) -> None:
    pictures = plots.pages_of(history(tmp_path / "run", 2), (LIGHT, DARK))
    assert set(pictures) == set(plots.PANELS)
    for both in pictures.values():
        corners = [Image.open(io.BytesIO(content)).convert("RGB").getpixel((0, 0)) for content in both]
        assert corners == [tuple(bytes.fromhex(each.background[1:])) for each in (LIGHT, DARK)]
