"""`engine verify`: the adversarial images that a report tells of, checked again, and a sample of those that stood.

Shape suffixes: N images of a result, R some of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from engine.attacks import table
from engine.attacks.auto.search import Ball
from engine.attacks.auto.standard import inside, outside
from engine.attacks.kinds import Task, craft
from engine.common.console import Reporter
from engine.common.files import regular_file
from engine.common.tensor_files import read_tensors
from engine.evaluation import reports
from engine.evaluation.batches import batch_of, size_of_batch
from engine.evaluation.evaluate_checkpoint import EvaluationConfig, Opened, opened
from engine.evaluation.files.adversarial import Rows, rows_of
from engine.evaluation.files.hits import classified, judged
from engine.evaluation.measure import undisturbed
from engine.models.weights import weights_sha256
from engine.pipelines.splits import limited
from engine.system import precision

ATTACK = "pgd20"
"""The attack on the images that stood."""


@dataclass(frozen=True)
class Verification:
    """Choices of a verification. images: that stood, to be attacked again; None: all. seed: of their choice.

    checkpoint, data: where they lie now, if not where they lay.
    """

    images: int | None = 100
    seed: int = 0
    device: str = "auto"
    checkpoint: Path | None = None
    data: str | None = None


class Told(BaseModel):
    """What a report's entry tells of its file of images."""

    model_config = ConfigDict(strict=True)

    file: str
    sha256: str
    images: int
    still_adversarial_as_uint8: int


