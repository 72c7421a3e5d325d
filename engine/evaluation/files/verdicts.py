"""Verdicts of networks on images, read from their reports, and what two of them can be compared under."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.attacks import table
from engine.common.files import checkpoint_of, seeds_in
from engine.evaluation import reports
from engine.evaluation.reports import Entry
from engine.evaluation.statistics.paired import Bools

_OF_THE_NETWORK = ("checkpoint", "weights", "model")
_OF_THE_SOFTWARE = ("engine", "torch", "dtype")
_OPTIONS = {
    "dataset": "--dataset", "data": "--data", "model": "--model", "weights": "--weights-key", "limit": "--limit",
    "limit_aa": "--limit-aa", "epsilon": "--epsilon", "threat_model": "--threat-model",
    "batch_size": "--batch-size", "seed": "--seed", "image_size": "--image-size", "on_bad_image": "--on-bad-image",
}  # fmt: skip
_SUMMARY = "summary.json"  # of a finished run
_IMPLIES = {"n": ("data", "samples"), "data": ("samples",), "epsilon": ("step_size",)}
"""Conditions that usually differ where one does: a line tells of the cause alone."""
_SHOWN = 12  # characters of a hash that tell it apart


@dataclass(frozen=True)
class MeasuredAttack:
    """Verdicts of a network under one attack, (N,).

    conditions: all that has to be equal for two of them to be compared. software: versions and number format, by
    name. title, description, warnings: of the report.
    """

    attack: str
    conditions: Mapping[str, Any]
    software: Mapping[str, Any]
    verdicts: Bools
    title: str
    description: str
    warnings: tuple[str, ...]

    @property
    def key(self) -> str:
        """The conditions as one text."""
        return json.dumps(self.conditions, sort_keys=True)


_ByKey = Mapping[str, MeasuredAttack]


@dataclass(frozen=True)
class NetworkVerdicts:
    """Results in the report of one checkpoint, by `MeasuredAttack.key`. notes: for the user."""

    checkpoint: Path
    measured: Mapping[str, MeasuredAttack]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComparedNetwork:
    """One of the networks that are compared, or a group of seeds of one. seeds: of a group, in order."""

    name: str
    networks: Sequence[NetworkVerdicts]
    seeds: tuple[int, ...] = ()

    def common(self) -> dict[str, list[MeasuredAttack]]:
        """Results of every network, by `MeasuredAttack.key`, in the order of the first one's."""
        first, *others = (network.measured for network in self.networks)
        return {
            key: [result, *(other[key] for other in others)]
            for key, result in first.items()
            if all(key in other for other in others)
        }


@dataclass(frozen=True)
class MatchedAttack:
    """Results of two subjects under one attack on the same images: verdicts (S, N) of each. label: a heading."""

    label: str
    conditions: Mapping[str, Any]
    a: list[MeasuredAttack]
    b: list[MeasuredAttack]

    @property
    def verdicts_a(self) -> Bools:
        """Verdicts of the first one, (S, N)."""
        return np.stack([result.verdicts for result in self.a])

    @property
    def verdicts_b(self) -> Bools:
        """Verdicts of the second one, (S, N)."""
        return np.stack([result.verdicts for result in self.b])

    def notes(self) -> Iterator[str]:
        """Sentences on what differs beside the network, and on accuracies that may be too high."""
        for name in _OF_THE_SOFTWARE:
            values = sorted({str(result.software.get(name)) for result in (*self.a, *self.b)})
            if len(values) > 1:
                yield f"{self.label}: measured with different values of {name}: {', '.join(values)}"
        for letter, results in (("A", self.a), ("B", self.b)):
            for warning in dict.fromkeys(warning for result in results for warning in result.warnings):
                yield f"{letter}: {warning}"


def read_subject(name: str) -> ComparedNetwork:
    """The verdicts of a checkpoint, a run directory's best one, a report, or the runs of a group.

    Raises ValueError, one line, with the command that measures where there is nothing to compare.
    """
    group = seeds_in(Path(name))
    if group:
        return ComparedNetwork(name, [_network(str(path)) for path in group.values()], tuple(group))
    return ComparedNetwork(name, [_network(name)])


