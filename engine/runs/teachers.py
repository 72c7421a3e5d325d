"""Teachers: from a checkpoint, from the teacher cache, or from a training run of their own."""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from torch import nn

from engine import models
from engine.common.files import write_atomically
from engine.common.numbers import percent
from engine.common.stopping import Interrupted
from engine.config import (
    LABELLED_BY_TEACHER,
    RunConfig,
    TeacherConfig,
    differing,
    explicit,
    load,
    merge,
    part,
    semantics,
)
from engine.evaluation.measure import evaluate, is_chance
from engine.models.weights import LoadedModel, load_model, weights_sha256
from engine.pipelines.datasets import AnyDataset, AnySplit, cache_dir
from engine.runs.run_directory import RunDir
from engine.runs.session import Session
from engine.system.precision import Precision

# What stands for the format of the passes under "amp": without AMP they are in float32 too.
_AMP_IN_KEY = {"auto": True, "float32": False, "bfloat16": True, "float16": "float16"}

_OF_EXTRA_DATA = ("extra_data", "extra_fraction", "extra_labels")
_SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class Teacher:
    """A frozen network in evaluation mode, and where it came from."""

    model: nn.Module
    name: str
    source: str
    sha256: str
    notes: tuple[str, ...] = ()


TrainRun = Callable[[RunConfig, Path, AnyDataset], Path]
"""Trains a configuration in a run directory, or goes on there, on a data set; path of the best checkpoint."""


def obtain(
    session: Session, section: str, dataset: AnyDataset, train_run: TrainRun, known: str | None = None
) -> Teacher:
    """The teacher of that section ("teacher" or "teacher_st") of the configuration.

    known: the hash of its weights, where the student has begun to learn from it.
    Where another run trains it already, this one waits. Raises ValueError for a checkpoint that cannot be this
    student's teacher, and Interrupted when it was asked to stop while it waits.
    """
    config, precision, world, say = session.config, session.precision, session.world, session.console.message
    place = session.run.path / section
    wanted: TeacherConfig = getattr(config, section)
    if section in session.objects.teachers:
        network = copy.deepcopy(session.objects.teachers[section])
        return Teacher(
            precision.place(network).eval().requires_grad_(False),
            str(wanted.model),
            "an object of the program",
            weights_sha256(network),
        )
    if wanted.checkpoint is not None:
        # Only what the user said of its architecture counts: a default must not overrule what the file tells.
        model = explicit(config.tree()).get(section, {}).get("model")
        loaded = load_model(
            wanted.checkpoint, model=model, class_names=dataset.class_names, weights=wanted.weights,
            normalize=wanted.normalize,
        )  # fmt: skip
        return _teacher(loaded, precision, f"checkpoint {wanted.checkpoint}")
    teacher_config = run_config(config, section)
    if teacher_config.extra_data is None and dataset.extra is not None:
        dataset = replace(dataset, extra=None)
    before = _with_earlier_defaults(teacher_config)
    if before != teacher_config and world.broadcast_from_main(lambda: _is_of(before, place, known, dataset)):
        teacher_config = before
    cached = cache_path(teacher_config, dataset)
    what = f"{teacher_config.method.upper()} teacher ({teacher_config.model}, {teacher_config.epochs} epochs)"

    def opened(path: Path, source: str) -> Teacher:
        return _teacher(load_model(path, class_names=dataset.class_names), precision, source)

    with _reserved(cached, session):
        if world.broadcast_from_main(cached.exists):
            return opened(cached, f"teacher cache, {cached}")
        say(f"No {what} for this data set in the cache: training one first, and keeping it for later runs.")
        best = train_run(teacher_config, place, dataset)

        def keep() -> str:
            try:
                cached.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(cached, best.read_bytes())
            except OSError as error:
                return error.strerror or str(error)
            return ""

        if fault := world.broadcast_from_main(keep):
            say(f"The teacher cannot be kept for later runs: {cached}: {fault}")
            return opened(best, f"trained for this run, {best}")
        return opened(cached, f"trained for this run, kept as {cached}")


