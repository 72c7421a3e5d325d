"""The paper's mechanism over seeds: its statements on teacher, student and trust by epoch, tested on kept logs.

An estimate is one number of a seed: a share of the probe's images after an epoch, less another. Over S seeds, for
this teacher and these images,

    mean +- t(0.975, S - 1) stdev / sqrt(S)

is the interval at the level `CONFIDENCE`. The probe has the same images in every seed and epoch, so the interval
holds nothing of what other images would change. That is told apart, as a standard error: shares p of n images have
sqrt(sum p (1 - p) / n), the one of a difference as if both shares were of different images. That is too large
where an image that is right once is more often right again, and of alpha, whose variance over images is at most
that of a share with its mean. Seeds do not make it smaller.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bench.lib.accuracy.cells import MeasuredCell, ResultFolder
from bench.lib.accuracy.protocol import AccuracyProtocol, chosen_keys, completed_keys
from bench.lib.accuracy.statistics import AGREES, DISAGREES, NOT_MEASURED, NOT_RESOLVED
from engine.common.files import regular_file
from engine.common.pictures import new_figure
from engine.config import RunConfig
from engine.evaluation.statistics.paired import Interval, by_student
from engine.runs.assemble import teacher_sections
from engine.runs.reporting import axes as of_epochs
from engine.runs.reporting.plots import EpochHistory
from engine.runs.run_directory import first_fault

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEWEST_SEEDS = 2
SMALL_CHANGE = 0.01
"""Change of a share that counts as none, where the paper says that it stays: 10 of 1,000 images."""
_TEACHER = "teacher"  # section of the robust one, which the probe asks
_SAME = 1e-9  # shares that differ by less are equal but for rounding

# Keys of the logs; "probe_cases.CASE" is that of a case.
_STUDENT, _ON_NATURAL, _ON_ADVERSARIAL, _ALPHA, _ROBUST = (
    "probe_student_adversarial_accuracy",
    "probe_teacher_natural_accuracy",
    "probe_teacher_adversarial_accuracy",
    "probe_alpha",
    "robust_accuracy",
)

# ---------------------------------------------------------------- what the paper says


@dataclass(frozen=True)
class Claim:
    """A statement of the paper that logs can test.

    quantity: keys of an epoch's row with the signs by which they are added. test: one of `CLAIM_TESTS`. sign: that
    of the estimate if the paper is right, 0 where it says that there is none; margin: what is none then. against:
    the other row of the test "row". note: what to know beside the verdict.
    """

    name: str
    words: str
    place: str
    rows: tuple[str, ...]
    quantity: Mapping[str, int]
    test: str
    sign: int
    note: str
    margin: float = 0.0
    against: str | None = None


_BOTH = ("ard", "iad1")
_WEAK_AT_FIRST = (
    "expected of any student: an untrained one makes weak adversarial images; the second half tells more"
)
_GAP = {_STUDENT: 1, _ON_ADVERSARIAL: -1}
CLAIMS = (
    Claim(
        "teacher-falls", "The teacher's accuracy on the student's adversarial images falls",
        "Figure 1 (a), Section 3.1", _BOTH, {_ON_ADVERSARIAL: 1}, "change", -1, _WEAK_AT_FIRST,
    ),
    Claim(
        "teacher-constant-on-natural", "Its accuracy on natural images stays", "Figure 1 (a), Section 3.1", _BOTH,
        {_ON_NATURAL: 1}, "change", 0, "so by construction: a check of the logs alone", SMALL_CHANGE,
    ),
    Claim(
        "both-right-fewer", "Images like x'_1 (teacher right on x and x~) become fewer",
        "Figure 2 (b), Section 3.2, 1)", _BOTH, {"probe_cases.both_right": 1}, "change", -1,
        f"{_WEAK_AT_FIRST}; nearly the same number as the teacher's accuracy on x~",
    ),
    Claim(
        "only-natural-right-more", "Images like x''_1 (right on x, wrong on x~) become more",
        "Figure 2 (b), Section 3.2, 2)", _BOTH, {"probe_cases.only_natural_right": 1}, "change", 1,
        "the number of x'_1 with the other sign, since the accuracy on x stays: no evidence of its own",
    ),
    Claim(
        "both-wrong-constant", "Images like x_2 (wrong on x and x~) stay as many", "Figure 2 (b), Section 3.2, 3)",
        _BOTH, {"probe_cases.both_wrong": 1}, "change", 0, "only the case that the paper rules out can change it",
        SMALL_CHANGE,
    ),
    Claim(
        "fourth-case-absent", "No image is wrong on x and right on x~", "Section 3.2, 4)", _BOTH,
        {"probe_cases.only_adversarial_right": 1}, "mean", 0,
        "the paper's reason needs x~ that attacks the teacher; it attacks the student",
    ),
    Claim(
        "worse-than-on-its-own", "The teacher is good at its own adversarial images and not at the student's",
        "Section 3.1", _BOTH, {_ON_ADVERSARIAL: 1}, "own", -1,
        "a reading: the paper has no accuracy on the teacher's own; x~ of another network attacks less",
    ),
    Claim(
        "student-more-robust", "The student becomes robust step by step", "Figure 3, left; Section 4", _BOTH,
        {_STUDENT: 1}, "change", 1, "so of every training that works",
    ),
    Claim(
        "student-behind-at-first", "At first the student is less to be trusted than the teacher",
        "Section 4, warming-up period", ("ard",), _GAP, "first", -1,
        "a student after an epoch, beside a teacher that was trained to its end, and longer than the student",
    ),
    Claim(
        "student-gains-on-teacher", "As the teacher fails, the student can trust itself more", "Section 3.2",
        _BOTH, _GAP, "change", 1,
        "the teacher's fall and the student's rise together; that the student overtakes is not said",
    ),
    Claim(
        "trust-falls", "The trust alpha falls: the student comes to trust itself more", "Sections 1, 3 and 4",
        ("iad1",), {_ALPHA: 1}, "change", -1, _WEAK_AT_FIRST,
    ),
    Claim(
        "beta-lowers-trust", "A larger beta trusts the student more", "Figure 4, left; Section 5.3",
        ("iad1-beta1",), {_ALPHA: 1}, "row", -1, "nearly by definition: alpha is a power of a probability",
        against="iad1-warmup0",
    ),
    Claim(
        "introspection-helps", "With introspection the student is more robust than by the teacher alone",
        "Figure 3, right; Section 4", ("iad1",), {_ROBUST: 1}, "row", 1,
        "held-out images, few of them; the table of methods has the test images", against="ard",
    ),
)  # fmt: skip
"""Chosen before there was any result. IAD-I begins after the warm-up, whose epochs are those of ARD."""

BESIDE_THE_VERDICTS = (
    "In the first epochs the student is weak, the more so while the learning rate rises, and its adversarial "
    "images with it: the teacher's accuracy on them would fall in any training that works. Whether it goes on to "
    "fall when the student is robust already is told by the second half alone.",
    "The teacher was trained longer than the students, and all seeds share one teacher and one probe: the "
    "intervals are for other seeds of the student, not for other teachers.",
    "The statements on the teacher's accuracy, on x'_1 and on x''_1 are one number told thrice. The intervals are "
    "of each statement alone; none is adjusted for there being several.",
    "Not asked, for the logs have no answers by image: teacher and student together (Figure 3, middle).",
)
"""Sentences that a page shows with the table."""


# ---------------------------------------------------------------- logs

_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Read(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _Epoch(_Read):
    """Keys that are read of an epoch's row."""

    epoch: int
    phase: str
    measured_on: str
    measured_n: int = Field(ge=1)
    robust_accuracy: _Share
    probe_student_adversarial_accuracy: _Share


