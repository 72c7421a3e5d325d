"""`engine verify`: the adversarial images that a report tells of, checked again, and a sample of those that stood.

Shape suffixes: N images of a result, R some of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from engine.attacks import table
from engine.attacks.auto.search import Ball
from engine.attacks.auto.standard import inside, outside
from engine.attacks.evaluated import undisturbed
from engine.attacks.kinds import Task, craft
from engine.attacks.parts import size_of_batch
from engine.common.console import Reporter
from engine.common.files import regular_file
from engine.common.tensor_files import read_tensors
from engine.evaluation import reports
from engine.evaluation.batches import batch_of
from engine.evaluation.evaluate_checkpoint import EvaluationConfig, Opened, opened
from engine.evaluation.files.adversarial import Rows, rows_of
from engine.evaluation.files.hits import classified, judged
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


class _Part(BaseModel):
    """A value of a report, of the types that it was written in."""

    model_config = ConfigDict(strict=True)


class Saved(_Part):
    """The file of images, as it is told of."""

    file: str
    sha256: str
    images: int
    still_adversarial_as_uint8: int


class Place(_Part):
    """The place of the checkpoint at the time."""

    path: str


class Count(_Part):
    """Images that came to a part of the attack, and that stood it."""

    images: int
    stood: int


class Identity(_Part):
    """Hashes of what was evaluated, and the ball."""

    checkpoint: str
    weights: str
    data: str
    threat_model: Literal["Linf", "L2"]
    epsilon: Annotated[float, Field(gt=0)]


class Options(_Part):
    """Choices of the evaluation, as of `EvaluationConfig`."""

    attacks: list[str]
    limit: int | None
    limit_aa: int | None
    dataset: str | None
    data: str | None
    model: str | None
    weights: str | None
    normalize: str | list[list[float]] | None
    epsilon: str | None
    threat_model: str | None
    batch_size: int | None
    seed: int
    image_size: int | None
    on_bad_image: str | None

    def config(self, choices: Verification) -> EvaluationConfig:
        """The same evaluation here."""
        given: dict[str, Any] = dict(self)
        if isinstance(self.normalize, list):
            given["normalize"] = tuple(self.normalize)
        if choices.data is not None:
            given["data"] = choices.data
        return EvaluationConfig(**given, device=choices.device)


class ReportedResult(_Part):
    """An entry of a report, of a result with adversarial images."""

    attack: str
    correct: int
    adversarial: Saved
    checkpoint: Place
    options: Options
    parameters: Identity
    details: dict[str, Count]

    @property
    def ball(self) -> Ball:
        """The attack's ball."""
        return Ball(self.parameters.threat_model, self.parameters.epsilon)


class Measurement(NamedTuple):
    """A measurement as it is told, opened again. size: of a batch. sample_N: all that were attacked."""

    told: ReportedResult
    opened: Opened
    size: int
    sample_N: Tensor

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
        told = ReportedResult.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{path}: the result of {entry['attack']} is not whole: {where}: {first['msg']}"
        ) from None
    file, checkpoint = path.parent / told.adversarial.file, choices.checkpoint or _checkpoint(path, told)
    if hashlib.sha256(_bytes(file)).hexdigest() != told.adversarial.sha256:
        yield f"{file} is not the file that the report tells of: its sha256 is another"
    if hashlib.sha256(_bytes(checkpoint)).hexdigest() != told.parameters.checkpoint:
        yield f"{checkpoint} is not the checkpoint that was evaluated: its sha256 is another"
        return
    try:
        rows = rows_of(read_tensors(file), entry)
    except ValueError as error:
        yield f"{file}: {error}"
        return
    config = told.options.config(choices)
    found = opened(checkpoint, config, table.resolve(config.attacks))
    if weights_sha256(found.loaded.module) != told.parameters.weights:
        yield f"{checkpoint}: the network has other weights than the one that was evaluated"
        return
    if found.images.sha256 != told.parameters.data:
        yield "the images are not those of the evaluation: the data's sha256 is another"
        return
    test = found.images.test
    size = size_of_batch(config.batch_size, found.at.device, *test.shape)
    sample_N = limited(test.labels, config.limit_of(told.attack), 0, "limit")
    measurement = Measurement(told, found, size, sample_N)
    with precision.deterministic(), undisturbed(found.loaded.module, found.at.device):
        yield from _of_counts(rows, measurement)
        yield from _of_images(rows, measurement, reporter)
        yield from _of_those_that_stood(rows, choices, measurement, reporter)


