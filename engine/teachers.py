"""Where teachers come from: a checkpoint, the teacher cache, or a training run of their own."""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from torch import nn

from engine.config import RunConfig, TeacherConfig, explicit, load, merge
from engine.distributed import World
from engine.evaluate import evaluate
from engine.pipelines.datasets import AnyDataset, AnySplit, cache_dir
from engine.precision import Precision
from engine.rundir import write_atomically
from engine.stopping import Interrupted, Stop
from engine.weights import load_model

# What a teacher shares with its student. Not the rest of the attack: BN mode, start and loss belong to a method.
_SHARED = (
    "semantics", "model", "normalize", "dataset", "data", "limit_train", "limit_test", "validation", "augment",
    "flip", "image_size", "on_bad_image", "pipeline", "order", "workers", "batches_ahead", "epochs", "batch_size",
    "micro_batch", "sync_bn", "lr", "lr_scale", "dtype", "amp", "compile", "lanes", "graphs",
    "checkpoint_activations", "masking_guard", "device", "optim", "log_every", "checkpoint_every",
)  # fmt: skip
_SHARED_ATTACK = ("threat_model", "epsilon", "step_size", "num_steps")
# What changes where or how visibly a teacher is trained, but not the teacher.
_NOT_IN_KEY = (
    "data", "device", "compile", "lanes", "graphs", "checkpoint_activations", "masking_guard", "out",
    "pipeline", "workers", "batches_ahead", "log_every", "checkpoint_every", "teacher", "teacher_st", "eval",
)  # fmt: skip

_SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class Teacher:
    """A frozen network in evaluation mode, and where it came from."""

    model: nn.Module
    name: str
    source: str
    sha256: str
    notes: tuple[str, ...] = ()


TrainRun = Callable[[RunConfig, Path], Path]
"""Trains a configuration in a run directory, going on where it stopped before; path of the best checkpoint."""


def obtain(
    config: RunConfig,
    section: str,
    dataset: AnyDataset,
    precision: Precision,
    run_dir: Path,
    train_run: TrainRun,
    say: Callable[[str], None],
    world: World,
    stop: Stop,
) -> Teacher:
    """The teacher of that section ("teacher" or "teacher_st") of the configuration.

    Where another run trains it already, this one waits. Raises ValueError for a checkpoint that cannot be this
    student's teacher, and Interrupted when it was asked to stop while it waits.
    """
    wanted: TeacherConfig = getattr(config, section)
    if wanted.checkpoint is not None:
        # Only what the user said of its architecture counts: a default must not overrule what the file tells.
        model = explicit(config.tree()).get(section, {}).get("model")
        return _open(Path(wanted.checkpoint), model, dataset, precision, f"checkpoint {wanted.checkpoint}")
    teacher_config = run_config(config, section)
    cached = cache_path(teacher_config, dataset)
    what = f"{teacher_config.method.upper()} teacher ({teacher_config.model}, {teacher_config.epochs} epochs)"
    with _reserved(cached, say, world, stop):
        if world.from_main(cached.exists):
            return _open(cached, None, dataset, precision, f"teacher cache, {cached}")
        say(f"No {what} for this data set in the cache: training one first, and keeping it for later runs.")
        best = train_run(teacher_config, run_dir / section)

        def keep() -> str:
            try:
                cached.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(cached, best.read_bytes())
            except OSError as error:
                return error.strerror or str(error)
            return ""

        if fault := world.from_main(keep):
            say(f"The teacher cannot be kept for later runs: {cached}: {fault}")
            return _open(best, None, dataset, precision, f"trained for this run, {best}")
        return _open(cached, None, dataset, precision, f"trained for this run, kept as {cached}")


@contextmanager
def _reserved(cached: Path, say: Callable[[str], None], world: World, stop: Stop) -> Iterator[None]:
    """Inside, no other run trains the teacher of that place in the cache; it is free when the process ends."""
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
        if not world.from_main(free):
            say("Another run trains this teacher: waiting for it")
            while not world.from_main(free):
                if world.from_main(lambda: stop.requested):
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
    said = explicit(config.tree())
    shared = {key: value for key, value in said.items() if key in _SHARED}
    attack = {key: value for key, value in said.get("attack", {}).items() if key in _SHARED_ATTACK}
    own = {
        "method": wanted.method,
        "model": wanted.model or config.model,
        "epochs": wanted.epochs or config.epochs,
        "lr": wanted.lr or config.lr,
        # Not the student's seed: the two would start from the same weights and see the same batches.
        "seed": config.seed + (1 if section == "teacher" else 2) if wanted.seed is None else wanted.seed,
        "eval": {"final": [], "probe_size": config.eval.probe_size, "batch_size": config.eval.batch_size},
    }
    return load(merge(shared, {"attack": attack}, own))


def cache_path(config: RunConfig, dataset: AnyDataset) -> Path:
    """Place of a teacher in the cache, by data set, model, method and a hash of everything else that made it."""
    recipe = {key: value for key, value in config.tree().items() if key not in _NOT_IN_KEY}
    recipe["data"] = dataset.sha256
    if config.validation > 0:  # then the test images have no part in it
        recipe["data"] = dataset.train_sha256
        del recipe["limit_test"]
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return cache_dir() / "teachers" / f"{config.dataset}-{config.model}-{config.method}-{digest}.pt"


def card(
    role: str,
    teacher: Teacher,
    held_out: AnySplit,
    config: RunConfig,
    precision: Precision,
    stop: Stop,
    world: World,
) -> list[str]:
    """The teacher card: what the student is about to learn from, measured on held-out images."""
    attack = "pgd10"
    results = evaluate(
        teacher.model,
        held_out,
        ["natural", attack],
        epsilon=config.attack.epsilon,
        threat_model=config.attack.threat_model,
        batch_size=config.eval.batch_size,
        limit=max(config.eval.probe_size, len(held_out.class_names)),
        device=precision.device,
        stop=stop,
        world=world,
    )
    parameters = sum(parameter.numel() for parameter in teacher.model.parameters())
    natural, robust = results["natural"], results[attack]
    return [
        f"{role}: {teacher.name}, {parameters:,} parameters",
        f"  source    {teacher.source}",
        f"  natural   {natural.accuracy:.2%}   PGD-10 {robust.accuracy:.2%}   on {natural.n} held-out images",
        f"  attack    {robust.description}",
        *(f"  note      {note}" for note in teacher.notes),
    ]


def _open(path: Path, model: str | None, dataset: AnyDataset, precision: Precision, source: str) -> Teacher:
    loaded = load_model(path, model=model, num_classes=len(dataset.class_names))
    network = precision.place(loaded.module).eval().requires_grad_(False)
    return Teacher(network, loaded.name, source, _weights_sha256(loaded.module), loaded.notes)


def _weights_sha256(network: nn.Module) -> str:
    """Hash of names and values alone: two files of one network differ in paths and times."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy())
    return digest.hexdigest()
