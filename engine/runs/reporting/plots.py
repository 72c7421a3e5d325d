"""Pictures of a run: loss and accuracies by epoch, and how reliable the teacher was."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from engine.common.files import write_atomically
from engine.runs.run_directory import RunDir
from engine.training.telemetry import CASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[dict[str, Any]]


def draw(run: RunDir) -> list[str]:
    """Draw the pictures of a run from its metrics.jsonl; names of the files written."""
    rows = [row for row in run.rows() if row["event"] == "epoch"]
    if not rows:
        return []
    pictures: dict[str, tuple[Callable[[Axes, Rows], None], ...]] = {
        "loss.png": (_loss,),
        "accuracy.png": (_accuracy,),
    }
    if any("probe_cases" in row for row in rows):
        pictures["reliability.png"] = (_cases, _on_adversarial, _alpha)
    for name, panels in pictures.items():
        _picture(run, name, panels, rows)
    return list(pictures)


def _picture(run: RunDir, name: str, panels: Sequence[Callable[[Axes, Rows], None]], rows: Rows) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        panel(axes, rows)
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_atomically(run.path / name, content.getvalue())


def _line(axes: Axes, rows: Rows, key: str, label: str, **style: Any) -> None:
    points = [(row["epoch"], row[key]) for row in rows if key in row]
    if points:
        axes.plot(*zip(*points, strict=True), marker=".", label=label, **style)


def _finish(axes: Axes, title: str, ylabel: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(title=title, xlabel="epoch", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()


def _loss(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "loss", "training loss")
    _finish(axes, "Loss", "loss")


def _accuracy(axes: Axes, rows: Rows) -> None:
    where = rows[-1]["measured_on"]
    _line(axes, rows, "natural_accuracy", f"natural ({where})")
    _line(axes, rows, "robust_accuracy", f"robust ({where})")
    _line(axes, rows, "train_student_adversarial_accuracy", "on x~ (train)", linestyle="--")
    axes.set_ylim(-0.02, 1.02)  # a curve along an edge must be seen
    _finish(axes, "Accuracy of the student", "accuracy")


def _cases(axes: Axes, rows: Rows) -> None:
    labels = ("T(x) = y, T(x~) = y", "T(x) = y, T(x~) ≠ y", "T(x) ≠ y, T(x~) ≠ y", "T(x) ≠ y, T(x~) = y")
    for case, label in zip(CASES, labels, strict=True):
        axes.plot(
            [row["epoch"] for row in rows], [row["probe_cases"][case] for row in rows], marker=".", label=label
        )
    axes.set_ylim(-0.02, 1.02)  # a curve along an edge must be seen
    _finish(axes, "Is the teacher right? (cf. Figure 2b)", "share of probe images")


def _on_adversarial(axes: Axes, rows: Rows) -> None:
    _line(axes, rows, "probe_teacher_natural_accuracy", "teacher on x")
    _line(axes, rows, "probe_teacher_adversarial_accuracy", "teacher on x~")
    _line(axes, rows, "probe_student_adversarial_accuracy", "student on x~")
    axes.set_ylim(-0.02, 1.02)  # a curve along an edge must be seen
    _finish(axes, "Accuracy on the probe (cf. Figures 1a and 3)", "accuracy")


def _alpha(axes: Axes, rows: Rows) -> None:
    for row, label in ((rows[0], "first epoch"), (rows[-1], "last epoch")):
        shares = row["probe_alpha_histogram"]
        axes.stairs(shares, [index / len(shares) for index in range(len(shares) + 1)], label=f"alpha, {label}")
    axes.set(title="Trust in the teacher (cf. Figure 4, left)", xlabel="alpha", ylabel="share of probe images")
    axes.grid(alpha=0.3)
    axes.legend()