class _Cases(_Read):
    both_right: _Share
    only_natural_right: _Share
    both_wrong: _Share
    only_adversarial_right: _Share


class _TaughtEpoch(_Epoch):
    """Keys of a student with a robust teacher."""

    probe_teacher_natural_accuracy: _Share
    probe_teacher_adversarial_accuracy: _Share
    probe_alpha: _Share
    probe_cases: _Cases

    @model_validator(mode="after")
    def _agree(self) -> _TaughtEpoch:
        cases = self.probe_cases
        for what, share, parts in (
            ("all images", 1.0, tuple(cases.model_dump().values())),
            (_ON_NATURAL, self.probe_teacher_natural_accuracy, (cases.both_right, cases.only_natural_right)),
            (
                _ON_ADVERSARIAL,
                self.probe_teacher_adversarial_accuracy,
                (cases.both_right, cases.only_adversarial_right),
            ),
        ):
            if abs(math.fsum(parts) - share) > _SAME:
                raise ValueError(f"probe_cases and {what} differ")
        return self


@dataclass(frozen=True)
class Training:
    """Epochs of a cell, or of the teacher, as its log has them.

    images: of the probe. teacher: SHA-256 of the robust one's weights.
    """

    rows: tuple[Mapping[str, Any], ...]
    images: int
    teacher: str | None

    @property
    def own(self) -> tuple[Mapping[str, Any], ...]:
        """Epochs after the warm-up."""
        changes = [index for index, (a, b) in enumerate(pairwise(self.rows), 1) if a["phase"] != b["phase"]]
        return self.rows[changes[-1] if changes else 0 :]


