"""The head of a report in sentences, and the table of all runs by attack."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from engine.attacks.pgd import PGD_NAME
from engine.evaluation.statistics.intervals import CONFIDENCE
from engine.runs.reporting.lines import ComparedLine
from engine.runs.reporting.page import PageSection, details, note
from engine.runs.reporting.reading import TEACHER_FOLDERS, AccuracyMeasure, RunFiles
from engine.runs.reporting.tables import Cell, Name, Number, Percent, ReportTable

# From the weakest to the strongest; attacks between stand in the order in which they were measured.
_ORDER = {"natural": 0, "fgsm": 1, "fgsm-rs": 1, "cw": 4, "aa-fast": 6, "aa:tf32": 7, "aa:package": 7, "aa": 8}
_PGD, _OTHER = 2, 5
_NOT_COMPARED = (
    "{} runs: no attack was measured on all of them with the same data, n and epsilon, so none is called the best."
)
_MOST_SENTENCES = 4
"""Runs of which each has a sentence of its own where none is called the best."""
_FACTS = ("best epoch", "selected on", "training", "images/s")


def headline(lines: Sequence[ComparedLine]) -> list[str]:
    """Sentences on the best robust accuracy: of one run what was trained, of several which is best."""
    students = [line for line in lines if not line.role]
    if len(students) == 1:
        return [_alone(students[0]), *_beside_teacher(students[0], lines)]
    if not students:
        return []
    best = _best_of(students)
    if best:
        return [best]
    each = (f"{line.label}: {_alone(line)}" for line in students[:_MOST_SENTENCES])
    return [_NOT_COMPARED.format(len(students)), *each]


def comparison(lines: Sequence[ComparedLine]) -> PageSection:
    """A line for each run by attack, n and epsilon; the seeds of a group are folded."""
    measures = columns(lines)
    is_one = len(lines) == 1
    section = PageSection("Results" if is_one else "Runs compared")
    section.add_table(_table("results" if is_one else "runs-compared", lines, measures))
    section.add(note(_explanation(lines)))
    for line in lines:
        if line.is_group:
            table = ReportTable(f"seeds-{line.path.name}", *_of_seeds(line, measures))
            section.tables.append(table)
            section.add(details(f"Each of the {len(line.runs)} seeds of {line.label}", table.html()))
    if unfinished := [line.label for line in lines if not all(run.is_finished for run in line.runs)]:
        section.add(note(f"Not finished: {', '.join(unfinished)}."))
    return section


def columns(lines: Iterable[ComparedLine]) -> list[AccuracyMeasure]:
    """Measures of the lines, from the weakest attack on.

    Those that chose the best epoch are among them where a line has no others.
    """
    lines = list(lines)
    needs_held_out = any(not any(line.tested) for line in lines)
    found = [line.every if needs_held_out else line.tested for line in lines]
    measures = dict.fromkeys(each.measure for of_line in found for of_run in of_line for each in of_run)
    return sorted(measures, key=lambda measure: (measure.on != "test images", _strength(measure)))


def _strength(measure: AccuracyMeasure) -> tuple[int, int]:
    """Place of an attack in the table, and its steps."""
    if match := PGD_NAME.fullmatch(measure.attack):
        return _PGD, int(match[1])
    return _ORDER.get(measure.attack, _OTHER), 0


def _table(name: str, lines: Sequence[ComparedLine], measures: Sequence[AccuracyMeasure]) -> ReportTable:
    rows: list[list[Cell]] = []
    for line in lines:
        label = f"{line.label}, {len(line.runs)} seeds" if line.is_group else line.label
        rows.append([Name(label, str(line.path)), *map(line.cell, measures), *_facts(line.runs)])
    return ReportTable(name, ("run", *_heads(measures), *_FACTS), rows)


def _of_seeds(line: ComparedLine, measures: Sequence[AccuracyMeasure]) -> tuple[Sequence[str], list[list[Cell]]]:
    rows: list[list[Cell]] = []
    for run in line.runs:
        of_run = {each.measure: each.percent for each in (*run.held_out, *run.tested)}
        name = Name(f"seed {run.config.seed}", str(run.path))
        rows.append([name, *map(of_run.get, measures), *_facts([run])])
    return ("seed", *_heads(measures), *_FACTS), rows


def _heads(measures: Sequence[AccuracyMeasure]) -> list[str]:
    """Heads of columns: the data where there are several, and images where they are not those of the test."""
    several = len({measure.data for measure in measures}) > 1
    heads = []
    for measure in measures:
        on = "" if measure.on == "test images" else measure.on
        heads.append("\n".join(filter(None, (measure.title, several * measure.data, on, *measure.numbers))))
    return heads


def _facts(runs: Sequence[RunFiles]) -> list[Cell]:
    """Best epoch, the images that chose it, time of training and speed, of one run or of several on average."""
    if not runs:
        return [None, None, None, None]
    best = [run.best["epoch"] for run in runs if run.best]
    epochs = f"{min(best)} to {max(best)}" if len(set(best)) > 1 else None
    chosen = sorted({run.selected_on for run in runs if run.best}) or ["not finished"]
    seconds = [time for run in runs if (time := seconds_of(run)) is not None]
    speeds = [speed for run in runs if (speed := _speed(run)) is not None]
    mean = statistics.mean(seconds) if seconds else None
    return [
        epochs or (best[0] if best else None),
        ", ".join(chosen),
        None if mean is None else Number(mean, duration(mean)),
        Number(statistics.mean(speeds), f"{statistics.mean(speeds):,.0f}") if speeds else None,
    ]


def seconds_of(run: RunFiles) -> float | None:
    """Time of the steps of all epochs."""
    found = [row["seconds"] for row in run.epochs if "seconds" in row]
    return sum(found) if found else None


def _speed(run: RunFiles) -> float | None:
    """Images per second over all epochs."""
    timed = [row for row in run.epochs if "images_per_second" in row and row.get("seconds")]
    seconds = sum(row["seconds"] for row in timed)
    return sum(row["images_per_second"] * row["seconds"] for row in timed) / seconds if seconds else None


def duration(seconds: float) -> str:
    """A time in words, e.g. 2 h 05 min."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60:02d} min"


