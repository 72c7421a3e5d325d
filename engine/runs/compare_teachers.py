"""`engine teachers`: candidate teachers on the same images, and on these attacked on a small student."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from engine.attacks.masking import MOST_ZEROS
from engine.attacks.parts import size_of_batch
from engine.attacks.pgd import describe, preset
from engine.common.console import Reporter
from engine.common.files import create
from engine.common.lookup import check_known, look_up
from engine.common.numbers import percent
from engine.common.stopping import Interrupted, RunFailed, Stop, graceful_stop
from engine.config import RunConfig, explicit, load
from engine.evaluation.candidates import (
    MEASURES,
    AttackedImages,
    CandidateTeacher,
    attack_student,
    comparisons,
    logits_of,
    ranking,
)
from engine.evaluation.files import candidate_plots
from engine.evaluation.measure import evaluate, few_images, further, is_chance
from engine.models import check
from engine.models.normalize import normalisation
from engine.models.weights import LoadedModel, load_model, read_weights, weights_sha256
from engine.objectives import STUDENT
from engine.pipelines import datasets
from engine.pipelines.datasets import AnyDataset, AnySplit
from engine.pipelines.splits import SPLIT_NAMES, Request, balanced
from engine.runs.assemble import build_learner, build_pipeline, build_student
from engine.system import environment, precision
from engine.system.precision import Precision, on_device
from engine.training import schedule

_FORMAT = 1
REPORT_FILES = ("teachers.json", "teachers.png")
"""Files of a comparison in its folder."""

_ATTACK = "pgd10"  # of the paper's Figures 1 to 3
_STUDENT_TRAINING = {"method": "at", "batch_size": 64, "optim": {"schedule": "one-cycle"}}
_STUDENT_ATTACK_STEPS = 3
_STUDENT_SEED = 2**31  # differs from the seeds of candidates, which would have begun with the same weights
_LONGEST_LABEL = 24
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class TeachersConfig:
    """Choices of one comparison.

    dataset, epsilon, threat_model: None: as in the candidates' training, where they agree. split: "test" or
    "train". limit: images, balanced over classes. student: a checkpoint; None: one of `model` is trained by AT for
    so many epochs on so many training images. weights: of each candidate's file, normalize: of candidates from
    elsewhere that do not normalise their images themselves, both as in `load_model`. beta: exponent of alpha.
    sort_by: a name of `MEASURES`.
    """

    dataset: str | None = None
    data: str | None = None
    image_size: int | None = None
    split: str = "test"
    limit: int = 1000
    student: Path | None = None
    model: str = "resnet8"
    student_epochs: int = 10
    student_images: int = 2000
    weights: str | None = None
    normalize: str | tuple[Sequence[float], Sequence[float]] | None = None
    epsilon: str | None = None
    threat_model: str | None = None
    beta: float = 0.1
    sort_by: str = "reliability"
    batch_size: int | None = None
    seed: int = 0
    device: str = "auto"

    def completed(self, found: Sequence[LoadedModel]) -> RunConfig:
        """The training of the student, with data, ball and device. Raises ValueError where something is open."""
        dataset = self.dataset or _agreed("--dataset", [network.dataset for network in found if network.dataset])
        if dataset is None:
            raise ValueError("--dataset: no candidate tells on which data it was trained; name the data set")
        attacks = [_trained(network).attack for network in found if network.config and network.dataset == dataset]
        ball = {
            "epsilon": self.epsilon or _agreed("--epsilon", [attack.epsilon for attack in attacks]),
            "threat_model": self.threat_model
            or _agreed("--threat-model", [str(attack.threat_model) for attack in attacks]),
        }
        ball = {key: value for key, value in ball.items() if value is not None}
        # A step of half the radius, of what may be written as a fraction.
        attack = {"num_steps": _STUDENT_ATTACK_STEPS, "step_size": load({"attack": ball}).attack.epsilon / 2}
        keys = {"dataset": dataset, "data": self.data, "image_size": self.image_size, "device": self.device}
        keys |= {"model": self.model, "epochs": self.student_epochs, "seed": self.seed ^ _STUDENT_SEED}
        return load(_STUDENT_TRAINING, keys, {"attack": ball | attack, "loss": {"beta": self.beta}})


def _agreed(option: str, values: Sequence[_Value]) -> _Value | None:
    """The value that all have, None where there is none. Raises ValueError where they differ."""
    different = list(dict.fromkeys(values))
    if len(different) > 1:
        given = ", ".join(str(value) for value in different)
        raise ValueError(f"{option}: the candidates were trained with {given}; name one for all")
    return different[0] if different else None


def _trained(network: LoadedModel) -> RunConfig:
    """The configuration of an own checkpoint's training."""
    try:
        return load(explicit(network.config or {}))
    except ValueError as error:
        raise ValueError(f"{network.path}: the key 'config': {error}") from None


