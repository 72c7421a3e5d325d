"""`engine eval`: a checkpoint of any origin, attacked on the test images of a data set."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.attacks import table
from engine.attacks.autoattack import NO_ATTACK, PACKAGE, ROUNDED, WHOLE
from engine.attacks.kinds import EvaluationAttack, Task
from engine.attacks.parts import size_of_batch
from engine.common.console import Reporter
from engine.common.files import code_hash
from engine.common.stopping import RunFailed, Stop, graceful_stop
from engine.config import RunConfig, explicit, load
from engine.deployment import opening
from engine.evaluation import reports, robustbench
from engine.evaluation.files import adversarial, pictures
from engine.evaluation.measure import Attacks, evaluate
from engine.evaluation.partial_results import PartialResults
from engine.evaluation.results import UNMASKED, Result, further, is_chance
from engine.models.weights import LoadedModel, weights_sha256
from engine.pipelines import datasets
from engine.pipelines.reading.folder import is_named_as_test
from engine.pipelines.reading.held_out import TEST_SPLIT
from engine.pipelines.splits import Request, limited
from engine.system import environment, precision
from engine.system.distributed import World, is_launched

Results = dict[str, dict[str, Any]]
"""By attack, as in `Result.as_dict`."""

USUAL = ("natural", "fgsm", "pgd20", "cw")
"""Attacks on a checkpoint where none are asked for."""
USUAL_OF_EXPORTED = ("natural", "square")
TRANSFERRED = ("pgd20", "apgd-ce")
_SLOW = (WHOLE, WHOLE + ROUNDED, WHOLE + PACKAGE)  # have a limit of their own
_TO_OPEN = (
    *("limit", "limit_aa", "dataset", "model", "weights", "normalize", "epsilon", "threat_model"),
    *("batch_size", "seed", "image_size", "on_bad_image"),
)
_AS_IN_TRAINING = ("dataset", "data", "image_size", "on_bad_image", "attack")


@dataclass(frozen=True)
class EvaluationConfig:
    """Choices of one evaluation; what is None is as in the checkpoint's training.

    attacks: as of `evaluate`.
    limit, limit_aa: test images, balanced over classes; AutoAttack costs a hundred times the others.
    for_robustbench: refuse, before anything is measured, what is no benchmark of RobustBench's leaderboards.
    save_adversarial: file for the images that AutoAttack or its parts have broken.
    pictures: images at most of each attack in the pictures beside the report; 0: no pictures.
    weights, normalize: of the file, as in `load_model`. epsilon: in [0, 1], or a fraction such as "8/255".
    """

    attacks: Attacks
    limit: int | None = None
    limit_aa: int | None = None
    dataset: str | None = None
    data: str | None = None
    model: str | None = None
    weights: str | None = None
    normalize: str | tuple[Sequence[float], Sequence[float]] | None = None
    epsilon: str | None = None
    threat_model: str | None = None
    batch_size: int | None = None
    seed: int = 0
    device: str = "auto"
    image_size: int | None = None
    on_bad_image: str | None = None
    for_robustbench: bool = False
    save_adversarial: str | None = None
    pictures: int = 0

    def as_dict(self, wanted: RunConfig) -> dict[str, Any]:
        """All that is needed to open the same network and images again, for JSON. wanted: of `completed`."""
        told: dict[str, Any] = {name: getattr(self, name) for name in _TO_OPEN}
        found = None if wanted.data is None else str(Path(wanted.data).absolute())
        return told | {"data": found, "attacks": [attack.name for attack in table.resolve(self.attacks)]}

    def limit_of(self, name: str) -> int | None:
        """Images at most, of those that are read, under the attack of that name."""
        return self.limit_aa if name in _SLOW else None

    def images_read(self, attacks: Sequence[EvaluationAttack]) -> int | None:
        """Test images that are needed at most; None: all of them."""
        if self.limit is None and all(attack.name in _SLOW for attack in attacks):
            return self.limit_aa
        return self.limit

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
    """Results by attack. path: of the file that has them too, with all that is needed to repeat them.

    sha256: of the checkpoint. benchmark: the leaderboard, where it was asked for one.
    """

    title: str
    results: Results
    path: Path | None
    sha256: str = ""
    benchmark: robustbench.Benchmark | None = None


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
    attacks = table.resolve(config.attacks)
    world = world or World()
    world.broadcast_from_main(lambda: _check_files(config, attacks, out))
    loaded, wanted, images, at = opened(checkpoint, config, attacks, world.local_rank)
    benchmark = _benchmark(images, wanted) if config.for_robustbench else None
    for attack in attacks:
        table.check_defined(attack, loaded.num_classes, wanted.attack.threat_model)
    reporter.notes([*images.notes, *loaded.notes])
    if images.held_out and (warning := images.held_out.difference(checkpoint.parent / TEST_SPLIT)):
        reporter.message(f"Warning: {warning}")
    reporter.skipped("test", images.test.skipped)
    network = loaded.module
    record = _record(loaded, images, wanted, at) | {"processes": world.size, "options": config.as_dict(wanted)}
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
    ball = (wanted.attack.epsilon, wanted.attack.threat_model)
    task = Task(network, loaded.num_classes, ball, config.seed, images.class_names)
    reporter.notes([note for attack in attacks for note in attack.notes(task)])
    method = f"{loaded.config['method']} " if loaded.config and "method" in loaded.config else ""
    title = f"{method}{loaded.name}"
    subject = _Subject(task, at, images.test, config, identity, title)
    measured = _Evaluation(checkpoint, subject, reporter, world).measure(attacks, record, out)
    if loaded.config is None and loaded.normalize is None and (natural := measured.get("natural")):
        _suggest_normalisation(reporter, natural, loaded)
    return Report(title, measured, out, loaded.sha256, benchmark)


class Opened(NamedTuple):
    """Subject of an evaluation: the network, on its device; its configuration, the test images and the device."""

    loaded: LoadedModel
    wanted: RunConfig
    images: datasets.AnyDataset
    at: precision.Precision


def opened(
    checkpoint: Path, config: EvaluationConfig, attacks: Sequence[EvaluationAttack], local_rank: int = 0
) -> Opened:
    """Read the checkpoint and the images that the attacks need. Raises ValueError, in one line."""
    loaded = opening.load(checkpoint, model=config.model, weights=config.weights, normalize=config.normalize)
    for attack in attacks:
        table.check_gradients(attack, str(checkpoint), has_gradients=loaded.has_gradients)
    wanted = config.completed(loaded)
    at = precision.choose(wanted, local_rank)
    images = _read(loaded, wanted, config.images_read(attacks))
    loaded = loaded.for_classes(images.class_names)
    network = loaded.module.to(at.device)
    dtype = next(network.parameters(), torch.empty(0)).dtype
    return Opened(loaded, wanted, images, replace(at, dtype=dtype))


def _check_files(config: EvaluationConfig, attacks: Sequence[EvaluationAttack], out: Path | None) -> None:
    """Raise ValueError where pictures, or the images that break, cannot be kept as it is asked for."""
    pictures.check(config.pictures)
    if config.pictures and out is None:
        raise ValueError("--pictures: needs a report (`out`), beside which they are")
    if config.save_adversarial is None:
        return
    if out is None:
        raise ValueError("--save-adversarial: needs a report (`out`), which tells of the file")
    adversarial.check(Path(config.save_adversarial), attacks)


def _read(loaded: LoadedModel, wanted: RunConfig, limit: int | None) -> datasets.AnyDataset:
    """The test images, at most so many."""
    request = Request(
        limit_test=limit,
        on_bad_image=wanted.on_bad_image,
        image_size=wanted.image_size,
        resident="if it fits",
        only_test=True,
        whole_if_flat=_tests_on_all(loaded, wanted),
    )
    return datasets.find(wanted.dataset, wanted.data, request)


def _tests_on_all(loaded: LoadedModel, wanted: RunConfig) -> bool:
    """True if a flat folder of classes is of test images only: the network was not trained on a part of it."""
    if loaded.dataset != "folder":
        return True
    trained = (loaded.config or {}).get("data")
    return wanted.data is not None and wanted.data != trained and is_named_as_test(Path(wanted.data))


def _benchmark(images: datasets.AnyDataset, wanted: RunConfig) -> robustbench.Benchmark:
    ball = (wanted.attack.epsilon, wanted.attack.threat_model)
    return robustbench.benchmark_of(images.name, ball, len(images.test))


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
        **_exported(loaded),
    }


def _exported(loaded: LoadedModel) -> dict[str, Any]:
    """Facts of an exported file, for the report; nothing of a checkpoint."""
    if not isinstance(loaded, opening.Artefact):
        return {}
    facts = loaded.facts
    told = None if facts is None else facts.model_dump(include={"quantized", "checkpoint", "made_by"})
    return {"exported": {"format": loaded.exported, "has_gradients": loaded.has_gradients, "facts": told}}


def usual_attacks(path: Path) -> list[str]:
    """The attacks of `engine eval` where none are asked for.

    Of an exported file those that need no gradient of it: natural, Square, and where the checkpoint lies as it was
    recorded, the images that PGD and APGD craft on that.
    """
    if opening.format_of(path) is None:
        return list(USUAL)
    loaded = opening.load(path)
    original = loaded.original() if isinstance(loaded, opening.Artefact) else None
    crafted_by = () if original is None else TRANSFERRED
    return [*USUAL_OF_EXPORTED, *(f"{table.TRANSFER}{original}:{name}" for name in crafted_by)]


@dataclass(frozen=True)
class _Subject:
    """Network and images of an evaluation.

    identity: decides the numbers of every attack. title: of the network.
    """

    task: Task
    at: precision.Precision
    images: datasets.AnySplit
    config: EvaluationConfig
    identity: Mapping[str, Any]
    title: str

    @property
    def batch_size(self) -> int:
        """Images per forward."""
        return size_of_batch(self.config.batch_size, self.at.device, *self.images.shape)

    def limit(self, name: str) -> int | None:
        """Images at most under this attack."""
        return self.config.limit_of(name)

    def count(self, name: str) -> int:
        """Images that an attack gets. Raises ValueError where the limit is below the number of classes."""
        return len(self.samples(name))

    def samples(self, name: str) -> Tensor:
        """Indices of the images that an attack gets, as `count` does."""
        return limited(self.images.labels, self.limit(name), 0, "--limit-aa")

    def shown(self, titles: Mapping[str, str], data: str) -> pictures.Shown:
        """Subject of pictures. titles: of the attacks by name; data: name of the data set."""
        return pictures.Shown(self.title, data, titles, self.task, self.images, self.batch_size)

    def parameters(self, attack: EvaluationAttack) -> dict[str, Any]:
        """Everything that decides an attack's result: equal parameters, equal results."""
        own = attack.parameters(self.task, self.batch_size)
        return {"attack": attack.name, "n": self.count(attack.name)} | own | dict(self.identity)

    def partial_identities(self, parameters: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
        """Hash by attack of its parameters, the batch size, this code and device: the key of its batches.

        What a function computes is not always known: its batches are found by no other evaluation then.
        """
        also = {"batch_size": self.batch_size, "device": self.at.device.type}
        also |= {"code": code_hash(), "versions": record["versions"], "kernels": record["kernels"]}
        also |= {"with_images": self.config.save_adversarial is not None}
        found = {}
        for name, of_attack in parameters.items():
            decisive = [of_attack, also]
            if of_attack.get("code", "") is None:
                decisive.append(secrets.token_hex(32))
            found[name] = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        return found


@dataclass(frozen=True)
class _Evaluation:
    """Evaluation of a checkpoint's network by some processes."""

    checkpoint: Path
    subject: _Subject
    reporter: Reporter
    world: World

    def measure(self, attacks: Sequence[EvaluationAttack], record: Mapping[str, Any], out: Path | None) -> Results:
        """Results of the attacks, and of further ones that prove necessary; added to the report."""
        subject, world = self.subject, self.world
        if out is None:
            return {name: result.as_dict() for name, result in self._measured(attacks, None)[0].items()}
        every = {attack.name: attack for attack in (table.find(UNMASKED), *attacks)}
        parameters = {name: subject.parameters(attack) for name, attack in every.items()}
        folder = reports.notes_of(out)
        identities = world.broadcast_from_main(lambda: subject.partial_identities(parameters, record))
        partial = PartialResults(folder, identities, world.rank)
        done = False
        try:
            if others := self.world.broadcast_from_main(lambda: _prepared(out, partial)):
                self.reporter.message(f"Note: {folder} has notes of {others} attacks with other settings as well")
            results, chosen = self._measured(attacks, partial)
            found = {name: result.as_dict() for name, result in results.items()}
            entries = [{**record, **result, "parameters": parameters[name]} for name, result in found.items()]
            for line in self.world.broadcast_from_main(lambda: self._written(out, entries, results)):
                self.reporter.message(line)
            done = True
        finally:
            partial.release(done=done)
        if subject.config.pictures:
            titles = {name: every[name].title_of(result.parts) for name, result in results.items()}
            shown = subject.shown(titles, record["data"]["name"])
            self._draw(shown, results, parameters, chosen, pictures.folder_of(out))
        return found

    def _draw(
        self,
        shown: pictures.Shown,
        results: Mapping[str, Result],
        parameters: Mapping[str, Any],
        chosen: Tensor,
        folder: Path,
    ) -> None:
        """Write the pictures of the results."""
        if not len(chosen):
            self.reporter.message(f"Note: {self.checkpoint}: no image is classified correctly, so none is shown")
        written = self.world.broadcast_from_main(
            lambda: pictures.write(folder, shown, results, parameters, chosen)
        )
        self.reporter.message(f"Written: {len(written)} pictures in {folder}")

    def _written(self, out: Path, entries: list[dict[str, Any]], results: Mapping[str, Result]) -> list[str]:
        """Lines about the report, after it and the adversarial images are written: both or neither."""
        if self.subject.config.save_adversarial is None:
            return _written(out, entries)
        path = Path(self.subject.config.save_adversarial)
        parameters = {entry["attack"]: entry["parameters"] for entry in entries}
        told = adversarial.write(path, results, parameters, out.parent)
        for entry in entries:
            if entry["attack"] in told:
                entry["adversarial"] = told[entry["attack"]]
        try:
            return [*_written(out, entries), *adversarial.doubts(results), f"Written: {path}"]
        except BaseException:
            path.unlink()
            raise

    def _measured(
        self, attacks: Sequence[EvaluationAttack], partial: PartialResults | None
    ) -> tuple[dict[str, Result], Tensor]:
        """Results by attack, and the samples of which each has the attacked image."""
        found: dict[str, Result] = {}
        stopping = graceful_stop(self.reporter.message, launched=is_launched())
        with stopping as stop, self.world.collective_errors(stop), precision.deterministic():
            natural, chosen = self._chosen(attacks, stop, partial)
            waiting = list(attacks)
            while waiting:
                attack = waiting.pop(0)
                if attack.name not in natural:
                    found |= self._attacked(attack, stop, partial, chosen)
                else:
                    found |= natural
                for warning in found[attack.name].warnings:
                    self.reporter.message(f"Warning: {self.checkpoint}: {warning}")
                if not waiting and (waiting := [table.find(name) for name in further(found)]):
                    needed = ", ".join(attack.title for attack in waiting)
                    self.reporter.message(
                        f"Warning: {self.checkpoint}: gradients were zero, so {needed} is measured too"
                    )
        return found, chosen

    def _chosen(
        self, attacks: Sequence[EvaluationAttack], stop: Stop, partial: PartialResults | None
    ) -> tuple[dict[str, Result], Tensor]:
        """The natural result, by its name, where it decides which images are shown; and these."""
        subject, count = self.subject, self.subject.config.pictures
        if not count:
            return {}, torch.empty(0, dtype=torch.int64)
        asked = any(attack.name == NO_ATTACK for attack in attacks)
        natural = self._attacked(table.find(NO_ATTACK), stop, partial if asked else None, None)
        samples = [subject.samples(attack.name) for attack in attacks]
        return natural, pictures.choose(natural[NO_ATTACK], subject.images.labels, count, samples)

    def _tell(self, name: str, done: int, total: int, doing: str) -> None:
        self.reporter.doing(doing, is_uneven=doing != "")
        self.reporter.advance(done)

    def _attacked(
        self, attack: EvaluationAttack, stop: Stop, partial: PartialResults | None, chosen: Tensor | None
    ) -> dict[str, Result]:
        """The result of one attack, by its name, with a line of progress."""
        subject = self.subject
        task = subject.task
        title = attack.title_of(attack.parts(task.num_classes))
        self.reporter.begin(f"{title}, {self.checkpoint}", subject.count(attack.name))
        try:
            return evaluate(
                task.model,
                subject.images,
                [attack],
                epsilon=task.ball[0],
                threat_model=task.ball[1],
                batch_size=subject.batch_size,
                limit=subject.limit(attack.name),
                seed=subject.config.seed,
                on_pass=self._tell,
                stop=stop,
                world=self.world,
                partial=partial,
                keeps_images=partial is not None and subject.config.save_adversarial is not None,
                keeps=chosen,
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