# ---------------------------------------------------------------- sentences


def _alone(line: ComparedLine) -> str:
    run, measure = line.first, _strongest(line)
    if run is None:
        begin = f"The checkpoint {line.label}"
    else:
        config = run.config
        seeds = f", {len(line.runs)} seeds" if line.is_group else ""
        begin = f"{config.method} trained {config.model} on {config.dataset} ({len(run.epochs)} epochs{seeds})"
        left = sum(not each.is_finished for each in line.runs)
        if left and line.is_group:
            return f"{begin}; {left} of {len(line.runs)} seeds are not finished."
        if left:
            return f"{begin}; it is not finished: {len(run.epochs)} of {config.epochs} epochs so far."
    if measure is None:
        return f"{begin}; no accuracy under attack was measured."
    others = _lower_on_fewer(line, measure)
    return f"{begin}: robust accuracy {_value(line, measure)}, {measure.text}{_chosen(line)}.{others}"


def _value(line: ComparedLine, measure: AccuracyMeasure) -> str:
    """An accuracy in words, with its interval or its spread."""
    cell = line.cell(measure)
    if not isinstance(cell, Percent):
        return str(cell)
    if cell.deviation is not None:
        return f"{cell.text} (mean and standard deviation of {cell.seeds} seeds)"
    return f"{cell.text} ({CONFIDENCE:.0%} interval {cell.interval}%)" if cell.interval else cell.text


def _chosen(line: ComparedLine) -> str:
    run = line.first
    if run is None or not run.best:
        return ""
    epoch = "best epochs" if line.is_group else f"best epoch {run.best['epoch']}"
    doubt = ", so that it tends to be too high" if run.selected_on == "test" else ""
    return f"; {epoch}, selected on {run.selected_on} images{doubt}"