def _checkpoint(report: Path, told: ReportedResult) -> Path:
    """The place of the checkpoint: where it lay, else beside the report."""
    path = Path(told.checkpoint.path)
    return path if path.exists() else report.parent / path.name


def _bytes(path: Path) -> bytes:
    try:
        return regular_file(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def _of_counts(rows: Rows, measurement: Measurement) -> Iterator[str]:
    """Whatever the numbers of images say against the report."""
    told = measurement.told
    if len(rows.fell_N) != len(measurement.sample_N):
        yield f"the file tells of {len(rows.fell_N)} images, and {len(measurement.sample_N)} were attacked"
        return
    if len(rows.samples) != told.adversarial.images:
        there = len(rows.samples)
        yield f"{there} adversarial images are there, and the report tells of {told.adversarial.images}"
    stood = int((rows.fell_N < 0).sum())
    if stood != told.correct:
        yield f"{stood} images stood, and the report tells of {told.correct}"
    for number, (part, counted) in enumerate(told.details.items()):
        broke = int((rows.fell_N == number).sum())
        if broke != counted.images - counted.stood:
            yield f"{broke} images fell to {part}, and the report tells of {counted.images - counted.stood}"
    expected = measurement.sample_N[rows.fell_N > 0]
    if not torch.equal(rows.samples, expected):
        yield "the images are not those of the samples that fell, each once and in their order"
    elif not torch.equal(rows.part, rows.fell_N[rows.fell_N > 0]):
        yield "the images' parts are not those to which the samples fell"


def _of_images(rows: Rows, measurement: Measurement, reporter: Reporter) -> Iterator[str]:
    """Whatever is wrong with the images that are said to be adversarial."""
    told, rounded, n = measurement.told, 0, len(measurement.opened.images.test.labels)
    reporter.begin(f"{measurement.told.attack}: adversarial images", len(rows.samples))
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
        judgement = judged(measurement.opened.loaded.module, x_adv, x_nat, labels_R, measurement.told.ball)
        rounded += int(judgement.hit_rounded_R.sum())
        faults = {
            "lies outside the ball or [0, 1]": outside(x_adv, x_nat, measurement.told.ball),
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
    if rounded != told.adversarial.still_adversarial_as_uint8:
        yield (
            f"{rounded} images are adversarial when rounded to n/255, and the report tells of "
            f"{told.adversarial.still_adversarial_as_uint8}"
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
    ball = (measurement.told.ball.epsilon, measurement.told.ball.threat_model)
    task = Task(network, measurement.opened.loaded.num_classes, ball, choices.seed)
    reporter.begin(f"{measurement.told.attack}: images that stood, by {attack.title}", len(chosen))
    for samples in _parts(chosen, measurement.size):
        x_nat, labels_R = measurement.batch(samples)
        clean_R, _ = classified(network, x_nat)
        x_adv = craft(attack, task, x_nat, labels_R, samples.to(x_nat.device))
        x_adv = inside(x_adv, x_nat, measurement.told.ball)  # a last bit may be outside
        flipped_R = judged(network, x_adv, x_nat, labels_R, measurement.told.ball).hit_R & (clean_R == labels_R)
        for sample in samples[(clean_R != labels_R).cpu()].tolist():
            yield f"sample {sample} is said to have stood, and is misclassified as it is"
        for sample in samples[flipped_R.cpu()].tolist():
            yield f"found an adversarial image that the report missed, of sample {sample}, by {attack.title}"
    reporter.end()


def _parts(numbers: Tensor, size: int) -> Iterator[Tensor]:
    """At most so many of them at a time."""
    yield from (numbers.split(size) if len(numbers) else ())