@contextmanager
def _reserved(cached: Path, session: Session) -> Iterator[None]:
    """Inside, no other run trains the teacher of that place in the cache; it is free when the process ends."""
    world, stop = session.world, session.stop
    held: list[IO[bytes]] = []

    def free() -> bool:
        try:
            if cached.exists():
                return True
            if not held:
                cached.parent.mkdir(parents=True, exist_ok=True)
                held.append(cached.with_name(f".{cached.name}.lock").open("wb"))
            fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # nothing can be kept there: no run has anything to wait for
            return True
        return True

    try:
        if not world.broadcast_from_main(free):
            session.console.message("Another run trains this teacher: waiting for it")
            while not world.broadcast_from_main(free):
                if world.broadcast_from_main(lambda: stop.requested):
                    raise Interrupted
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        yield
    finally:
        for file in held:
            file.close()


def run_config(config: RunConfig, section: str) -> RunConfig:
    """Configuration of the run that trains a teacher.

    What the user said of the student holds for its teacher too, where it is not the method's own.
    """
    wanted: TeacherConfig = getattr(config, section)
    shared = part(explicit(config.tree()), lambda key: key.teacher)
    if config.extra_labels == LABELLED_BY_TEACHER:
        shared = {key: value for key, value in shared.items() if key not in _OF_EXTRA_DATA}
    own = {
        "method": wanted.method,
        "model": wanted.model or config.model,
        "epochs": wanted.epochs or config.epochs,
        "lr": wanted.lr or config.lr,
        # Not the student's seed: the two would start from the same weights and see the same batches.
        "seed": config.seed + (1 if section == "teacher" else 2) if wanted.seed is None else wanted.seed,
        "eval": {"final": []},
    }
    return load(merge(shared, own))


def _with_earlier_defaults(config: RunConfig) -> RunConfig:
    return load(merge(semantics.earlier(config.method, config.semantics, config.epochs), explicit(config.tree())))


def _is_of(config: RunConfig, path: Path, known: str | None, dataset: AnyDataset) -> bool:
    """True if the teacher that a run began with, in training at that path or in the cache, is so configured."""
    if RunDir(path).config.exists():
        return not differing(RunDir.existing(path)[1], config)
    cached = cache_path(config, dataset)
    return known is not None and cached.exists() and weights_sha256(load_model(cached).module) == known


def cache_path(config: RunConfig, dataset: AnyDataset) -> Path:
    """Place of a teacher in the cache, by data set, model, method and a hash of everything else that made it."""
    tree = config.tree()
    recipe = merge(
        part(tree, lambda key: key.decides and not key.later),
        part(explicit(tree), lambda key: key.decides and key.later),
    )
    recipe["amp"] = config.amp and _AMP_IN_KEY[config.amp_dtype]
    recipe["data"] = dataset.sha256
    if version := models.get(config.model).version:
        recipe["model_version"] = version
    if config.validation > 0:  # then the test images have no part in it
        recipe["data"] = dataset.train_sha256
        del recipe["limit_test"]
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return cache_dir() / "teachers" / f"{config.dataset}-{config.model}-{config.method}-{digest}.pt"


def card(session: Session, role: str, teacher: Teacher, held_out: AnySplit) -> list[str]:
    """Lines of the teacher card: accuracies on held-out images of what the student is about to learn from."""
    config, attack, classes = session.config, "pgd10", len(held_out.class_names)
    try:
        results = evaluate(
            teacher.model,
            held_out,
            ["natural", attack],
            epsilon=config.attack.epsilon,
            threat_model=config.attack.threat_model,
            batch_size=config.eval.batch_size,
            limit=max(config.eval.probe_size, classes),
            device=session.precision.device,
            stop=session.stop,
            world=session.world,
        )
    except FloatingPointError as error:
        raise ValueError(f"{role}: {teacher.source} is no teacher: {error}") from None
    parameters = sum(parameter.numel() for parameter in teacher.model.parameters())
    natural, robust = results["natural"], results[attack]
    warnings = list(robust.warnings)
    if is_chance(natural.accuracy, natural.n, classes):
        warnings.append(f"this teacher has learnt nothing: guessing among {classes} classes is right as often")
    return [
        f"{teacher.name}, {parameters:,} parameters, {teacher.source}",
        f"natural {percent(natural.accuracy)}, PGD-10 {percent(robust.accuracy)} of {natural.n:,} held-out images",
        f"attacked by {robust.description}",
        *(f"Note: {note}" for note in teacher.notes),
        *(f"WARNING: {warning}" for warning in warnings),
    ]


def _teacher(loaded: LoadedModel, precision: Precision, source: str) -> Teacher:
    network = precision.place(loaded.module).eval().requires_grad_(False)
    return Teacher(network, loaded.name, source, weights_sha256(loaded.module), loaded.notes)
