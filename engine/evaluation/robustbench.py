"""RobustBench's model_info: an entry for its leaderboard, of accuracies that were measured and of nothing else.

Source: github.com/RobustBench/robustbench, its model_info folder and the form of its issues.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.common.files import create
from engine.common.lookup import look_up
from engine.common.stopping import RunFailed
from engine.evaluation.reports import Entry, checkpoint_of
from engine.models.robustbench import EPSILON


@dataclass(frozen=True)
class Benchmark:
    """A leaderboard. epsilon: as it is written there. images: of its test set, all of them."""

    dataset: str
    threat_model: str
    epsilon: str
    images: int

    @property
    def radius(self) -> float:
        """Epsilon as a number."""
        over, _, under = self.epsilon.partition("/")
        return float(over) / float(under or 1)


# ImageNet's is of 5,000 chosen images of 997 classes, which no data set here is.
_IMAGES = {"cifar10": 10_000, "cifar100": 10_000}
BENCHMARKS = tuple(
    Benchmark(dataset, threat_model, epsilon, _IMAGES[dataset])
    for (dataset, threat_model), epsilon in ((name.split(":"), epsilon) for name, epsilon in EPSILON.items())
    if dataset in _IMAGES
)


def _text(key: str, value: str) -> str:
    return value


def _truth(key: str, value: str) -> bool:
    return look_up(f"--robustbench-info {key}", value.lower(), {"true": True, "false": False})


def _count(key: str, value: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise ValueError(f"--robustbench-info {key}: a whole number from 1 on is expected, got {value!r}")
    return int(value)


def _percent(key: str, value: str) -> str:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 100:
        raise ValueError(f"--robustbench-info {key}: a percentage is expected, e.g. 67.31, got {value!r}")
    return f"{number:.2f}"


# What only the authors know, and its reader. What was measured is in no option.
_GIVEN: dict[str, Callable[[str, str], Any]] = {
    "link": _text,
    "name": _text,
    "authors": _text,
    "additional_data": _truth,
    "number_forward_passes": _count,
    "venue": _text,
    "architecture": _text,
    "reported": _percent,
    "footnote": _text,
}
_OPTIONAL = {"footnote"}


def parsed(given: Sequence[str]) -> dict[str, Any]:
    """The values of `key=value` arguments. Raises ValueError for an unknown key and a value of another type."""
    found = {}
    for each in given:
        key, equals, value = each.partition("=")
        if not equals:
            raise ValueError(f"--robustbench-info: key=value is expected, got {each!r}")
        found[key] = look_up("--robustbench-info", key, _GIVEN)(key, value)
    return found


@dataclass(frozen=True)
class Submission:
    """A file of the leaderboard that is to be written. given: as of `parsed`."""

    path: Path
    given: Mapping[str, Any]

    def check_free(self) -> None:
        """Raise ValueError where there is a file already, or no folder for one."""
        if self.path.exists():
            raise ValueError(f"--robustbench-json: {self.path} exists; remove it, or choose another name")
        if not self.path.absolute().parent.is_dir():
            raise ValueError(f"--robustbench-json: {self.path.absolute().parent} is no folder")

    def write(self, entries: Sequence[Entry], sha256: str, benchmark: Benchmark) -> list[str]:
        """Write the `model_info` as a new file; what the user should know of it.

        Raises ValueError where it was not measured, or the file exists, RunFailed where it cannot be written.
        """
        info, missing = model_info(entries, sha256, benchmark, self.given)
        try:
            create(self.path, (json.dumps(info, indent=2, ensure_ascii=False) + "\n").encode())
        except FileExistsError:
            self.check_free()
        except OSError as error:
            raise RunFailed(f"--robustbench-json: {self.path} was not written: {error.strerror}") from None
        note = f"Note: to be filled in, e.g. by --robustbench-info: {', '.join(missing)}"
        return [f"Written: {self.path}", *([note] if missing else [])]


def asked(
    path: str | None, given: Sequence[str], checkpoints: Sequence[str], limit_aa: int | None
) -> Submission | None:
    """The file that the options ask for, if any. Raises ValueError where they do not fit together."""
    if path is None:
        if given:
            raise ValueError("--robustbench-info: goes into the file of --robustbench-json, which is not given")
        return None
    submission = Submission(Path(path), parsed(given))
    submission.check_free()
    if len(checkpoints) > 1:
        raise ValueError(f"--robustbench-json: one checkpoint is expected, got {len(checkpoints)}")
    if limit_aa is not None:
        raise ValueError("--robustbench-json: the leaderboard is of all test images; drop --limit-aa")
    return submission


def benchmark_of(dataset: str, ball: tuple[float, str], images: int) -> Benchmark:
    """The leaderboard of such a data set, epsilon and threat model, evaluated on so many test images.

    Raises ValueError where there is none, or where it is of more images.
    """
    epsilon, threat_model = ball
    for each in BENCHMARKS:
        if (each.dataset, each.threat_model) == (dataset, threat_model) and math.isclose(each.radius, epsilon):
            if images != each.images:
                raise ValueError(
                    f"--robustbench-json: the leaderboard of {dataset} is of {each.images:,} test images, "
                    f"and {images:,} are evaluated"
                )
            return each
    known = ", ".join(f"{each.dataset} {each.threat_model} {each.epsilon}" for each in BENCHMARKS)
    raise ValueError(
        f"--robustbench-json: there is no leaderboard of {dataset}, {threat_model}, epsilon {epsilon:g}; "
        f"known: {known}"
    )


def model_info(
    entries: Sequence[Entry], sha256: str, benchmark: Benchmark, given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The leaderboard's entry of a checkpoint, by the results in its report, and the keys left to be filled in.

    entries: as in a report, the latest last. sha256: of the checkpoint's file. given: as of `parsed`.
    Raises ValueError unless natural accuracy and AutoAttack were measured on all images of the benchmark.
    """
    own = [entry for entry in entries if checkpoint_of(entry) == sha256 and entry["n"] == benchmark.images]
    pairs = (
        (natural, attacked)
        for attacked in reversed(own)
        for natural in reversed(own)
        if natural["attack"] == "natural" and _is_standard(attacked, benchmark) and _is_same(natural, attacked)
    )
    found = next(pairs, None)
    if found is None:
        raise ValueError(
            f"--robustbench-json: natural and aa must be measured on all {benchmark.images:,} test images with "
            f"{benchmark.threat_model} epsilon {benchmark.epsilon}; give --attacks natural,aa and no limit"
        )
    natural, attacked = found
    info: dict[str, Any] = {
        "link": "",
        "name": "",
        "authors": "",
        "additional_data": None,
        "number_forward_passes": 1,
        "dataset": benchmark.dataset,
        "venue": "",
        "architecture": _architecture(str(attacked["model"])),
        "eps": benchmark.epsilon,
        "clean_acc": _percentage(natural),
        "reported": "",
        "autoattack_acc": _percentage(attacked),
    }
    info |= given
    info["unreliable"] = bool(attacked["warnings"])
    return info, [key for key in _GIVEN if key not in _OPTIONAL and info[key] in ("", None)]