def run(
    paths: Sequence[Path], config: TeachersConfig, reporter: Reporter, out: Path | None = None
) -> dict[str, Any]:
    """Compare the networks in checkpoints as teachers; the report, as `teachers.json` has it.

    out: a folder, into which the report and its picture are written, where neither is there yet.
    Raises ValueError for whatever cannot be compared, RunFailed for a student that learns nothing finite and for a
    full disk, and Interrupted after a signal, when nothing was written.
    """
    check_known("--sort-by", config.sort_by, MEASURES)
    check_known("--split", config.split, SPLIT_NAMES)
    check(config.model)
    if config.normalize is not None:
        normalisation(config.normalize)
    if out is not None:
        _prepare(out)
    found = [_load(path, config) for path in dict.fromkeys(paths)]
    complete = config.completed(found)
    place = precision.choose(complete)
    dataset = _read(complete, config, reporter)
    found = [network.for_classes(dataset.class_names) for network in found]
    for network in found:
        for note in network.notes:
            reporter.message(f"Note: {network.path}: {note}")
    try:
        with graceful_stop(reporter.message) as stop, precision.deterministic():
            report = _Comparison(config, complete, place, dataset, reporter, stop).report(found)
    except Interrupted:
        raise Interrupted("interrupted; nothing was written") from None
    if out is not None:
        _write(out, report)
    return report


def _load(path: Path, config: TeachersConfig) -> LoadedModel:
    """A candidate; `normalize` holds for one from elsewhere that does not normalise its images itself."""
    found = read_weights(path, config.weights)
    normalises = found.config is not None or found.normalize
    return load_model(path, weights=config.weights, normalize=None if normalises else config.normalize)


def _read(complete: RunConfig, config: TeachersConfig, reporter: Reporter) -> AnyDataset:
    """The data set, of the training images those that are needed."""
    student_images = config.student_images if config.student is None else 0
    request = Request(
        limit_train=max(student_images, config.limit if config.split == "train" else 1),
        limit_test=config.limit,
        progress=reporter.part_progress("reading"),
        on_bad_image=complete.on_bad_image,
        image_size=complete.image_size,
        resident="if it fits",
        only_test=config.split == "test" and config.student is not None,
    )
    try:
        dataset = datasets.find(complete.dataset, complete.data, request)
    finally:
        reporter.end()
    reporter.notes(dataset.notes)
    reporter.skipped("training", dataset.train.skipped)
    reporter.skipped("test", dataset.test.skipped)
    return dataset


@dataclass(frozen=True)
class _Student:
    """The student on which images are attacked. origin: in words. path: of its checkpoint, if it is from one."""

    network: nn.Module
    model: str
    origin: str
    path: Path | None = None


