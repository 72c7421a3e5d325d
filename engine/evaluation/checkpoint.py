"""`engine eval`: a checkpoint of any origin, attacked on the test images of a data set."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from engine import config
from engine.attacks import autoattack
from engine.attacks.pgd import presets
from engine.common.console import Reporter
from engine.common.files import code
from engine.common.stopping import RunFailed, graceful_stop
from engine.evaluation import reports as results
from engine.evaluation.measure import COLUMNS, UNMASKED, Result, check_names, evaluate, further, is_chance
from engine.evaluation.partial_results import Ledger
from engine.models.weights import LoadedModel, load_model, weights_sha256
from engine.pipelines import datasets
from engine.pipelines.splits import Request, limited
from engine.system import environment, precision
from engine.system.distributed import World, is_launched

Results = dict[str, dict[str, Any]]
"""By attack, as in `Result.as_dict`."""

_AS_IN_TRAINING = ("dataset", "data", "image_size", "on_bad_image", "attack")


@dataclass(frozen=True)
class Report:
    """What was measured, by attack. path: of the file that has it too, with all that is needed to repeat it."""

    title: str
    results: Results
    path: Path | None


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
    weights: str | None = None,
    normalize: str | tuple[Sequence[float], Sequence[float]] | None = None,
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

    out: the report to which the results are added. Beside it lies what is measured so far; a call that asks for
    the same attack as one that was stopped goes on there.
    world: processes that share the work; all call this with the same arguments.
    weights, normalize: of the file, as in `load_model`.
    limit, limit_aa: test images, balanced over classes; AutoAttack costs a hundred times the others.
    Where an attack's gradients are masked, one whose loss cannot be masked by the size of logits is added.
    Raises ValueError for whatever cannot be evaluated, and RunFailed for logits that are not finite and for a full
    disk, in one line.
    """
    names = check_names(attacks)
    loaded = load_model(checkpoint, model=model, weights=weights, normalize=normalize)
    try:
        trained = config.explicit(loaded.config) if loaded.config else {}
    except ValueError as error:
        raise ValueError(f"{checkpoint}: the key 'config': {error}") from None
    if dataset not in (None, loaded.dataset):
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
    world = world or World()
    at = precision.choose(wanted, world.local_rank)
    request = Request(
        limit_test=limit,
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
    at = dataclasses.replace(at, dtype=next(network.parameters()).dtype)
    record = environment.session(at) | {
        "checkpoint": {"path": str(checkpoint), "sha256": loaded.sha256},
        "model": loaded.name,
        "weights": loaded.taken,
        "normalize": loaded.normalize,
        "data": {"name": wanted.dataset, "source": images.source, "sha256": images.sha256},
        "skipped_images": len(images.test.skipped),
        "processes": world.size,
    }
    decides = {
        "checkpoint": loaded.sha256,
        "weights": weights_sha256(network),
        "model": loaded.name,
        "data": images.sha256,
        "image_size": wanted.image_size,
        "seed": seed,
        "dtype": str(at.dtype).removeprefix("torch."),
        "engine": record["engine"],
        "torch": record["versions"]["torch"],
    }
    ball = wanted.attack.epsilon, wanted.attack.threat_model
    evaluation = _Evaluation(
        checkpoint, network, images.test, decides, ball, batch_size, {"aa": limit_aa}, reporter, world
    )
    measured = evaluation.measure(names, record, out)
    if loaded.config is None and loaded.normalize is None and (natural := measured.get("natural")):
        _suggest_normalisation(reporter, natural, loaded)
    method = f"{loaded.config['method']} " if loaded.config and "method" in loaded.config else ""
    return Report(f"{method}{loaded.name}", measured, out)


@dataclass(frozen=True)
class _Evaluation:
    """A network and images, and how it is attacked on them. decides: what decides its numbers under any attack.

    ball: epsilon and threat model. limits: images at most, by attack.
    """

    checkpoint: Path
    network: nn.Module
    images: datasets.AnySplit
    decides: Mapping[str, Any]
    ball: tuple[float, str]
    batch_size: int
    limits: Mapping[str, int | None]
    reporter: Reporter
    world: World

    def measure(self, names: Sequence[str], record: Mapping[str, Any], out: Path | None) -> Results:
        """What each attack finds, and what further ones find that are needed then; added to the report."""
        parameters = {name: self._parameters(name) for name in dict.fromkeys((*names, UNMASKED))}
        if out is None:
            return {name: result.as_dict() for name, result in self._measured(names, None).items()}
        kept = Ledger(results.notes_of(out), self._identities(parameters, record), self.world.rank)
        done = False
        try:
            if others := self.world.broadcast_from_main(lambda: _prepared(out, kept)):
                self.reporter.message(
                    f"Note: {results.notes_of(out)} has notes of {others} attacks with other settings as well"
                )
            found = {name: result.as_dict() for name, result in self._measured(names, kept).items()}
            entries = [{**record, **result, "parameters": parameters[name]} for name, result in found.items()]
            for line in self.world.broadcast_from_main(lambda: _written(out, entries)):
                self.reporter.message(line)
            done = True
        finally:
            kept.release(done=done)
        return found

    def _measured(self, names: Sequence[str], ledger: Ledger | None) -> dict[str, Result]:
        found: dict[str, Result] = {}
        stopping = graceful_stop(self.reporter.message, launched=is_launched())
        with stopping as stop, self.world.watching(stop), precision.deterministic():
            waiting = list(names)
            while waiting:
                name = waiting.pop(0)
                self.reporter.begin(f"{COLUMNS[name]}, {self.checkpoint}", self._count(name))
                try:
                    found |= evaluate(
                        self.network,
                        self.images,
                        [name],
                        epsilon=self.ball[0],
                        threat_model=self.ball[1],
                        batch_size=self.batch_size,
                        limit=self.limits.get(name),
                        seed=self.decides["seed"],
                        on_batch=lambda name, done, total: self.reporter.advance(done),
                        stop=stop,
                        world=self.world,
                        ledger=ledger,
                    )
                except FloatingPointError as error:
                    raise RunFailed(f"{self.checkpoint}: {error}") from None
                finally:
                    self.reporter.end()
                for warning in found[name].warnings:
                    self.reporter.message(f"Warning: {self.checkpoint}: {warning}")
                if not waiting and (waiting := further(found)):
                    self.reporter.message(
                        f"Warning: {self.checkpoint}: gradients were zero, so {COLUMNS[UNMASKED]} is measured too"
                    )
        return found

    def _count(self, name: str) -> int:
        """Images that an attack gets. Raises ValueError where the limit is below the number of classes."""
        return len(limited(self.images.labels, self.limits.get(name), 0, "--limit-aa"))

    def _parameters(self, name: str) -> dict[str, Any]:
        """All that decides what an attack finds; results of the same parameters are the same."""
        epsilon, threat_model = self.ball
        own: dict[str, Any] = {}
        if name == "aa":
            package, _ = autoattack.installed()
            own = {"threat_model": threat_model, "epsilon": epsilon, "version": "standard"}
            own |= {"batch_size": self.batch_size, package: autoattack.version()}
        elif name != "natural":
            own = presets(epsilon, threat_model)[name].model_dump(mode="json")
        return {"attack": name, "n": self._count(name)} | own | dict(self.decides)

    def _identities(self, parameters: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
        """Of each attack, a hash of all that decides its notes, which are of batches, by this code and device."""
        also = {"batch_size": self.batch_size, "device": next(self.network.parameters()).device.type}
        also |= {"code": code(), "versions": record["versions"], "kernels": record["kernels"]}
        return {
            name: hashlib.sha256(json.dumps([of_attack, also], sort_keys=True).encode()).hexdigest()
            for name, of_attack in parameters.items()
        }


def _suggest_normalisation(reporter: Reporter, natural: Mapping[str, Any], loaded: LoadedModel) -> None:
    """Where a foreign network that does not normalise does no better than guessing, its loader may have."""
    if is_chance(natural["accuracy"], natural["n"], loaded.num_classes):
        reporter.message(
            f"Warning: {loaded.path}: {natural['accuracy']:.2%} is no better than guessing: if its loader "
            "normalised the images, say so by --normalize, or --normalize-mean and --normalize-std"
        )


def _prepared(out: Path, kept: Ledger) -> int:
    """What cannot be written is told before hours of attacks. How many other attacks have notes there."""
    try:
        results.check(out)
        kept.hold()
        return kept.others()
    except OSError as error:
        raise ValueError(f"--out: cannot write to {out.parent}: {error.strerror}") from None


def _written(out: Path, entries: Sequence[dict[str, Any]]) -> list[str]:
    try:
        return results.add(out, entries)
    except OSError as error:
        raise RunFailed(
            f"{out}: cannot be written: {error.strerror}; what was measured is kept: the same command goes on"
        ) from None


def _said(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without the keys whose value is None."""
    return {
        key: _said(value) if isinstance(value, dict) else value for key, value in tree.items() if value is not None
    }