def _epochs(path: Path, shape: type[_Epoch], epochs: int) -> tuple[Mapping[str, Any], ...]:
    """Rows of a training's epochs. Raises ValueError, one line, where they are not what they should be."""
    try:
        lines = regular_file(path).read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    found: list[Mapping[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "event" not in row:
                raise ValueError("no row")
            if row["event"] == "epoch":
                shape.model_validate(row)
                found.append(row)
        except ValidationError as error:
            raise ValueError(f"{path} is damaged: line {number}: {first_fault(error)}") from None
        except ValueError:
            raise ValueError(f"{path} is damaged: line {number} is no row") from None
    numbers = [row["epoch"] for row in found]
    if numbers != list(range(1, epochs + 1)):
        raise ValueError(f"{path} is damaged: epochs 1 to {epochs} are expected, got {numbers}")
    return tuple(found)


def _training(
    results: ResultFolder, name: str, measured: MeasuredCell, wanted: RunConfig, shape: type[_Epoch]
) -> Training:
    """Log of a measured cell or teacher, which is to be of this configuration."""
    if completed_keys(measured.keys) != chosen_keys(wanted):
        raise ValueError(f"{results.cell(name)} is of other settings than the protocol's; move it away")
    rows = _epochs(results.log(name), shape, measured.epochs)
    return Training(rows, wanted.eval.probe_size, measured.teachers.get(_TEACHER))


def trainings(protocol: AccuracyProtocol, results: ResultFolder, row: str) -> dict[int, Training]:
    """Logs of the measured cells of a row by seed; none where the row is not there, or has no robust teacher.

    Raises ValueError, one line, for what is damaged or of other settings.
    """
    if not _has_teacher(protocol, row):
        return {}
    found: dict[int, Training] = {}
    for seed in protocol.seeds:
        name = f"{row}-seed{seed}"
        if (measured := results.read(name)) is not None:
            found[seed] = _training(results, name, measured, protocol.config_of(row, seed), _TaughtEpoch)
    return found


def _has_teacher(protocol: AccuracyProtocol, row: str) -> bool:
    return row in protocol.rows() and _TEACHER in teacher_sections(protocol.config_of(row, protocol.seeds[0]))


# ---------------------------------------------------------------- estimates of a seed


@dataclass(frozen=True)
class _Term:
    """A share of n images, with the sign by which it is added."""

    sign: int
    share: float
    images: int


@dataclass(frozen=True)
class SeedEstimate:
    """After less before, which is empty where the test has none."""

    before: tuple[_Term, ...]
    after: tuple[_Term, ...]

    @property
    def value(self) -> float:
        """In [-2, 2]."""
        return _sum(self.after) - _sum(self.before)

    @property
    def image_error(self) -> float:
        """Standard error by the images, as if those of all terms were different ones."""
        terms = (*self.before, *self.after)
        return math.sqrt(math.fsum(term.share * (1 - term.share) / term.images for term in terms))


def _sum(terms: Iterable[_Term]) -> float:
    return math.fsum(term.sign * term.share for term in terms)


def _shares(claim: Claim, training: Training, *rows: Mapping[str, Any]) -> tuple[_Term, ...]:
    """The claim's quantity; of several epochs its mean over them."""
    found = []
    for key, sign in claim.quantity.items():
        outer, _, case = key.partition(".")
        values = [row[outer][case] if case else row[outer] for row in rows]
        images = rows[0]["measured_n"] if outer == _ROBUST else training.images
        found.append(_Term(sign, statistics.fmean(values), images))
    return tuple(found)


def _change(claim: Claim, training: Training, other: Training | None) -> SeedEstimate | None:
    own = training.own
    if len(own) < 2:
        return None
    return SeedEstimate(_shares(claim, training, own[0]), _shares(claim, training, own[-1]))


def _late_change(claim: Claim, training: Training) -> SeedEstimate | None:
    """Change over the second half of the epochs after the warm-up."""
    own = training.own
    if len(own) < 3:
        return None
    return SeedEstimate(_shares(claim, training, own[(len(own) - 1) // 2]), _shares(claim, training, own[-1]))


def _first(claim: Claim, training: Training, other: Training | None) -> SeedEstimate | None:
    return SeedEstimate((), _shares(claim, training, training.rows[0]))


def _mean(claim: Claim, training: Training, other: Training | None) -> SeedEstimate | None:
    return SeedEstimate((), _shares(claim, training, *training.own))


def _against(claim: Claim, training: Training, other: Training | None) -> SeedEstimate | None:
    if other is None:
        return None
    return SeedEstimate(_shares(claim, other, other.rows[-1]), _shares(claim, training, training.rows[-1]))


def _own(claim: Claim, training: Training, other: Training | None) -> SeedEstimate | None:
    if other is None:
        return None
    (of_teacher,) = other.rows
    before = _Term(1, of_teacher[_STUDENT], other.images)
    return SeedEstimate((before,), _shares(claim, training, training.rows[-1]))


_Estimator = Callable[[Claim, Training, Training | None], SeedEstimate | None]
CLAIM_TESTS: Mapping[str, tuple[str, _Estimator]] = {
    "change": ("last epoch, less the first after the warm-up", _change),
    "first": ("first epoch", _first),
    "mean": ("mean over the epochs after the warm-up", _mean),
    "row": ("last epoch, less that of another row with the same seed", _against),
    "own": ("last epoch, less the teacher's accuracy on the adversarial images of its own", _own),
}
"""Tests by name: what is estimated, and its function of a claim, a training and the one it is compared with.

Of a change the last epoch is taken, and not the best, as the paper draws whole trainings; a slope over the epochs
would weigh the middle of a curve that need not be straight.
"""


# ---------------------------------------------------------------- over seeds


@dataclass(frozen=True)
class OverSeeds:
    """Estimates by seed. interval: by Student's t; None where the seeds do not vary, which tells nothing."""

    by_seed: Mapping[int, SeedEstimate]

    @property
    def values(self) -> list[float]:
        """By seed, in their order."""
        return [estimate.value for estimate in self.by_seed.values()]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def interval(self) -> Interval | None:
        """At the level `CONFIDENCE`."""
        n = len(self.by_seed)
        deviation = statistics.stdev(self.values) if n >= FEWEST_SEEDS else 0.0
        if deviation < _SAME:
            return None
        return by_student(self.mean, deviation / math.sqrt(n), n - 1).interval

    @property
    def image_error(self) -> float:
        """Mean over the seeds, whose images are the same."""
        return statistics.fmean(estimate.image_error for estimate in self.by_seed.values())

    @property
    def levels(self) -> tuple[float | None, float]:
        """Before and after, means over the seeds."""
        estimates = list(self.by_seed.values())
        before = [_sum(each.before) for each in estimates if each.before]
        after = statistics.fmean(_sum(each.after) for each in estimates)
        return statistics.fmean(before) if before else None, after


@dataclass(frozen=True)
class ClaimResult:
    """A claim in a row of the protocol. found: None of too few seeds. late: of a change, over the second half."""

    claim: Claim
    row: str
    found: OverSeeds | None
    late: OverSeeds | None = None

    @property
    def verdict(self) -> str:
        """One of `AGREES`, `NOT_RESOLVED`, `DISAGREES`, `NOT_MEASURED`.

        Of a sign: the interval excludes 0 with it, has 0, excludes 0 with the other. Of "stays": the interval lies
        within the margin, partly, outside it.
        """
        if self.found is None:
            return NOT_MEASURED
        sign, margin, mean = self.claim.sign, self.claim.margin, self.found.mean
        interval = self.found.interval
        if interval is None and sign:
            return NOT_RESOLVED
        low, high = interval or (mean, mean)
        if sign:
            low, high = sorted((sign * low, sign * high))
            return AGREES if low > 0 else DISAGREES if high < 0 else NOT_RESOLVED
        if low >= -margin - _SAME and high <= margin + _SAME:
            return AGREES
        return DISAGREES if low > margin or high < -margin else NOT_RESOLVED


def claims(protocol: AccuracyProtocol, results: ResultFolder) -> list[ClaimResult]:
    """Every claim in every row of the protocol that tests it and has a robust teacher.

    Raises ValueError, one line, for logs that are damaged or of other settings.
    """
    named = dict.fromkeys(name for claim in CLAIMS for name in (*claim.rows, claim.against) if name)
    taught = {name for name in named if _has_teacher(protocol, name)}
    wanted = [(claim, row) for claim in CLAIMS for row in claim.rows if {row, claim.against or row} <= taught]
    logs = _logs(protocol, results, [name for claim, row in wanted for name in (row, claim.against) if name])
    student = next((training for by_seed in logs.values() for training in by_seed.values()), None)
    teacher = None if student is None else _teacher(protocol, results, student)
    return [_result(claim, row, logs, teacher) for claim, row in wanted]


def _logs(
    protocol: AccuracyProtocol, results: ResultFolder, rows: Iterable[str]
) -> dict[str, dict[int, Training]]:
    """Logs of several rows. Raises ValueError where their teachers were different ones."""
    found = {row: trainings(protocol, results, row) for row in dict.fromkeys(rows)}
    by_teacher: dict[str | None, str] = {}
    for row, by_seed in found.items():
        for seed, training in by_seed.items():
            by_teacher.setdefault(training.teacher, f"{row}-seed{seed}")
    if len(by_teacher) > 1:
        raise ValueError(f"{results.folder}: {' and '.join(by_teacher.values())} had different teachers")
    return found


def _teacher(protocol: AccuracyProtocol, results: ResultFolder, student: Training) -> Training | None:
    """The epoch of the robust teacher whose weights teach, as the only one; None where it is not measured."""
    measured = results.read(_TEACHER)
    if measured is None:
        return None
    if measured.weights != student.teacher:
        raise ValueError(f"{results.cell(_TEACHER)} is not of the teacher that the students had; move it away")
    found = _training(results, _TEACHER, measured, protocol.teacher_config(_TEACHER), _Epoch)
    return replace(found, rows=(found.rows[measured.epoch - 1],))


def _result(
    claim: Claim, row: str, logs: Mapping[str, Mapping[int, Training]], teacher: Training | None
) -> ClaimResult:
    _, estimate = CLAIM_TESTS[claim.test]
    others = dict.fromkeys(logs[row], teacher) if claim.against is None else logs[claim.against]
    by_seed = {seed: estimate(claim, each, others.get(seed)) for seed, each in logs[row].items()}
    late = {seed: _late_change(claim, each) for seed, each in logs[row].items()}
    return ClaimResult(claim, row, _over(by_seed), _over(late) if claim.test == "change" else None)


def _over(by_seed: Mapping[int, SeedEstimate | None]) -> OverSeeds | None:
    known = {seed: estimate for seed, estimate in by_seed.items() if estimate is not None}
    return OverSeeds(known) if len(known) >= FEWEST_SEEDS else None


# ---------------------------------------------------------------- text

CLAIM_HEADING = (
    "Statement", "Paper", "Row", "Estimate", "From and to", "By seed", "Mean", "95 % interval", "Images' error",
    "Second half", "Verdict", "Beside it",
)  # fmt: skip


def table(found: Sequence[ClaimResult]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Heading, and a row of text for each; shares in percent, differences in percentage points, alpha as it is."""
    return CLAIM_HEADING, [list(_cells(each)) for each in found]


def _cells(result: ClaimResult) -> Iterator[str]:
    claim, found, late = result.claim, result.found, result.late
    scale, digits = (1, 3) if _ALPHA in claim.quantity else (100, 1)

    def number(value: float, sign: str = "+") -> str:
        return f"{scale * value + 0.0:{sign}.{digits}f}"

    def interval(of: OverSeeds) -> str:
        return "none: the seeds do not vary" if of.interval is None else " to ".join(map(number, of.interval))

    yield from (
        claim.words,
        claim.place,
        result.row if claim.against is None else f"{result.row}, {claim.against}",
    )
    yield CLAIM_TESTS[claim.test][0]
    if found is None:
        yield from ("",) * 5
    else:
        before, after = found.levels
        yield number(after, "-") if before is None else f"{number(before, '-')} → {number(after, '-')}"
        yield ", ".join(map(number, found.values))
        yield number(found.mean)
        yield interval(found)
        yield f"{number(found.image_error, '-')}"
    yield "" if late is None else f"{number(late.mean)} ({interval(late)})"
    yield from (result.verdict, claim.note)


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True)
class FigureOverSeeds:
    """A picture: a panel for each of the rows. lines: label by key. alt: what is seen on it. ylabel: of shares."""

    title: str
    alt: str
    lines: Mapping[str, str]
    ylabel: str


_OVER = "for ARD and IAD-I, mean over the seeds and each seed as a thin line"
FIGURES_OVER_SEEDS = {
    "mechanism-figure-1a": FigureOverSeeds(
        "Figure 1 (a): the teacher on x and x~",
        f"The teacher's accuracy by epoch on natural images and on the student's adversarial images, {_OVER}.",
        {_ON_NATURAL: "natural images x", _ON_ADVERSARIAL: "the student's x~"},
        "teacher's accuracy",
    ),
    "mechanism-figure-2b": FigureOverSeeds(
        "Figure 2 (b): kinds of samples",
        f"Shares of the kinds of samples by epoch, {_OVER}.",
        {
            "probe_cases.both_right": "x'_1: T(x) = y, T(x~) = y",
            "probe_cases.only_natural_right": "x''_1: T(x) = y, T(x~) ≠ y",
            "probe_cases.both_wrong": "x_2: T(x) ≠ y, T(x~) ≠ y",
            "probe_cases.only_adversarial_right": "T(x) ≠ y, T(x~) = y",
        },
        "share of the probe",
    ),
    "mechanism-figure-3": FigureOverSeeds(
        "Figure 3, left: accuracy on the student's x~",
        f"Accuracy of teacher and student by epoch on the student's adversarial images, {_OVER}.",
        {_ON_ADVERSARIAL: "teacher", _STUDENT: "student"},
        "accuracy on x~",
    ),
    "mechanism-alpha": FigureOverSeeds(
        "Trust: mean alpha over the probe",
        f"Mean of alpha over the probe by epoch, {_OVER}; the axis does not begin at 0.",
        {_ALPHA: "alpha = T(x~)[y]^beta"},
        "",
    ),
}
"""Pictures by the name of their file, without its ending."""


def logs_drawn(protocol: AccuracyProtocol, results: ResultFolder) -> dict[str, dict[int, Training]]:
    """Logs by row and seed of the rows that `FIGURES_OVER_SEEDS` show and that are measured."""
    return {row: found for row, found in _logs(protocol, results, _BOTH).items() if found}


def drawn(
    figure: FigureOverSeeds, protocol: AccuracyProtocol, logs: Mapping[str, Mapping[int, Training]]
) -> Figure:
    """A picture of these logs, inside `engine.common.pictures.style`."""
    found = new_figure((3.2 + 0.1 * len(figure.lines)) * len(logs))
    grid = found.subplots(len(logs), 1, squeeze=False)
    for (row, by_seed), (axes,) in zip(logs.items(), grid, strict=True):
        _panel(axes, figure, by_seed)
        history = EpochHistory(next(iter(by_seed.values())).rows, protocol.config_of(row, next(iter(by_seed))))
        taken = of_epochs.marks(axes, history.marks)
        seeds = f"{len(by_seed)} seed{'s' if len(by_seed) > 1 else ''}"
        subject = history.subject if row == history.config.method else f"{row}: {history.subject}"
        axes.set_title(f"{figure.title}\n{subject}\n{seeds}", pad=8 + taken)
    return found


def _panel(axes: Axes, figure: FigureOverSeeds, by_seed: Mapping[int, Training]) -> None:
    """Lines of a row: the mean over the seeds, and each seed."""
    for index, (key, label) in enumerate(figure.lines.items()):
        outer, _, case = key.partition(".")
        curves = [
            [{"epoch": row["epoch"], key: row[outer][case] if case else row[outer]} for row in training.rows]
            for training in by_seed.values()
        ]
        means = [
            {"epoch": rows[0]["epoch"], key: statistics.fmean(row[key] for row in rows)}
            for rows in zip(*curves, strict=True)
        ]
        of_epochs.line(axes, means, key, label, color=f"C{index}")
        for curve in curves if len(curves) > 1 else []:
            thin = {"linewidth": 0.7, "marker": "", "alpha": 0.6, "color": f"C{index}"}
            of_epochs.line(axes, curve, key, "_nolegend_", **thin)
    of_epochs.epochs(axes, (row["epoch"] for training in by_seed.values() for row in training.rows))
    if figure.ylabel:
        of_epochs.percent(axes, figure.ylabel)
    else:
        axes.set_ylabel("mean alpha")
    of_epochs.legend_below(axes, 2)