def _is_standard(entry: Entry, benchmark: Benchmark) -> bool:
    """True for a result of the whole AutoAttack in the benchmark's ball."""
    parameters = entry.get("parameters", {})
    return (
        entry["attack"] == "aa"
        and parameters.get("version") == "standard"
        and "parts" not in parameters
        and parameters.get("threat_model") == benchmark.threat_model
        and math.isclose(parameters.get("epsilon", math.nan), benchmark.radius)
    )


def _is_same(natural: Entry, attacked: Entry) -> bool:
    """True if both are of the same network on the same images."""
    parts = (entry.get("parameters", {}) for entry in (natural, attacked))
    keys = ("weights", "model", "data", "image_size")
    first, second = ([part.get(key) for key in keys] for part in parts)
    return first == second


def _percentage(entry: Entry) -> str:
    return f"{100 * entry['correct'] / entry['n']:.2f}"


def _architecture(name: str) -> str:
    """The leaderboard's name of an architecture, e.g. WideResNet-28-10."""
    bare = re.sub("-(silu|cifar|imagenet)$", "", name.rpartition(":")[2])
    written = {"wrn": "WideResNet", "preactresnet": "PreActResNet", "resnet": "ResNet"}
    kind = re.fullmatch(r"([a-z]+)(\d+(?:-\d+)?)", bare)
    return f"{written[kind[1]]}-{kind[2]}" if kind and kind[1] in written else bare