@dataclass(frozen=True)
class _Comparison:
    """Measurements of one comparison. complete: the configuration of the student's training."""

    config: TeachersConfig
    complete: RunConfig
    place: Precision
    dataset: AnyDataset
    reporter: Reporter
    stop: Stop

    @property
    def ball(self) -> tuple[float, str]:
        """Radius and threat model."""
        return self.complete.attack.epsilon, self.complete.attack.threat_model

    @property
    def batch_size(self) -> int:
        """Images per forward."""
        return size_of_batch(self.config.batch_size, self.place.device, *self.dataset.test.shape)

    def report(self, found: Sequence[LoadedModel]) -> dict[str, Any]:
        """Measure all candidates."""
        splits: dict[str, AnySplit] = {"test": self.dataset.test, "train": self.dataset.train}
        images = balanced(look_up("--split", self.config.split, splits), self.config.limit)
        if warning := few_images(len(images)):
            self.reporter.message(f"Warning: candidates are measured on {self.config.split} images, {warning}")
        student = self._loaded_student() if self.config.student is not None else self._trained_student()
        attacked = self._attacked(student, images)
        about_student = self._about_student(student, attacked)
        measured = [self._measure(network, images, attacked) for network in found]
        candidates = [candidate for candidate, _ in measured]
        order = ranking(candidates, self.config.sort_by)
        rank = {index: position + 1 for position, index in enumerate(order)}
        compared = comparisons(candidates, self.config.sort_by, self.config.seed)
        spec = preset(_ATTACK, *self.ball)
        entries = [measured[index][1] for index in order]
        self._warn_of_copies(about_student, entries)
        return environment.session(self.place) | {
            "format": _FORMAT,
            "data": self._about_data(images),
            "attack": {"description": describe(spec)} | spec.model_dump(mode="json"),
            "beta": self.config.beta,
            "seed": self.config.seed,
            "student": about_student,
            "sort_by": self.config.sort_by,
            "measures": {
                name: {
                    "title": measure.title,
                    "definition": measure.definition,
                    "higher_is_better": measure.higher,
                }
                for name, measure in MEASURES.items()
            },
            "candidates": [{"rank": place, **entry} for place, entry in enumerate(entries, 1)],
            "comparisons": [
                {
                    "ranks": [rank[pair.better], rank[pair.worse]],
                    "difference": pair.difference,
                    "p_value": pair.p_value,
                    "told_apart": pair.is_clear,
                }
                for pair in compared
            ],
        }

    def _about_data(self, images: AnySplit) -> dict[str, Any]:
        dataset = self.dataset
        facts = {"name": dataset.name, "source": dataset.source, "sha256": dataset.sha256}
        return facts | {"split": self.config.split, "n": len(images), "classes": list(dataset.class_names)}

    # ------------------------------------------------------------ the student

    def _loaded_student(self) -> _Student:
        path = self.config.student
        assert path is not None
        loaded = load_model(path).for_classes(self.dataset.class_names)
        for note in loaded.notes:
            self.reporter.message(f"Note: {path}: {note}")
        return _Student(loaded.module.to(self.place.device), loaded.name, f"{loaded.name} of {path}", path)

    def _trained_student(self) -> _Student:
        """A student, trained by AT for a few steps."""
        config, images = self.complete, balanced(self.dataset.train, self.config.student_images)
        student = build_student(config, images, self.place)
        learner, step = build_learner(config, student, {}, self.place), 0
        pipeline = build_pipeline(config, images, self.place, flips=self.dataset.flip)
        steps = config.epochs * pipeline.steps_per_epoch
        try:
            with self.reporter.speaking_of(STUDENT), closing(pipeline):
                self.reporter.begin(f"AT, {config.model}", steps)
                for epoch in range(config.epochs):
                    self.reporter.at_epoch(epoch + 1, config.epochs)
                    student.train()
                    for batch in learner.batches(pipeline.epoch(epoch)):
                        lr = schedule.learning_rate(config, step, pipeline.steps_per_epoch)
                        learner.learn(batch, learner.method, lr, epoch=epoch)
                        step += 1
                        self.reporter.advance(step)
                        self.stop.check()
        finally:
            self.reporter.end()
        origin = (
            f"{config.model}, trained by AT for {steps} steps of {config.batch_size} images on {len(images):,} "
            f"training images, seed {config.seed}; its attack in training: {describe(config.attack)}"
        )
        return _Student(student.eval(), config.model, origin)

    def _attacked(self, student: _Student, images: AnySplit) -> AttackedImages:
        self.reporter.begin("attack on the student", len(images))
        try:
            return attack_student(
                student.network,
                images,
                preset(_ATTACK, *self.ball),
                seed=self.config.seed,
                batch_size=self.batch_size,
                on_batch=self.reporter.advance,
                stop=self.stop,
            )
        except FloatingPointError as error:
            if student.path is None:
                raise RunFailed(f"the student cannot be attacked: {error}") from None
            raise ValueError(f"--student: {student.path}: {error}") from None
        finally:
            self.reporter.end()

    def _about_student(self, student: _Student, attacked: AttackedImages) -> dict[str, Any]:
        labels, n = attacked.labels, len(attacked.labels)
        accuracies = {
            "natural": float((attacked.s_nat.argmax(1) == labels).double().mean()),
            "adversarial": float((attacked.s_adv.argmax(1) == labels).double().mean()),
        }
        warnings = []
        if is_chance(accuracies["natural"], n, len(self.dataset.class_names)):
            warnings.append(
                f"the student is no better than guessing ({percent(accuracies['natural'])}), and images attacked "
                "on it tell little: train it longer by --student-epochs and --student-images, or give one by "
                "--student"
            )
        if attacked.zero_gradients > MOST_ZEROS:
            warnings.append(
                f"{percent(attacked.zero_gradients)} of the gradients of the attack on the student are zero "
                f"(limit {MOST_ZEROS:.0%}): its images are weaker than they could be"
            )
        self._warn("", warnings)
        facts = {"path": None if student.path is None else str(student.path), "origin": student.origin}
        facts |= {"model": student.model, "weights_sha256": weights_sha256(student.network)}
        return facts | accuracies | {"fooled": int(attacked.fooled_N.sum()), "warnings": warnings}

    # ------------------------------------------------------------ the candidates

    def _measure(
        self, network: LoadedModel, images: AnySplit, attacked: AttackedImages
    ) -> tuple[CandidateTeacher, dict[str, Any]]:
        """A candidate and what the report says of it."""
        name = f"PGD-10 on {network.path}"
        self.reporter.begin(name, len(images))
        try:
            with on_device(network.module, self.place.device):
                results = self._evaluate(network.module, images, [_ATTACK])
                results |= self._evaluate(network.module, images, further(results))
                t_nat, t_adv = (
                    logits_of(network.module, x_N, batch_size=self.batch_size, stop=self.stop)
                    for x_N in (attacked.x_nat, attacked.x_adv)
                )
        except FloatingPointError as error:
            raise ValueError(f"{network.path}: is no teacher: {error}") from None
        finally:
            self.reporter.end()
        candidate = CandidateTeacher(
            parameters=sum(parameter.numel() for parameter in network.module.parameters()),
            labels=attacked.labels,
            t_nat=t_nat,
            t_adv=t_adv,
            withstands_N=torch.stack([result.verdicts for result in results.values()]).all(0),
            fooled_N=attacked.fooled_N,
            beta=self.config.beta,
        )
        warnings = [warning for result in results.values() for warning in result.warnings]
        if len(results) > 1:
            warnings.append(f"{' and '.join(results)} together give its robustness, since gradients were masked")
        warnings += self._warnings_of_chance(network, candidate)
        self._warn(f"{network.path}: ", warnings)
        method = (network.config or {}).get("method")
        return candidate, {
            "label": _label(Path(network.path)),
            "path": str(network.path),
            "sha256": network.sha256,
            "weights_sha256": weights_sha256(network.module),
            "model": network.name,
            "method": method,
            "notes": list(network.notes),
            "warnings": warnings,
            "attacks": {attack: result.numbers() for attack, result in results.items()},
            "measures": {name: measure.of(candidate)._asdict() for name, measure in MEASURES.items()},
            "alpha_histogram": candidate.alpha_histogram(),
        }

    def _evaluate(self, network: nn.Module, images: AnySplit, attacks: Sequence[str]) -> dict[str, Any]:
        return evaluate(
            network,
            images,
            attacks,
            epsilon=self.ball[0],
            threat_model=self.ball[1],
            batch_size=self.batch_size,
            seed=self.config.seed,
            on_pass=lambda attack, done, total, doing: self.reporter.advance(done),
            stop=self.stop,
        )

    def _warnings_of_chance(self, network: LoadedModel, candidate: CandidateTeacher) -> list[str]:
        natural, classes = MEASURES["natural"].of(candidate), len(self.dataset.class_names)
        if natural.value is None or not is_chance(natural.value, natural.n, classes):
            return []
        told = (
            f"{percent(natural.value)} of {natural.n:,} images is no better than guessing among {classes} classes"
        )
        if network.config is None and network.normalize is None:
            told += "; if its loader normalised the images, say so by --normalize"
        return [told]

    def _warn_of_copies(self, student: dict[str, Any], entries: Sequence[dict[str, Any]]) -> None:
        first = {student["weights_sha256"]: "the student"}
        for entry in entries:
            same = first.setdefault(entry["weights_sha256"], entry["path"])
            if same != entry["path"]:
                entry["warnings"].append(f"has the same weights as {same}")
                self._warn(f"{entry['path']}: ", entry["warnings"][-1:])

    def _warn(self, prefix: str, warnings: Sequence[str]) -> None:
        for warning in warnings:
            self.reporter.message(f"Warning: {prefix}{warning}")


def _label(path: Path) -> str:
    """A short name for tables and pictures: the run's, or the file's."""
    return (path.absolute().parent.name if path.name in ("best.pt", "last.pt") else path.stem)[:_LONGEST_LABEL]


def _prepare(out: Path) -> None:
    """Make the folder. Raises ValueError where it holds a comparison, and where it cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        taken = [name for name in REPORT_FILES if (out / name).exists()]
    except OSError as error:
        raise ValueError(f"--out: cannot write to {out}: {error.strerror}") from None
    if taken:
        raise ValueError(f"--out: {out / taken[0]} exists already; choose another folder")


def _write(out: Path, report: dict[str, Any]) -> None:
    contents = ((json.dumps(report, indent=2) + "\n").encode(), candidate_plots.picture(report))
    for name, content in zip(REPORT_FILES, contents, strict=True):
        try:
            create(out / name, content)
        except FileExistsError:
            raise RunFailed(f"{out / name}: another comparison wrote it meanwhile; it is kept") from None
        except OSError as error:
            raise RunFailed(f"{out / name}: cannot be written: {error.strerror}") from None