class Measurement(NamedTuple):
    """What was measured: the network and images, opened again, their batches, and an entry of the report."""

    entry: Mapping[str, Any]
    opened: Opened
    size: int
    sample_N: Tensor

    @property
    def name(self) -> str:
        """The attack's name."""
        return str(self.entry["attack"])

    @property
    def ball(self) -> Ball:
        """The attack's ball."""
        return Ball(self.entry["parameters"]["threat_model"], self.entry["parameters"]["epsilon"])

    def batch(self, sample_R: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of samples."""
        test, at = self.opened.images.test, self.opened.at
        return batch_of(test.images, test.labels, sample_R, at.device, at.dtype)


def verify(path: Path, choices: Verification, reporter: Reporter) -> list[str]:
    """Whatever does not hold of a report, a line each.

    Raises ValueError for what is no report with adversarial images, and where network or data are not there.
    """
    if not path.exists():
        raise ValueError(f"{path}: there is no such report")
    entries = [entry for entry in reports.read(path) if "adversarial" in entry]
    if not entries:
        raise ValueError(
            f"{path}: no result in it has adversarial images; see engine eval --save-adversarial FILE"
        )
    return [
        f"{entry['attack']}: {line}" for entry in entries for line in _of_entry(path, entry, choices, reporter)
    ]


def _of_entry(path: Path, entry: Mapping[str, Any], choices: Verification, reporter: Reporter) -> Iterator[str]:
    """Whatever does not hold of one result."""
    try:
        told = Told.model_validate(entry["adversarial"])
        config = EvaluationConfig(**entry["options"] | _given(choices))
        checkpoint = choices.checkpoint or _checkpoint(path, entry)
        attacks = table.resolve(config.attacks)
        wanted = [entry["parameters"][key] for key in ("checkpoint", "weights", "data", "threat_model", "epsilon")]
        counts = {part: (each["images"], each["stood"]) for part, each in entry["details"].items()}
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise ValueError(f"{path}: the result of {entry['attack']} is not whole: {error!s:.80}") from None
    file = path.parent / told.file
    content = _bytes(file)
    if hashlib.sha256(content).hexdigest() != told.sha256:
        yield f"{file} is not the file that the report tells of: its sha256 is another"
    if hashlib.sha256(_bytes(checkpoint)).hexdigest() != wanted[0]:
        yield f"{checkpoint} is not the checkpoint that was evaluated: its sha256 is another"
        return
    try:
        rows = rows_of(read_tensors(file), entry)
    except ValueError as error:
        yield f"{file}: {error}"
        return
    found = opened(checkpoint, config, attacks)
    if weights_sha256(found.loaded.module) != wanted[1]:
        yield f"{checkpoint}: the network has other weights than the one that was evaluated"
        return
    if found.images.sha256 != wanted[2]:
        yield "the images are not those of the evaluation: the data's sha256 is another"
        return
    measurement = _measurement(entry, found, config)
    with precision.deterministic(), undisturbed(found.loaded.module, found.at.device):
        yield from _of_counts(rows, told, counts, measurement)
        yield from _of_images(rows, told, measurement, reporter)
        yield from _of_those_that_stood(rows, choices, measurement, reporter)


def _given(choices: Verification) -> dict[str, Any]:
    return {"device": choices.device} | ({} if choices.data is None else {"data": choices.data})


def _checkpoint(report: Path, entry: Mapping[str, Any]) -> Path:
    """Where the checkpoint lies: where it lay, else beside the report."""
    told = Path(entry["checkpoint"]["path"])
    return told if told.exists() else report.parent / told.name


def _bytes(path: Path) -> bytes:
    try:
        return regular_file(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def _measurement(entry: Mapping[str, Any], found: Opened, config: EvaluationConfig) -> Measurement:
    test = found.images.test
    limit = config.limit_of(entry["attack"])
    size = size_of_batch(config.batch_size, *test.shape)
    return Measurement(entry, found, size, limited(test.labels, limit, 0, "limit"))


def _of_counts(
    rows: Rows, told: Told, counts: Mapping[str, tuple[int, int]], measurement: Measurement
) -> Iterator[str]:
    """Whatever the numbers of images say against the report."""
    if len(rows.fell_N) != len(measurement.sample_N):
        yield f"the file tells of {len(rows.fell_N)} images, and {len(measurement.sample_N)} were attacked"
        return
    if len(rows.samples) != told.images:
        yield f"{len(rows.samples)} adversarial images are there, and the report tells of {told.images}"
    stood = int((rows.fell_N < 0).sum())
    if stood != measurement.entry.get("correct"):
        yield f"{stood} images stood, and the report tells of {measurement.entry.get('correct')}"
    for number, (part, (images, left)) in enumerate(counts.items()):
        broke = int((rows.fell_N == number).sum())
        if broke != images - left:
            yield f"{broke} images fell to {part}, and the report tells of {images - left}"
    expected = measurement.sample_N[rows.fell_N > 0]
    if not torch.equal(rows.samples, expected):
        yield "the images are not those of the samples that fell, each once and in their order"
    elif not torch.equal(rows.part, rows.fell_N[rows.fell_N > 0]):
        yield "the images' parts are not those to which the samples fell"


def _of_images(rows: Rows, told: Told, measurement: Measurement, reporter: Reporter) -> Iterator[str]:
    """Whatever is wrong with the images that are said to be adversarial."""
    n, rounded = len(measurement.opened.images.test.labels), 0
    reporter.begin(f"{measurement.name}: adversarial images", len(rows.samples))
    for chosen in _parts(torch.arange(len(rows.samples)), measurement.size):
        samples = rows.samples[chosen]
        if not ((samples >= 0) & (samples < n)).all() or rows.images.shape[1] != 3:
            yield "there are images of no sample of the data"
            return
        x_nat, labels_R = measurement.batch(samples)
        x_adv = rows.images[chosen].to(x_nat.device)
        if x_adv.shape != x_nat.shape or x_adv.dtype != x_nat.dtype:
            yield f"the images are {x_adv.dtype} {tuple(x_adv.shape)}, and those of the data {tuple(x_nat.shape)}"
            return
        judgement = judged(measurement.opened.loaded.module, x_adv, x_nat, labels_R, measurement.ball)
        rounded += int(judgement.hit_rounded_R.sum())
        faults = {
            "lies outside the ball or [0, 1]": outside(x_adv, x_nat, measurement.ball),
            "is classified correctly": judgement.predicted_R == labels_R,
            "has another label in the data": rows.labels[chosen].to(labels_R.device) != labels_R,
            "gets another class from the network than the file tells": (
                judgement.predicted_R != rows.predicted[chosen].to(labels_R.device)
            ),
        }
        for words, wrong_R in faults.items():
            for sample in samples[wrong_R.cpu()].tolist():
                yield f"the image of sample {sample} {words}"
        reporter.advance(int(chosen[-1]) + 1)
    reporter.end()
    if rounded != told.still_adversarial_as_uint8:
        yield (
            f"{rounded} images are adversarial when rounded to n/255, and the report tells of "
            f"{told.still_adversarial_as_uint8}"
        )


def _of_those_that_stood(
    rows: Rows, choices: Verification, measurement: Measurement, reporter: Reporter
) -> Iterator[str]:
    """Whatever is wrong with random ones of the images that are said to have stood."""
    if len(rows.fell_N) != len(measurement.sample_N):
        return
    stood = measurement.sample_N[rows.fell_N < 0]
    order = torch.randperm(len(stood), generator=torch.Generator().manual_seed(choices.seed))
    chosen = stood[order[: choices.images]].sort().values
    attack, network = table.find(ATTACK), measurement.opened.loaded.module
    ball = (measurement.ball.epsilon, measurement.ball.threat_model)
    task = Task(network, measurement.opened.loaded.num_classes, ball, choices.seed)
    reporter.begin(f"{measurement.name}: images that stood, by {attack.title}", len(chosen))
    for samples in _parts(chosen, measurement.size):
        x_nat, labels_R = measurement.batch(samples)
        clean_R, _ = classified(network, x_nat)
        x_adv = craft(attack, task, x_nat, labels_R, samples.to(x_nat.device))
        x_adv = inside(x_adv, x_nat, measurement.ball)  # a last bit may be outside
        flipped_R = judged(network, x_adv, x_nat, labels_R, measurement.ball).hit_R & (clean_R == labels_R)
        for sample in samples[(clean_R != labels_R).cpu()].tolist():
            yield f"sample {sample} is said to have stood, and is misclassified as it is"
        for sample in samples[flipped_R.cpu()].tolist():
            yield f"found an adversarial image that the report missed, of sample {sample}, by {attack.title}"
    reporter.end()


def _parts(numbers: Tensor, size: int) -> Iterator[Tensor]:
    """At most so many of them at a time."""
    yield from (numbers.split(size) if len(numbers) else ())
