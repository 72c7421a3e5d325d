"""`engine eval`: a checkpoint of any origin, attacked on the test images of a data set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import config, precision, provenance
from engine.evaluate import check_names, evaluate
from engine.pipelines import datasets
from engine.reporter import Reporter
from engine.rundir import RunDir, write_json
from engine.stopping import graceful_stop
from engine.weights import load_model


@dataclass(frozen=True)
class Report:
    """Results by attack, and everything that is needed to repeat them."""

    title: str
    results: dict[str, dict[str, Any]]
    record: dict[str, Any]
    beside: Path

    def write(self, path: Path | None = None) -> Path:
        """Write the report as JSON, beside the checkpoint unless a path is given; the path."""
        path = path or self.beside
        try:
            write_json(path, self.record | {"results": self.results})
        except OSError as error:
            raise ValueError(f"--out: cannot write {path}: {error.strerror}") from None
        return path


def run(
    checkpoint: str,
    attacks: list[str],
    reporter: Reporter,
    *,
    limit: int | None = None,
    dataset: str | None = None,
    data: str | None = None,
    model: str | None = None,
    epsilon: str | None = None,
    threat_model: str | None = None,
    batch_size: int = 250,
    seed: int = 0,
    device: str = "auto",
) -> Report:
    """Evaluate a checkpoint, or the best one of a run directory; what is not given is as in its training.

    Raises ValueError for whatever cannot be evaluated, in one line.
    """
    names = check_names(attacks)
    if not names:
        raise ValueError("--attacks: name at least one attack, e.g. natural,fgsm,pgd20")
    path = Path(checkpoint)
    if path.is_dir():
        path = RunDir(path).best
    loaded = load_model(path, model=model)
    given = {
        "dataset": dataset or loaded.dataset,
        "data": data,
        "limit_test": limit,
        "device": device,
        "seed": seed,
        "attack": {"epsilon": epsilon, "threat_model": threat_model},
        "eval": {"batch_size": batch_size},
    }
    # The training's configuration says where the data lies and how large the ball was.
    trained = config.explicit(loaded.config or {}) if dataset in (None, loaded.dataset) else {}
    said = config.merge(
        {key: trained[key] for key in ("dataset", "data", "attack") if key in trained}, _given(given)
    )
    wanted = config.load(said)
    at = precision.choose(wanted)
    images = datasets.load(wanted.dataset, wanted.data, limit_train=None, limit_test=wanted.limit_test)
    if loaded.num_classes != len(images.class_names):
        raise ValueError(
            f"{path}: the checkpoint has {loaded.num_classes} classes, "
            f"the data set {wanted.dataset} has {len(images.class_names)}"
        )
    for note in loaded.notes:
        reporter.message(f"Note: {note}")
    network = loaded.module.to(at.device)
    total = len(images.test.labels)
    reporter.begin(f"{loaded.name} on {total:,} test images", total * len(names))
    with graceful_stop() as stop, precision.deterministic():

        def on_batch(name: str, done: int, of: int) -> None:
            reporter.advance(names.index(name) * of + done)
            stop.check()

        results = evaluate(
            network,
            images.test,
            names,
            epsilon=wanted.attack.epsilon,
            threat_model=wanted.attack.threat_model,
            batch_size=batch_size,
            seed=seed,
            device=at.device,
            on_batch=on_batch,
        )
    reporter.end()
    record = provenance.session(at) | {
        "checkpoint": {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        "model": loaded.name,
        "data": {"name": wanted.dataset, "source": images.source, "sha256": images.sha256},
        "seed": seed,
    }
    return Report(
        f"{loaded.name} on {wanted.dataset}",
        {name: result.as_dict() for name, result in results.items()},
        record,
        path.with_suffix(".eval.json"),
    )


def _given(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without the keys whose value is None."""
    return {
        key: _given(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value is not None
    }