def _strongest(line: ComparedLine) -> AccuracyMeasure | None:
    """Measure of the robust accuracy: the lowest of those on the most images, at the epsilon of the training.

    On test images where there are any, else on those that chose the epoch. Only what every seed has.
    """
    found = _candidates(line)
    return min(found, key=lambda measure: _rank(measure, [line])) if found else None


def _rank(measure: AccuracyMeasure, lines: Sequence[ComparedLine]) -> tuple[float, ...]:
    """Order of measures: on more images, with a lower accuracy, and of equal ones the stronger attack first."""
    kind, steps = _strength(measure)
    return -(measure.n or 0), sum(line.mean(measure) or 0 for line in lines), -kind, -steps


def _candidates(line: ComparedLine) -> list[AccuracyMeasure]:
    run = line.first
    for of_runs in (line.tested, line.every):
        measures = {
            each.measure
            for found in of_runs
            for each in found
            if each.measure.is_attack and (run is None or each.ball == run.ball)
        }
        if whole := [measure for measure in measures if line.mean(measure) is not None]:
            return sorted(whole, key=lambda measure: measure.text)
    return []


def _lower_on_fewer(line: ComparedLine, measure: AccuracyMeasure) -> str:
    """The lowest accuracy on fewer images, where it is below that of the headline."""
    lower = [
        other
        for other in _candidates(line)
        if (other.n or 0) < (measure.n or 0) and (line.mean(other) or 0) < (line.mean(measure) or 0)
    ]
    if not lower:
        return ""
    other = min(lower, key=lambda each: (line.mean(each), each.text))
    return f" On fewer images it is lower: {_value(line, other)}, {other.text}."


def _best_of(lines: Sequence[ComparedLine]) -> str:
    """The best of several lines under the attack that all of them have alike; empty where there is none."""
    shared = _shared(lines)
    if shared is None:
        return ""
    first, second, *_ = sorted(lines, key=lambda line: -(line.mean(shared) or 0))
    gap = 100 * ((first.mean(shared) or 0) - (second.mean(shared) or 0))
    begin = f"Of {len(lines)} runs, {first.label} has the highest robust accuracy: {_value(first, shared)}"
    begin += f", {shared.text}; next is {second.label} with {_value(second, shared)}"
    if first.hull(shared)[0] <= second.hull(shared)[1]:
        return f"{begin}. The intervals overlap: these numbers show no difference between the two."
    return f"{begin}, {gap:.2f} points less, and the intervals do not overlap."


def _shared(lines: Sequence[ComparedLine]) -> AccuracyMeasure | None:
    """The measure of all lines on the most images and, of these, the one with the lowest accuracy."""
    common = [
        measure
        for measure in _candidates(lines[0])
        if measure.n is not None and all(measure in _candidates(line) for line in lines[1:])
    ]
    return min(common, key=lambda measure: _rank(measure, lines)) if common else None


def _beside_teacher(student: ComparedLine, lines: Sequence[ComparedLine]) -> list[str]:
    """The robust teacher on the same measure as its student."""
    teachers = [line for line in lines if line.role == TEACHER_FOLDERS["teacher"]]
    shared = _shared([student, *teachers]) if len(teachers) == 1 else None
    if shared is None:
        return []
    (low, high), (from_, to) = student.hull(shared), teachers[0].hull(shared)
    told = "; the intervals overlap" if low <= to and from_ <= high else ""
    return [f"Its teacher: {_value(teachers[0], shared)}, {shared.text}{told}."]


def _explanation(lines: Sequence[ComparedLine]) -> str:
    parts = ["The best epoch of each run, on test images unless a column says otherwise"]
    parts += [f"below an accuracy its {CONFIDENCE:.0%} interval (Wilson), in percent"]
    if any(line.is_group for line in lines):
        parts += ["± the sample standard deviation over seeds, time and speed their means"]
    parts += ["only numbers of one column are comparable"]
    return f"{'; '.join(parts)}."
