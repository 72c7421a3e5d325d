"""Records of the speedrun: a JSON file each with logs beside it, their verdict by the rules, and their order."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from bench.lib.machine import Facts
from bench.lib.speedrun import cost, rules
from bench.lib.speedrun.rules import Track
from engine.common.files import create, regular_file
from engine.runs.run_directory import first_fault

_MOST_BYTES = 1 << 24
_NAME = r"^[A-Za-z0-9][\w.-]*$"
Name = Annotated[str, StringConstraints(pattern=_NAME)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]


class RecordPart(BaseModel):
    """Part of a record: a key that is missing, unknown, of another type or not finite is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Score(RecordPart):
    """Images that were classified correctly, of n."""

    correct: Count
    n: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _check(self) -> Score:
        if self.correct > self.n:
            raise ValueError(f"{self.correct} of {self.n} images")
        return self

    @property
    def accuracy(self) -> float:
        """Share in [0, 1]."""
        return self.correct / self.n


class SeedFigures(RecordPart):
    """Figures of one seed.

    seconds, flops: of all steps, its teachers' included; teacher_seconds, teacher_flops: the part of these.
    steps, images: of the student. natural, pgd20: on the test images. checked: under the attack beside PGD-20;
    checked_pgd20: PGD-20 on the same images. log: file beside the record, with its SHA-256. notes: for the reader.
    """

    seed: Count
    seconds: Amount
    teacher_seconds: Amount
    flops: Amount
    teacher_flops: Amount
    steps: Count
    images: Count
    natural: Score
    pgd20: Score
    checked: Score
    checked_pgd20: Score
    log: Name
    log_sha256: str
    notes: list[str]

    @property
    def gap(self) -> float:
        """Accuracy under PGD-20 less that under the attack beside it, on the same images."""
        return self.checked_pgd20.accuracy - self.checked.accuracy


class DataFacts(RecordPart):
    """Data set of the runs. images: "as published", or "image files", as JPEG. sha256: of all that was read."""

    name: str
    images: str
    sha256: str


class SeedMeans(RecordPart):
    """Means over the seeds, and sample standard deviations (n - 1; 0 of one seed)."""

    seconds: Amount
    seconds_std: Amount
    flops: Amount
    natural: Amount
    natural_std: Amount
    pgd20: Amount
    pgd20_std: Amount
    checked: Amount
    checked_std: Amount


class Verdict(RecordPart):
    """Result by the rules. points: of the mean above the target, in percentage points; below it negative."""

    reached: bool
    points: float
    refused: list[str]


class SpeedRecord(RecordPart):
    """Content of a record's file; bench/README.md describes it."""

    rules: Count
    track: str
    recipe: Name
    quick: bool
    facts: dict[str, str | int]
    data: DataFacts
    checked_by: str
    compile_s: Amount
    keys: dict[str, Any]
    config: dict[str, Any]
    summary: SeedMeans
    verdict: Verdict
    seeds: Annotated[list[SeedFigures], Field(min_length=1)]

    @property
    def machine(self) -> str:
        """The GPU, or the processor and its threads."""
        facts = self.facts
        on_cpu = f"{facts['processor']}, {facts['threads']} threads"
        return on_cpu if facts["device"] == "cpu" else str(facts["device"])

    @model_validator(mode="after")
    def _check(self) -> SpeedRecord:
        if self.facts.keys() != Facts.__annotations__.keys():
            raise ValueError(f"facts: {', '.join(Facts.__annotations__)} are expected")
        return self


def summarise(seeds: Sequence[SeedFigures]) -> SeedMeans:
    """Means and deviations of the seeds."""

    def both(name: str, of: Callable[[SeedFigures], float]) -> dict[str, float]:
        values = [of(one) for one in seeds]
        return {
            name: statistics.fmean(values),
            f"{name}_std": statistics.stdev(values) if len(values) > 1 else 0.0,
        }

    return SeedMeans(
        **both("seconds", lambda one: one.seconds),
        **both("natural", lambda one: one.natural.accuracy),
        **both("pgd20", lambda one: one.pgd20.accuracy),
        **both("checked", lambda one: one.checked.accuracy),
        flops=statistics.fmean(one.flops for one in seeds),
    )


