"""`engine eval`: a checkpoint of any origin, attacked on the test images of a data set."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine import config, precision, provenance
from engine.distributed import World, is_launched
from engine.evaluate import COLUMNS, check_names, evaluate
from engine.ledger import Ledger
from engine.pipelines import datasets
from engine.pipelines.splits import Request
from engine.reporter import Reporter
from engine.rundir import write_json
from engine.stopping import graceful_stop
from engine.weights import load_model

_AS_IN_TRAINING = ("dataset", "data", "image_size", "on_bad_image", "attack")


@dataclass(frozen=True)
class Report:
    """Results by attack, and everything that is needed to repeat them."""

    title: str
    results: dict[str, dict[str, Any]]
    record: dict[str, Any]

    def write(self, path: Path) -> None:
        """Write the report as JSON. Raises ValueError where that cannot be."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, self.record | {"results": self.results})
        except OSError as error:
            raise ValueError(f"--out: cannot write {path}: {error.strerror}") from None
        shutil.rmtree(_partial(path), ignore_errors=True)


def _prepare(path: Path) -> None:
    """What cannot be written is told before hours of attacks."""
    try:
        _partial(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: cannot write to {path.parent}: {error.strerror}") from None


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial")


def run(
    checkpoint: Path,
    attacks: Sequence[str],
    reporter: Reporter,
    *,
    limit: int | None = None,
    limit_aa: int | None = None,
    dataset: str | None = None,
    data: str | None = None,
    model: str | None = None,
    epsilon: str | None = None,
    threat_model: str | None = None,
    batch_size: int = 250,
    seed: int = 0,
    device: str = "auto",
    image_size: int | None = None,
    on_bad_image: str | None = None,
    out: Path | None = None,
    world: World | None = None,
) -> Report:
    """Evaluate a checkpoint; what is not given is as in its training.

    out: where the report will be written. Beside it lies what is measured so far; a call that asks for the same
    as one that was stopped goes on there.
    world: processes that share the work; all call this with the same arguments.
    limit, limit_aa: test images, balanced over classes; AutoAttack costs a hundred times the others.
    Raises ValueError for whatever cannot be evaluated, in one line.
    """
    world = world or World()
    names = check_names(attacks)
    loaded = load_model(checkpoint, model=model)
    trained = config.explicit(loaded.config) if loaded.config else {}
    if loaded.config and dataset not in (None, loaded.config["dataset"]):
        trained = {}  # where its data lay, and how large its ball was, holds for that data set alone
    given = {
        "dataset": dataset,
        "data": data,
        "device": device,
        "image_size": image_size,
        "on_bad_image": on_bad_image,
        "attack": {"epsilon": epsilon, "threat_model": threat_model},
    }
    wanted = config.load({key: trained[key] for key in _AS_IN_TRAINING if key in trained}, _said(given))
    at = precision.choose(wanted, world.local_rank)
    request = Request(
        limit_test=limit, on_bad_image=wanted.on_bad_image, image_size=wanted.image_size, resident="if it fits"
    )
    images = datasets.find(wanted.dataset, wanted.data, request)
    if loaded.num_classes != len(images.class_names):
        raise ValueError(
            f"{checkpoint}: the checkpoint has {loaded.num_classes} classes, "
            f"the data set {wanted.dataset} has {len(images.class_names)}"
        )
    reporter.skipped("test", images.test.skipped)
    for note in loaded.notes:
        reporter.message(f"Note: {note}")
    network = loaded.module.to(at.device)
    at = dataclasses.replace(at, dtype=next(network.parameters()).dtype)
    record = provenance.session(at) | {
        "checkpoint": {"path": str(checkpoint), "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest()},
        "model": loaded.name,
        "data": {"name": wanted.dataset, "source": images.source, "sha256": images.sha256},
        "skipped_images": len(images.test.skipped),
        "seed": seed,
        "processes": world.size,
    }
    decides = {key: record[key] for key in ("checkpoint", "data", "seed", "versions")}
    decides |= {"batch_size": batch_size, "limit": limit, "limit_aa": limit_aa, "device": at.device.type}
    decides |= {"epsilon": wanted.attack.epsilon, "threat_model": wanted.attack.threat_model}
    identity = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    ledger = None
    if out is not None:
        world.from_main(partial(_prepare, out))
        ledger = Ledger(_partial(out), identity, world.rank)
    results: dict[str, dict[str, Any]] = {}
    stopping = graceful_stop(reporter.message, launched=is_launched())
    with stopping as stop, world.watching(stop), precision.deterministic():
        for name in names:
            most = limit_aa if name == "aa" else None
            reporter.begin(f"{COLUMNS[name]}, {checkpoint}", min(len(images.test), most or len(images.test)))
            measured = evaluate(
                network,
                images.test,
                [name],
                epsilon=wanted.attack.epsilon,
                threat_model=wanted.attack.threat_model,
                batch_size=batch_size,
                limit=most,
                seed=seed,
                device=at.device,
                on_batch=lambda name, done, total: reporter.advance(done),
                stop=stop,
                world=world,
                ledger=ledger,
            )
            results[name] = measured[name].as_dict()
    reporter.end()
    method = f"{loaded.config['method']} " if loaded.config else ""
    return Report(f"{method}{loaded.name}", results, record)


def _said(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without the keys whose value is None."""
    return {
        key: _said(value) if isinstance(value, dict) else value for key, value in tree.items() if value is not None
    }