def matches(a: ComparedNetwork, b: ComparedNetwork) -> tuple[list[MatchedAttack], list[str]]:
    """Attacks under which both were measured on the same images in the same way, and lines about the others."""
    of_a, of_b = a.common(), b.common()
    both = [key for key in of_a if key in of_b]
    labels = _labels({key: of_a[key][0] for key in both})
    found = [MatchedAttack(labels[key], of_a[key][0].conditions, of_a[key], of_b[key]) for key in both]
    told = [*_of_some_seeds("A", a), *_of_some_seeds("B", b)]
    first_of_each = ({key: results[0] for key, results in of.items()} for of in (of_a, of_b))
    return found, [*told, *_unmatched(*first_of_each)]


# ---------------------------------------------------------------- reading


def _network(name: str) -> NetworkVerdicts:
    """Results of a checkpoint, or a run's best one, as it is now. Raises ValueError where there are none."""
    path = checkpoint_of(name)
    is_report = path.name.endswith(reports.SUFFIX)
    report = path if is_report else reports.path_of(path, None)
    entries = reports.read(report)
    checkpoint = _checkpoint(path, entries) if is_report else path
    if not entries:
        raise ValueError(f"{report} is not there; to measure: {_command(checkpoint, {}, ())}")
    current = _of_current_content(report, checkpoint, entries)
    old = [entry for entry in current if "images" not in entry or "parameters" not in entry]
    if len(old) == len(current):
        raise ValueError(f"{report} has no verdicts of images, as older ones; {_again(checkpoint, old)}")
    notes = [f"{_attacks(old)}: no verdicts of images in {report}; {_again(checkpoint, old)}"] if old else []
    if Path(name).is_dir() and not (Path(name) / _SUMMARY).is_file():
        notes.append("the training is not finished; this is its best epoch so far")
    measured: dict[str, MeasuredAttack] = {}
    for entry in current:
        if entry not in old:
            result = _measured(report, entry)
            if result.key in measured:
                notes.append(
                    f"{result.attack} stands twice in {report}, by other versions; the later one is taken"
                )
            measured[result.key] = result
    return NetworkVerdicts(checkpoint, measured, tuple(notes))


def _checkpoint(report: Path, entries: Sequence[Entry]) -> Path:
    """The checkpoint of a report: beside it, else where it was when it was evaluated."""
    beside = report.with_name(report.name.removesuffix(reports.SUFFIX))
    told = [entry.get("checkpoint") for entry in entries]
    places = [Path(str(each["path"])) for each in told if isinstance(each, dict) and "path" in each]
    return next((place for place in (beside, *places) if place.is_file()), beside)


def _of_current_content(report: Path, checkpoint: Path, entries: Sequence[Entry]) -> list[Entry]:
    """The results of the checkpoint's content. Raises ValueError where there are none, or several contents."""
    contents = {reports.checkpoint_of(entry) for entry in entries}
    if not checkpoint.is_file():
        if len(contents) > 1:
            raise ValueError(
                f"{report} is of {len(contents)} contents of a checkpoint, which is not at {checkpoint}"
            )
        return list(entries)
    now = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    current = [entry for entry in entries if reports.checkpoint_of(entry) == now]
    if not current:
        again = _again(checkpoint, entries)
        raise ValueError(f"{report} is of an earlier content of {checkpoint}; {again}")
    return current


def _measured(report: Path, entry: Entry) -> MeasuredAttack:
    """A result with its verdicts. Raises ValueError where they do not fit its numbers."""
    images, parameters = entry["images"], entry["parameters"]
    known = images if isinstance(images, dict) else {}
    samples, correct = known.get("samples"), known.get("correct")
    if not (
        isinstance(parameters, dict)
        and isinstance(samples, list)
        and isinstance(correct, str)
        and len(samples) == len(correct) == entry["n"] > 0
        and set(correct) <= {"0", "1"}
        and correct.count("1") == entry.get("correct")
        and len(set(map(str, samples))) == len(samples)
    ):
        raise ValueError(f"{report} is damaged: the verdicts of {entry['attack']} do not fit its numbers")
    software = {name: parameters[name] for name in _OF_THE_SOFTWARE if name in parameters}
    apart = (*_OF_THE_NETWORK, *_OF_THE_SOFTWARE)
    conditions = {name: value for name, value in parameters.items() if name not in apart}
    conditions["samples"] = hashlib.sha256(json.dumps(samples).encode()).hexdigest()
    try:
        title = table.title(entry["attack"], entry)
    except ValueError:  # an attack that only a plugin knew
        title = entry["attack"]
    verdicts_N = np.frombuffer(correct.encode(), np.uint8) == ord("1")
    warnings = tuple(map(str, entry.get("warnings", ())))
    description = str(entry.get("description", ""))
    return MeasuredAttack(entry["attack"], conditions, software, verdicts_N, title, description, warnings)


