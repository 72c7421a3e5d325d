"""Pictures of a run: loss and accuracies by epoch, and, with a robust teacher, the paper's Figures 1 to 4."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.attacks import table
from engine.attacks.pgd import NORMS
from engine.common.files import write_atomically
from engine.common.lookup import look_up
from engine.common.pictures import LIGHT, Palette, new_figure, png, style
from engine.config import RunConfig, load, read_file
from engine.runs.reporting import axes as of_epochs
from engine.runs.reporting.axes import EpochRows
from engine.runs.run_directory import RunDir
from engine.training.telemetry import CASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The last case is drawn only where there is any, which the paper says there is not.
_LABELS = ("T(x) = y, T(x~) = y", "T(x) = y, T(x~) ≠ y", "T(x) ≠ y, T(x~) ≠ y", "T(x) ≠ y, T(x~) = y")
_CASES = dict(zip(CASES, _LABELS, strict=True))
_RARE = CASES[-1]
_HEIGHT = 3.4


@dataclass(frozen=True)
class EpochHistory:
    """Epochs of a run, and what its pictures say of it. best: the best epoch, where it is known."""

    rows: EpochRows
    config: RunConfig
    best: int | None = None

    @property
    def subject(self) -> str:
        """Method, model, data and epsilon."""
        return f"{self.config.method}, {self.config.model}, {self.config.dataset}, {self.ball}"

    @property
    def ball(self) -> str:
        """Epsilon of the training and of the evaluation after each epoch."""
        spec = self.config.attack
        norm = look_up("attack.threat_model", spec.threat_model, NORMS)
        return f"{norm.name} epsilon {norm.length(spec.epsilon)}"

    @property
    def attack(self) -> str:
        """Attack of the evaluation after each epoch."""
        return table.find(self.config.eval.attack).title

    @property
    def images(self) -> str:
        """Images of the evaluation after each epoch."""
        row = self.rows[-1]
        n = f", n = {row['measured_n']:,}" if row.get("measured_n") else ""
        return f"{row.get('measured_on', 'held-out')} images{n}"

    @property
    def marks(self) -> dict[str, float]:
        """Epochs that a picture marks: the end of the warm-up, behind its last epoch, and the best one."""
        found = {
            f"warm-up ({before.get('phase')}) ends": before["epoch"] + 0.5
            for before, after in pairwise(self.rows)
            if before.get("phase") != after.get("phase")
        }
        return found if self.best is None else found | {f"best epoch: {self.best}": self.best}


@dataclass(frozen=True)
class Panel:
    """One panel of a picture. alt: what is seen on it. needs: keys of rows without which it is not drawn."""

    draw: Callable[[Axes, EpochHistory], None]
    alt: str
    needs: tuple[str, ...] = ()
    height: float = _HEIGHT

    def is_possible(self, history: EpochHistory) -> bool:
        """True if some row has every key that is needed."""
        return any(all(row.get(key) is not None for key in self.needs) for row in history.rows)


def draw(run: RunDir, best: Mapping[str, Any] | None = None) -> list[str]:
    """Draw the pictures of a run from its metrics.jsonl; names of those written. best: the best epoch's row."""
    rows = [row for row in run.rows() if row["event"] == "epoch"]
    if not rows:
        return []
    history = EpochHistory(rows, load(read_file(run.config)), best["epoch"] if best else None)
    written = []
    for name, panels in FILES.items():
        if possible := [panel for panel in map(PANELS.__getitem__, panels) if panel.is_possible(history)]:
            write_atomically(run.path / name, picture(possible, history))
            written.append(name)
    return written


def picture(panels: Sequence[Panel], history: EpochHistory, palette: Palette = LIGHT) -> bytes:
    """PNG of the panels, below each other."""
    heights = [panel.height for panel in panels]
    with style(palette):
        figure = new_figure(sum(heights))
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
        for panel, (axes,) in zip(panels, grid, strict=True):
            panel.draw(axes, history)
        return png(figure)


def is_drawn_anew(path: Path) -> bool:
    """True for a picture that a run's rows give."""
    return path.name in FILES


# ---------------------------------------------------------------- panels


def _finish(axes: Axes, history: EpochHistory, title: str, *, columns: int = 2) -> None:
    """Epochs, marks, title and legend of a panel by epoch."""
    of_epochs.epochs(axes, (row["epoch"] for row in history.rows))
    taken = of_epochs.marks(axes, history.marks)
    axes.set_title(f"{title}\n{history.subject}", pad=8 + taken)
    of_epochs.legend_below(axes, columns)


def _loss(axes: Axes, history: EpochHistory) -> None:
    of_epochs.line(axes, history.rows, "loss", "training loss")
    axes.set_ylabel("loss")
    _finish(axes, history, "Training loss")


