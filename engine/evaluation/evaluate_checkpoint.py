"""`engine eval`: a checkpoint of any origin, attacked on the test images of a data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from engine.attacks import autoattack
from engine.attacks.pgd import presets
from engine.common import optional
from engine.common.console import Reporter
from engine.common.files import code_hash
from engine.common.stopping import RunFailed, Stop, graceful_stop
from engine.config import RunConfig, explicit, load
from engine.evaluation import reports
from engine.evaluation.arguments import check_names
from engine.evaluation.measure import evaluate
from engine.evaluation.partial_results import PartialResults
from engine.evaluation.results import COLUMNS, UNMASKED, Result, further, is_chance
from engine.models.weights import LoadedModel, load_model, weights_sha256
from engine.pipelines import datasets
from engine.pipelines.splits import Request, limited
from engine.system import environment, precision
from engine.system.distributed import World, is_launched

Results = dict[str, dict[str, Any]]
"""By attack, as in `Result.as_dict`."""

_AS_IN_TRAINING = ("dataset", "data", "image_size", "on_bad_image", "attack")


@dataclass(frozen=True)
class EvaluationConfig:
    """Choices of one evaluation; what is None is as in the checkpoint's training.

    limit, limit_aa: test images, balanced over classes; AutoAttack costs a hundred times the others.
    weights, normalize: of the file, as in `load_model`. epsilon: in [0, 1], or a fraction such as "8/255".
    """

    attacks: Sequence[str]
    limit: int | None = None
    limit_aa: int | None = None
    dataset: str | None = None
    data: str | None = None
    model: str | None = None
    weights: str | None = None
    normalize: str | tuple[Sequence[float], Sequence[float]] | None = None
    epsilon: str | None = None
    threat_model: str | None = None
    batch_size: int = 250
    seed: int = 0
    device: str = "auto"
    image_size: int | None = None
    on_bad_image: str | None = None

    def completed(self, loaded: LoadedModel) -> RunConfig:
        """Data, device and ball, from the training's configuration where not chosen. Raises ValueError."""
        try:
            trained = explicit(loaded.config) if loaded.config else {}
        except ValueError as error:
            raise ValueError(f"{loaded.path}: the key 'config': {error}") from None
        if self.dataset not in (None, loaded.dataset):
            trained = {}  # where its data lay, and how large its ball was, holds for that data set alone
        chosen = {key: getattr(self, key) for key in ("dataset", "data", "device", "image_size", "on_bad_image")}
        chosen["attack"] = {"epsilon": self.epsilon, "threat_model": self.threat_model}
        return load({key: trained[key] for key in _AS_IN_TRAINING if key in trained}, _without_none(chosen))


@dataclass(frozen=True)
class Report:
    """Results by attack. path: of the file that has them too, with all that is needed to repeat them."""

    title: str
    results: Results
    path: Path | None


def run(
    checkpoint: Path,
    config: EvaluationConfig,
    reporter: Reporter,
    *,
    out: Path | None = None,
    world: World | None = None,
) -> Report:
    """Evaluate a checkpoint.

    out: the report to which the results are added. Beside it lies what is measured so far; a call that asks for
    the same attack as one that was stopped goes on there.
    world: processes that share the work; all call this with the same arguments.
    Where an attack's gradients are masked, one whose loss cannot be masked by the size of logits is added.
    Raises ValueError for whatever cannot be evaluated, and RunFailed for logits that are not finite and for a full
    disk, in one line.
    """
    names = check_names(config.attacks)
    loaded = load_model(checkpoint, model=config.model, weights=config.weights, normalize=config.normalize)
    wanted = config.completed(loaded)
    world = world or World()
    at = precision.choose(wanted, world.local_rank)
    request = Request(
        limit_test=config.limit,
        on_bad_image=wanted.on_bad_image,
        image_size=wanted.image_size,
        resident="if it fits",
        only_test=True,
    )
    images = datasets.find(wanted.dataset, wanted.data, request)
    loaded = loaded.for_classes(images.class_names)
    if "aa" in names:
        autoattack.check_classes(loaded.num_classes)
    reporter.skipped("test", images.test.skipped)
    for note in loaded.notes:
        reporter.message(f"Note: {note}")
    network = loaded.module.to(at.device)
    at = replace(at, dtype=next(network.parameters()).dtype)
    record = _record(loaded, images, wanted, at) | {"processes": world.size}
    identity = {
        "checkpoint": loaded.sha256,
        "weights": weights_sha256(network),
        "model": loaded.name,
        "data": images.sha256,
        "image_size": wanted.image_size,
        "seed": config.seed,
        "dtype": str(at.dtype).removeprefix("torch."),
        "engine": record["engine"],
        "torch": record["versions"]["torch"],
    }
    subject = _Subject(network, images.test, config, (wanted.attack.epsilon, wanted.attack.threat_model), identity)
    measured = _Evaluation(checkpoint, subject, reporter, world).measure(names, record, out)
    if loaded.config is None and loaded.normalize is None and (natural := measured.get("natural")):
        _suggest_normalisation(reporter, natural, loaded)
    method = f"{loaded.config['method']} " if loaded.config and "method" in loaded.config else ""
    return Report(f"{method}{loaded.name}", measured, out)


def _record(
    loaded: LoadedModel, images: datasets.AnyDataset, wanted: RunConfig, at: precision.Precision
) -> dict[str, Any]:
    """Facts of the session, the network and the data, for the report."""
    return environment.session(at) | {
        "checkpoint": {"path": str(loaded.path), "sha256": loaded.sha256},
        "model": loaded.name,
        "weights": loaded.taken,
        "normalize": loaded.normalize,
        "data": {"name": wanted.dataset, "source": images.source, "sha256": images.sha256},
        "skipped_images": len(images.test.skipped),
    }