# ---------------------------------------------------------------- commands that measure again


def _attacks(entries: Iterable[Entry]) -> str:
    return ",".join(dict.fromkeys(str(entry["attack"]) for entry in entries))


def _again(checkpoint: Path, entries: Sequence[Entry]) -> str:
    options = entries[-1].get("options")
    command = _command(checkpoint, options if isinstance(options, dict) else {}, entries)
    return f"to measure again: {command}"


def _command(checkpoint: Path, options: Mapping[str, Any], entries: Sequence[Entry]) -> str:
    """The `engine eval` of that checkpoint, with the options of before."""
    words = ["engine", "eval", str(checkpoint)]
    if entries:
        words += ["--attacks", _attacks(entries)]
    for name, flag in _OPTIONS.items():
        if options.get(name) not in (None, "") and (name, options[name]) != ("seed", 0):
            words += [flag, str(options[name])]
    normalize = options.get("normalize")
    if isinstance(normalize, str):
        words += ["--normalize", normalize]
    elif isinstance(normalize, list):
        for flag, numbers in zip(("--normalize-mean", "--normalize-std"), normalize, strict=True):
            words += [flag, ",".join(map(str, numbers))]
    return shlex.join(words)


# ---------------------------------------------------------------- what tells two results apart


def _labels(results: Mapping[str, MeasuredAttack]) -> dict[str, str]:
    """Titles, with the conditions that tell results of one title apart."""
    labels = {}
    for key, result in results.items():
        same = [other for other in results.values() if other.title == result.title]
        differing = {name for other in same for name in _differing(result.conditions, other.conditions)}
        told = ", ".join(f"{name} {_shown(result.conditions.get(name))}" for name in sorted(_decisive(differing)))
        labels[key] = f"{result.title} ({told})" if told else result.title
    return labels


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [name for name in (*a, *(name for name in b if name not in a)) if a.get(name) != b.get(name)]


def _decisive(names: Collection[str]) -> list[str]:
    """The names without those that differ because others do."""
    implied = {each for name in names for each in _IMPLIES.get(name, ())}
    return [name for name in names if name not in implied]


def _of_some_seeds(letter: str, subject: ComparedNetwork) -> Iterator[str]:
    """A line for each result that some seeds of a group lack."""
    whole = subject.common()
    every: dict[str, MeasuredAttack] = {}
    for network in subject.networks:
        every |= {key: result for key, result in network.measured.items() if key not in whole}
    for key, result in every.items():
        lacking = [str(network.checkpoint) for network in subject.networks if key not in network.measured]
        yield (
            f"{result.attack} ({result.description}): not compared: {len(lacking)} of {len(subject.networks)} "
            f"seeds of {letter} were not measured so: {', '.join(lacking[:3])}{', ...' * (len(lacking) > 3)}"
        )


def _unmatched(of_a: _ByKey, of_b: _ByKey) -> Iterator[str]:
    """A line for each result that only one of two subjects has: how it differs from the nearest of the other."""
    told: set[str] = set()
    for key, ours in of_a.items():
        if key in of_b:
            continue
        others = [theirs for theirs in of_b.values() if theirs.attack == ours.attack]
        if not others:
            yield f"{ours.attack}: not compared: only A has it ({ours.description})"
            continue
        # One that is not compared either, before one that is.
        nearest = min(
            others, key=lambda theirs: (theirs.key in of_a, len(_differing(ours.conditions, theirs.conditions)))
        )
        told.add(nearest.key)
        yield f"{ours.attack}: not compared: {_difference(ours, nearest)}"
    for key, theirs in of_b.items():
        if key in of_a or key in told:
            continue
        others = [ours for ours in of_a.values() if ours.attack == theirs.attack]
        if others:
            nearest = min(others, key=lambda ours: len(_differing(ours.conditions, theirs.conditions)))
            yield f"{theirs.attack}: not compared: {_difference(nearest, theirs)}"
        else:
            yield f"{theirs.attack}: not compared: only B has it ({theirs.description})"


def _difference(a: MeasuredAttack, b: MeasuredAttack) -> str:
    """Conditions that differ, in words."""
    return "; ".join(
        f"{name} is {_shown(a.conditions.get(name))} in A and {_shown(b.conditions.get(name))} in B"
        for name in _decisive(_differing(a.conditions, b.conditions))
    )


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "not given" if value is None else str(value)[:_SHOWN] if isinstance(value, str) else str(value)