def _accuracy(axes: Axes, history: EpochHistory) -> None:
    of_epochs.line(axes, history.rows, "natural_accuracy", "natural images")
    of_epochs.line(axes, history.rows, "robust_accuracy", "under attack")
    of_epochs.line(
        axes,
        history.rows,
        "train_student_adversarial_accuracy",
        "x~ of the training, as trained on",
        linestyle="--",
    )
    of_epochs.percent(axes, "accuracy")
    _finish(axes, history, f"Accuracy on {history.images}, {history.attack}")


def _teacher(axes: Axes, history: EpochHistory) -> None:
    of_epochs.line(axes, history.rows, "probe_teacher_natural_accuracy", "natural images x")
    of_epochs.line(axes, history.rows, "probe_teacher_adversarial_accuracy", "the student's x~")
    of_epochs.percent(axes, "teacher's accuracy")
    _finish(axes, history, "Figure 1 (a): the teacher on x and x~")


def _cases(axes: Axes, history: EpochHistory) -> None:
    of_cases = [
        {"epoch": row["epoch"]} | dict(row["probe_cases"]) for row in history.rows if row.get("probe_cases")
    ]
    for case, label in _CASES.items():
        if case != _RARE or any(row.get(case) for row in of_cases):
            of_epochs.line(axes, of_cases, case, label)
    of_epochs.percent(axes, "share of the probe")
    _finish(axes, history, "Figure 2 (b): kinds of samples")


def _on_adversarial(axes: Axes, history: EpochHistory) -> None:
    of_epochs.line(axes, history.rows, "probe_teacher_adversarial_accuracy", "teacher")
    of_epochs.line(axes, history.rows, "probe_student_adversarial_accuracy", "student")
    of_epochs.percent(axes, "accuracy on x~")
    _finish(axes, history, f"Figure 3, left: {history.attack} training accuracy")


def _alpha(axes: Axes, history: EpochHistory) -> None:
    from matplotlib.ticker import PercentFormatter

    rows = [row for row in history.rows if row.get("probe_alpha_histogram")]
    chosen = {row["epoch"]: row for row in (rows[0], rows[(len(rows) - 1) // 2], rows[-1])}
    for (epoch, row), dashes in zip(chosen.items(), ("-", "--", ":"), strict=False):
        shares = row["probe_alpha_histogram"]
        edges = [index / len(shares) for index in range(len(shares) + 1)]
        axes.stairs(shares, edges, label=f"epoch {epoch}", linestyle=dashes, linewidth=1.6)
    axes.set(xlabel="alpha = T(x~)[y]^beta", ylabel="share of the probe", xlim=(-0.02, 1.02), ylim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    beta = history.config.loss.beta
    axes.set_title(f"Figure 4, left: alpha, beta = {beta:g}\n{history.subject}", pad=8)
    of_epochs.legend_below(axes, 3)


_PROBE = "on the probe, a fixed set of training images"
PANELS = {
    "loss": Panel(_loss, "Training loss by epoch.", ("loss",)),
    "accuracy": Panel(
        _accuracy,
        "The student's accuracy by epoch, in percent: on natural held-out images, on the same images under "
        "attack, and on the adversarial images of the training.",
        ("natural_accuracy",),
        3.8,
    ),
    "figure-1": Panel(
        _teacher,
        f"The teacher's accuracy by epoch {_PROBE}: on natural images, and on the student's adversarial images.",
        ("probe_teacher_adversarial_accuracy",),
    ),
    "figure-2": Panel(
        _cases,
        f"Shares of the kinds of samples by epoch {_PROBE}: the teacher right on both the natural and the "
        "adversarial image, on the natural one alone, or on neither.",
        ("probe_cases",),
        3.6,
    ),
    "figure-3": Panel(
        _on_adversarial,
        f"Accuracy of teacher and student by epoch on the student's adversarial images, {_PROBE}.",
        ("probe_student_adversarial_accuracy", "probe_teacher_adversarial_accuracy"),
    ),
    "figure-4": Panel(
        _alpha,
        f"Distribution of alpha {_PROBE}, in the first, the middle and the last epoch.",
        ("probe_alpha_histogram",),
    ),
}
"""Every panel of a run's pictures, by the name of the picture that a page shows of it alone."""
FILES = {
    "loss.png": ("loss",),
    "accuracy.png": ("accuracy",),
    "reliability.png": ("figure-1", "figure-2", "figure-3", "figure-4"),
}
"""Pictures that a run writes, and their panels."""


def pages_of(history: EpochHistory, palettes: Iterable[Palette]) -> Mapping[str, tuple[Any, ...]]:
    """Every possible panel as a picture of its own, in each palette."""
    palettes = tuple(palettes)
    return {
        name: tuple(picture([panel], history, palette) for palette in palettes)
        for name, panel in PANELS.items()
        if history.rows and panel.is_possible(history)
    }