@dataclass(frozen=True)
class _Subject:
    """Network and images of an evaluation. ball: epsilon, threat model. identity: decides the numbers."""

    network: nn.Module
    images: datasets.AnySplit
    config: EvaluationConfig
    ball: tuple[float, str]
    identity: Mapping[str, Any]

    def limit(self, name: str) -> int | None:
        """Images at most under this attack."""
        return self.config.limit_aa if name == "aa" else None

    def count(self, name: str) -> int:
        """Images that an attack gets. Raises ValueError where the limit is below the number of classes."""
        return len(limited(self.images.labels, self.limit(name), 0, "--limit-aa"))

    def parameters(self, name: str) -> dict[str, Any]:
        """Everything that decides an attack's result: equal parameters, equal results."""
        epsilon, threat_model = self.ball
        own: dict[str, Any] = {}
        if name == "aa":
            package, _ = autoattack.installed()
            own = {"threat_model": threat_model, "epsilon": epsilon, "version": "standard"}
            own |= {"batch_size": self.config.batch_size, package: optional.version(package)}
        elif name != "natural":
            own = presets(epsilon, threat_model)[name].model_dump(mode="json")
        return {"attack": name, "n": self.count(name)} | own | dict(self.identity)

    def partial_identities(self, parameters: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
        """Hash by attack of its parameters, the batch size, this code and device: the key of its batches."""
        also = {"batch_size": self.config.batch_size, "device": next(self.network.parameters()).device.type}
        also |= {"code": code_hash(), "versions": record["versions"], "kernels": record["kernels"]}
        return {
            name: hashlib.sha256(json.dumps([of_attack, also], sort_keys=True).encode()).hexdigest()
            for name, of_attack in parameters.items()
        }


@dataclass(frozen=True)
class _Evaluation:
    """Evaluation of a checkpoint's network by some processes."""

    checkpoint: Path
    subject: _Subject
    reporter: Reporter
    world: World

    def measure(self, names: Sequence[str], record: Mapping[str, Any], out: Path | None) -> Results:
        """Results of the attacks, and of further ones that prove necessary; added to the report."""
        parameters = {name: self.subject.parameters(name) for name in dict.fromkeys((*names, UNMASKED))}
        if out is None:
            return {name: result.as_dict() for name, result in self._measured(names, None).items()}
        folder = reports.notes_of(out)
        partial = PartialResults(folder, self.subject.partial_identities(parameters, record), self.world.rank)
        done = False
        try:
            if others := self.world.broadcast_from_main(lambda: _prepared(out, partial)):
                self.reporter.message(f"Note: {folder} has notes of {others} attacks with other settings as well")
            found = {name: result.as_dict() for name, result in self._measured(names, partial).items()}
            entries = [{**record, **result, "parameters": parameters[name]} for name, result in found.items()]
            for line in self.world.broadcast_from_main(lambda: _written(out, entries)):
                self.reporter.message(line)
            done = True
        finally:
            partial.release(done=done)
        return found

    def _measured(self, names: Sequence[str], partial: PartialResults | None) -> dict[str, Result]:
        found: dict[str, Result] = {}
        stopping = graceful_stop(self.reporter.message, launched=is_launched())
        with stopping as stop, self.world.collective_errors(stop), precision.deterministic():
            waiting = list(names)
            while waiting:
                name = waiting.pop(0)
                found |= self._attacked(name, stop, partial)
                for warning in found[name].warnings:
                    self.reporter.message(f"Warning: {self.checkpoint}: {warning}")
                if not waiting and (waiting := further(found)):
                    self.reporter.message(
                        f"Warning: {self.checkpoint}: gradients were zero, so {COLUMNS[UNMASKED]} is measured too"
                    )
        return found

    def _attacked(self, name: str, stop: Stop, partial: PartialResults | None) -> dict[str, Result]:
        """The result of one attack, by its name, with a line of progress."""
        subject = self.subject
        self.reporter.begin(f"{COLUMNS[name]}, {self.checkpoint}", subject.count(name))
        try:
            return evaluate(
                subject.network,
                subject.images,
                [name],
                epsilon=subject.ball[0],
                threat_model=subject.ball[1],
                batch_size=subject.config.batch_size,
                limit=subject.limit(name),
                seed=subject.config.seed,
                on_batch=lambda name, done, total: self.reporter.advance(done),
                stop=stop,
                world=self.world,
                partial=partial,
            )
        except FloatingPointError as error:
            raise RunFailed(f"{self.checkpoint}: {error}") from None
        finally:
            self.reporter.end()


def _suggest_normalisation(reporter: Reporter, natural: Mapping[str, Any], loaded: LoadedModel) -> None:
    """Hint at --normalize for a foreign network that does no better than guessing."""
    if is_chance(natural["accuracy"], natural["n"], loaded.num_classes):
        reporter.message(
            f"Warning: {loaded.path}: {natural['accuracy']:.2%} is no better than guessing: if its loader "
            "normalised the images, say so by --normalize, or --normalize-mean and --normalize-std"
        )


def _prepared(out: Path, partial: PartialResults) -> int:
    """Number of other attacks with partial results there; a path that cannot be written is refused early."""
    try:
        reports.check(out)
        partial.hold()
        return partial.others()
    except OSError as error:
        raise ValueError(f"--out: cannot write to {out.parent}: {error.strerror}") from None


def _written(out: Path, entries: Sequence[dict[str, Any]]) -> list[str]:
    try:
        return reports.add(out, entries)
    except OSError as error:
        raise RunFailed(
            f"{out}: cannot be written: {error.strerror}; what was measured is kept: the same command goes on"
        ) from None


def _without_none(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without the keys whose value is None."""
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value is not None
    }