def judge(track: Track, seeds: Sequence[SeedFigures], checked_by: str, *, quick: bool, version: int) -> Verdict:
    """The verdict on figures: whether the target is reached, and why it is no record all the same."""
    refused = []
    if version != rules.RULES_VERSION:
        refused.append(f"of rules {version}, and now they are {rules.RULES_VERSION}")
    if quick:
        refused.append("made with --quick")
    if len({one.seed for one in seeds}) < max(rules.LEAST_SEEDS, len(seeds)):
        refused.append(f"{len(seeds)} seeds, and {rules.LEAST_SEEDS} different ones are the least")
    expected = (track.test_images, track.test_images, track.checked_images, track.checked_images)
    if any((one.natural.n, one.pgd20.n, one.checked.n, one.checked_pgd20.n) != expected for one in seeds):
        refused.append(f"not evaluated on {expected[0]:,} images, and {expected[2]:,} of them a second time")
    if checked_by != track.checked_by:
        refused.append(f"checked by {checked_by}, and not by {track.checked_by}")
    gap = max(one.gap for one in seeds)
    if gap > rules.LARGEST_AA_GAP:
        refused.append(
            f"masked: {checked_by} finds {100 * gap:.1f} points more than PGD-20 on the same images of a seed "
            f"(limit {100 * rules.LARGEST_AA_GAP:.0f})"
        )
    # Of fractions: three times 3,000 of 10,000 must not be a little less than 30 %.
    correct, n = sum(one.pgd20.correct for one in seeds), sum(one.pgd20.n for one in seeds)
    reached = correct >= math.ceil(track.target * n - 1e-6)
    return Verdict(reached=reached, points=100 * (correct / n - track.target), refused=refused)


def reasons(path: Path, record: SpeedRecord, track: Track) -> list[str]:
    """Why a record does not count; empty where it does. The verdict in the file is not believed."""
    verdict = judge(track, record.seeds, record.checked_by, quick=record.quick, version=record.rules)
    found = list(verdict.refused)
    if not verdict.reached:
        found.append(f"{-verdict.points:.2f} points below the target")
    if record.track not in rules.TRACKS or path.parent.name != record.track:
        found.append(f"of the track {record.track}")
    if record.data.name != track.dataset:
        found.append(f"of {record.data.name}, and not of {track.dataset}")
    if (record.facts["device"] == "cpu") != (track.device == "cpu"):
        found.append(f"made on {record.facts['device']}")
    if record.summary != summarise(record.seeds):
        found.append("its summary is not that of its seeds")
    return found + [fault for one in record.seeds if (fault := _fault_of_log(path.parent / one.log, one))]


def _fault_of_log(path: Path, figures: SeedFigures) -> str:
    """Why a log is not that of the figures; empty where it is."""
    try:
        content = regular_file(path, _MOST_BYTES).read_bytes()
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    if hashlib.sha256(content).hexdigest() != figures.log_sha256:
        return f"{path.name} was changed"
    rows = [json.loads(line) for line in content.splitlines()]
    total = cost.seconds([row for row in rows if row["event"] == "epoch"])
    if not math.isclose(total, figures.seconds, rel_tol=1e-9):
        return f"{path.name} has {total:.3f} s, and the record {figures.seconds:.3f} s"
    return ""


def read(path: Path) -> SpeedRecord:
    """A record. Raises ValueError, one line, where it cannot be read, or is damaged or of another shape."""
    try:
        text = regular_file(path, _MOST_BYTES).read_bytes()
        return SpeedRecord.model_validate_json(text)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise ValueError(f"{path} is no record: {first_fault(error)}") from None


def write(
    folder: Path,
    stem: str,
    logs: Mapping[int, cost.Rows],
    make: Callable[[Mapping[int, tuple[str, str]]], SpeedRecord],
) -> Path:
    """Write a record and its logs under a name that is free: STEM, else STEM-2, ...; the logs first.

    logs: rows by seed. make: the record, of name and digest of each seed's log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {seed: "".join(json.dumps(row) + "\n" for row in rows).encode() for seed, rows in logs.items()}
    for number in itertools.count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        path = folder / f"{name}.json"
        files = {seed: folder / f"{name}-seed{seed}.jsonl" for seed in contents}
        if path.exists() or any(file.exists() for file in files.values()):
            continue
        try:
            for seed, file in files.items():
                create(file, contents[seed])
            digests = {seed: hashlib.sha256(content).hexdigest() for seed, content in contents.items()}
            record = make({seed: (file.name, digests[seed]) for seed, file in files.items()})
            create(path, (record.model_dump_json(indent=1) + "\n").encode())
        except FileExistsError:  # another process was faster
            continue
        return path
    raise AssertionError("names without end")


def leaderboard(folder: Path, track: Track) -> tuple[list[tuple[Path, SpeedRecord]], list[tuple[Path, str]]]:
    """The records that count, the fastest first, and the other files with the reasons."""
    valid, others = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            record = read(path)
            found = reasons(path, record, track)
        except (ValueError, KeyError, TypeError) as error:
            others.append((path, str(error)))
            continue
        if found:
            others.append((path, "; ".join(found)))
        else:
            valid.append((path, record))
    return sorted(valid, key=lambda entry: entry[1].summary.seconds), others
