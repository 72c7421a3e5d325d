"""One evaluation at several radii, each measured on its own, and the picture of the accuracies over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.attacks import table
from engine.attacks.autoattack import NO_ATTACK
from engine.attacks.pgd import NORMS
from engine.common import pictures
from engine.common.console import Reporter
from engine.common.files import write_atomically
from engine.common.stopping import RunFailed
from engine.config import load
from engine.deployment import opening
from engine.evaluation.evaluate_checkpoint import EvaluationConfig, Report, Results, run
from engine.evaluation.statistics.intervals import CONFIDENCE, wilson
from engine.system.distributed import World

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEVELS = {"Linf": 255, "L2": 1}  # units of the axis in one of images in [0, 1]
_UNITS = {"Linf": "1/255", "L2": "images in [0, 1]"}


class Radius(NamedTuple):
    """A radius as it was given, and its value for images in [0, 1]."""

    text: str
    value: float


class Curves(NamedTuple):
    """Reports by radius, ascending."""

    threat_model: str
    reports: Mapping[Radius, Report]

    @property
    def title(self) -> str:
        """Title of the network, as in its reports."""
        return next(iter(self.reports.values())).title

    def results(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Results by attack and then by the text of the radius; no attack is that of every radius."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for radius, report in self.reports.items():
            for attack, result in report.results.items():
                texts = [each.text for each in self.reports] if attack == NO_ATTACK else [radius.text]
                found.setdefault(attack, {}).update(dict.fromkeys(texts, result))
        return found


def asked(text: str | None) -> list[Radius]:
    """The radii of a list, ascending; none where it is no list. Raises ValueError where one is wrong or twice."""
    if text is None or "," not in text:
        return []
    found: dict[float, Radius] = {}
    for each in map(str.strip, text.split(",")):
        if not each:
            raise ValueError(f"--epsilon: a radius is missing in {text!r:.60}; expected e.g. 2/255,4/255,8/255")
        # An L2 length, of which there may be any: the threat model is the checkpoint's, and is looked at later.
        value = load({"attack": {"threat_model": "L2", "epsilon": each}}).attack.epsilon
        if value in found:
            raise ValueError(f"--epsilon: {found[value].text} and {each} are the same radius")
        found[value] = Radius(each, value)
    return [found[value] for value in sorted(found)]


def evaluated(
    checkpoint: Path,
    config: EvaluationConfig,
    radii: Sequence[Radius],
    reporter: Reporter,
    *,
    out: Path,
    world: World | None = None,
) -> Curves:
    """Evaluate a checkpoint at every radius, the smallest first, as `run` does at one; no attack once.

    Raises as `run` does; ValueError for any of the radii before the first is measured.
    """
    world = world or World()
    loaded = opening.load(checkpoint, model=config.model, weights=config.weights, normalize=config.normalize)
    at = {radius: replace(config, epsilon=radius.text) for radius in radii}
    threat_model, *_ = (each.completed(loaded).attack.threat_model for each in at.values())
    reports: dict[Radius, Report] = {}
    for radius, each in at.items():
        attacks = [attack for attack in table.resolve(config.attacks) if not reports or attack.name != NO_ATTACK]
        if attacks:
            reports[radius] = run(checkpoint, replace(each, attacks=attacks), reporter, out=out, world=world)
    curves = Curves(threat_model, reports)
    if world.is_main:
        path = picture_of(out)
        try:
            write_atomically(path, picture(curves))
        except OSError as error:
            raise RunFailed(f"{path}: cannot be written: {error.strerror}; the report is complete") from None
    return curves


def picture_of(report: Path) -> Path:
    """The path of a report's picture."""
    return report.with_name(report.name.removesuffix(".json") + ".epsilons.png")


def picture(curves: Curves) -> bytes:
    """PNG of the accuracy over the radius, a line with its band for each attack, from the accuracy under none."""
    with pictures.style():
        return pictures.png(_figure(curves))


def _figure(curves: Curves) -> Figure:
    lines = _lines(curves)
    figure = pictures.new_figure(3.9 + 0.2 * (len(lines) // 2))
    axes = figure.subplots()
    for attack, points in lines.items():
        radii, accuracies = zip(*[(radius, result["accuracy"]) for radius, result in points], strict=True)
        low, high = zip(*[wilson(result["correct"], result["n"]) for _, result in points], strict=True)
        (line,) = axes.plot(radii, accuracies, marker=".", label=pictures.shortened(attack, 40))
        axes.fill_between(radii, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    norm, unit = NORMS[curves.threat_model].name, _UNITS[curves.threat_model]
    axes.set(xlabel=f"epsilon ({norm}, {unit})", ylabel=f"accuracy, with {CONFIDENCE:.0%} intervals")
    axes.set_ylim(-0.02, 1.02)  # a curve along an edge must be seen
    axes.set_xlim(left=0)
    pictures.in_percent(axes.yaxis)
    counts = sorted({result["n"] for points in lines.values() for _, result in points})
    n = " and ".join(f"{count:,}" for count in counts)
    figure.suptitle(pictures.wrapped(f"{curves.title}: accuracy under attack, n = {n}"), fontsize=11)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def points_of(curves: Curves) -> dict[str, list[tuple[float, float]]]:
    """(radius in units of the axis, accuracy) by title, from 0 on where the accuracy under no attack is known."""
    lines = _lines(curves)
    return {title: [(radius, result["accuracy"]) for radius, result in points] for title, points in lines.items()}


def _lines(curves: Curves) -> dict[str, list[tuple[float, dict[str, Any]]]]:
    """The results in place of the accuracies of `points_of`."""
    found: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    every: list[Results] = [report.results for report in curves.reports.values()]
    natural = [(0.0, results[NO_ATTACK]) for results in every if NO_ATTACK in results]
    for radius, report in curves.reports.items():
        for attack, result in report.results.items():
            if attack != NO_ATTACK:
                line = found.setdefault(table.title(attack, result), [*natural])
                line.append((radius.value * _LEVELS[curves.threat_model], result))
    return found or {table.title(NO_ATTACK, {}): natural}
