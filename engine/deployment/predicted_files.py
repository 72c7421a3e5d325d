"""`engine predict`: a checkpoint's answers to image files, and which of them hold under an attack."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from engine.attacks import table
from engine.attacks.evaluated import undisturbed
from engine.common.console import Reporter
from engine.common.files import create
from engine.common.lookup import look_up
from engine.common.stopping import RunFailed
from engine.config import RunConfig, load
from engine.deployment import opening
from engine.deployment.challenges import Challenge, challenge
from engine.deployment.image_files import image_files
from engine.deployment.predicting import Predictor, Viewed
from engine.deployment.views import View, training_of, view_for
from engine.models.weights import LoadedModel, Ranked
from engine.pipelines.reading.published import known_classes
from engine.pipelines.splits import SKIPS
from engine.system import environment, precision

_FORMAT = 1


@dataclass(frozen=True)
class PredictionConfig:
    """Choices of predictions; what is None is as in the checkpoint's training.

    top: classes of each image. attack: of `engine.attacks.table`, from the network's own answers; epsilon in
    [0, 1], or a fraction such as "8/255". save_adversarial: folder for images whose answer the attack changed.
    model, weights, normalize: as in `load_model`. image_size, dataset: as in `view_for`.
    on_bad_image: "fail" at a file that is no image, or "skip" it.
    """

    top: int = 1
    attack: str | None = None
    epsilon: str | None = None
    threat_model: str | None = None
    seed: int = 0
    save_adversarial: Path | None = None
    model: str | None = None
    weights: str | None = None
    normalize: str | tuple[Sequence[float], Sequence[float]] | None = None
    dataset: str | None = None
    image_size: int | None = None
    batch_size: int | None = None
    device: str = "auto"
    on_bad_image: str = "fail"

    def completed(self, loaded: LoadedModel) -> RunConfig:
        """Device and ball, from the training's configuration where not chosen. Raises ValueError."""
        ball = {"epsilon": self.epsilon, "threat_model": self.threat_model}
        chosen = {"attack": {key: value for key, value in ball.items() if value is not None}}
        trained = {key: value for key, value in training_of(loaded).items() if key == "attack"}
        return load(trained, chosen, {"device": self.device})


class SavedImage(NamedTuple):
    """An attacked image, rounded to 8 bits, in a file. label: the network's answer to it then."""

    file: str
    label: int
    still: bool


class AttackedAnswer(NamedTuple):
    """The answer after the attack. holds: it is the one before. masked: this says little; None: not known."""

    label: int
    name: str
    holds: bool
    masked: bool | None
    saved: SavedImage | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        saved = None if self.saved is None else self.saved._asdict()
        own: dict[str, Any] = {"class": self.name, "label": self.label, "holds": self.holds, "masked": self.masked}
        return own if saved is None else own | {"saved": saved}


@dataclass(frozen=True)
class FileAnswer:
    """The answer to one file, or error. size: width, height; resized: see `View.resizes`. top: likeliest first."""

    file: str
    size: tuple[int, int] | None = None
    resized: bool = False
    top: tuple[Ranked, ...] = ()
    attacked: AttackedAnswer | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        if self.error is not None:
            return {"file": self.file, "error": self.error}
        classes = [{"class": each.name, "label": each.label, "probability": each.probability} for each in self.top]
        own: dict[str, Any] = {"file": self.file, "size": self.size, "resized": self.resized, **classes[0]}
        own |= {"top": classes}
        return own if self.attacked is None else own | {"attacked": self.attacked.as_dict()}


@dataclass(frozen=True)
class PredictedFiles:
    """Answers to files, in their order. header: for JSON, all that decides them. warnings: on the attack."""

    header: Mapping[str, Any]
    rows: tuple[FileAnswer, ...]
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.header, "images": [row.as_dict() for row in self.rows]}


def run(checkpoint: Path, places: Sequence[str], config: PredictionConfig, reporter: Reporter) -> PredictedFiles:
    """Classify the images at those places: files, and folders for all images below them.

    Raises ValueError, one line, for what the user can mend: among it a file that is no image, where these are not
    skipped, and files of which none is one. Raises RunFailed for logits that are not finite.
    """
    skips = look_up("--on-bad-image", config.on_bad_image, SKIPS)
    if config.top < 1:
        raise ValueError(f"--top: a whole number from 1 on is needed, got {config.top}")
    if config.attack is None and config.save_adversarial is not None:
        raise ValueError("--save-adversarial: there is no attack; give --attack, e.g. pgd20")
    loaded, wanted = _opened(checkpoint, config)
    files = image_files(places)
    view, notes = view_for(loaded, config.image_size, config.dataset)
    predictor = Predictor(loaded, view, config.batch_size)
    at = replace(precision.choose(wanted), dtype=predictor.dtype)
    loaded.module.to(at.device)
    reporter.notes([*loaded.notes, *files.notes, *notes])
    with undisturbed(loaded.module, at.device), precision.deterministic():
        ball = (wanted.attack.epsilon, wanted.attack.threat_model)
        attacking = None if config.attack is None else challenge(loaded, config.attack, ball, at, seed=config.seed)
        if config.save_adversarial is not None:
            _prepare(config.save_adversarial)
        answers = _Answers(predictor, attacking, config, skips)
        reporter.begin(f"Predicting, {checkpoint}", len(files.paths))
        rows: list[FileAnswer] = []
        try:
            for row in answers.rows(files.paths):
                rows.append(row)
                reporter.advance(len(rows))
        except FloatingPointError as error:
            raise RunFailed(f"{checkpoint}: {error}; no prediction") from None
        finally:
            reporter.end()
    if errors := [row for row in rows if row.error is not None]:
        if len(errors) == len(rows):
            raise ValueError(f"IMAGES: none can be read; the first: {errors[0].error}")
        reporter.message(
            f"Skipped: {len(errors):,} unreadable images: {errors[0].error}{', ...' * (len(errors) > 1)}"
        )
    reporter.notes(view.notes(sum(row.resized for row in rows)))
    batch_size = predictor.images_per_forward(*answers.shape)
    header = _header(loaded, view, environment.session(at), batch_size)
    if attacking is None:
        return PredictedFiles(header, tuple(rows))
    told = attacking.describe(batch_size)
    return PredictedFiles({**header, "attack": told}, tuple(rows), tuple(attacking.warnings()))


def _opened(checkpoint: Path, config: PredictionConfig) -> tuple[LoadedModel, RunConfig]:
    """The network, with the names of its classes, and device and ball."""
    loaded = opening.load(checkpoint, model=config.model, weights=config.weights, normalize=config.normalize)
    if config.attack is not None:
        table.check_gradients(table.find(config.attack), str(checkpoint), has_gradients=loaded.has_gradients)
    wanted = config.completed(loaded)
    names = None if config.dataset is None else known_classes(config.dataset)
    if loaded.class_names is None and names is not None:
        loaded = loaded.for_classes(names)
    return loaded, wanted


def _prepare(folder: Path) -> None:
    """Make the folder for attacked images. Raises ValueError where it holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--save-adversarial: {folder} exists and is no empty folder; choose another name")
    folder.mkdir(parents=True, exist_ok=True)


def _header(loaded: LoadedModel, view: View, session: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """Facts of the network, the view and the session, for JSON."""
    return {
        "format": _FORMAT,
        **session,
        "checkpoint": {"path": str(loaded.path), "sha256": loaded.sha256},
        "model": loaded.name,
        "weights": loaded.taken,
        "normalize": loaded.normalize,
        "class_names": loaded.class_names,
        "num_classes": loaded.num_classes,
        "image_size": view.size,
        "view": view.describe(),
        "batch_size": batch_size,
        "attack": None,
    }


class _Answers:
    """Rows of files, batch by batch. shape: height and width of the views, once there is one."""

    def __init__(
        self, predictor: Predictor, attacking: Challenge | None, config: PredictionConfig, skips: bool
    ) -> None:
        self._predictor, self._attacking, self._config, self._skips = predictor, attacking, config, skips
        self.shape = (1, 1)

    def rows(self, paths: Sequence[str]) -> Iterator[FileAnswer]:
        """A row of each file, in order."""
        done = 0
        for batch in self._predictor.batches(paths):
            faults = [viewed.fault for viewed in batch if viewed.image_HWC is None]
            if faults and not self._skips:
                raise ValueError(f"IMAGES: {faults[0]}")
            answers = iter(self._of_images(batch, paths, done) if len(faults) < len(batch) else ())
            for path, viewed in zip(paths[done : done + len(batch)], batch, strict=True):
                if viewed.image_HWC is None:
                    yield FileAnswer(path, error=viewed.fault)
                else:
                    size = (viewed.width, viewed.height)
                    resized = self._predictor.view.resizes(viewed.height, viewed.width)
                    yield replace(next(answers), file=path, size=size, resized=resized)
            done += len(batch)

    def _of_images(self, batch: Sequence[Viewed], paths: Sequence[str], done: int) -> list[FileAnswer]:
        """Answers to those of a batch that are images. done: files before it."""
        numbers = [done + place for place, viewed in enumerate(batch) if viewed.image_HWC is not None]
        x_nat = self._predictor.inputs(batch)
        self.shape = (x_nat.shape[2], x_nat.shape[3])
        found = self._predictor.loaded.predict(x_nat)
        rows = [FileAnswer("", top=top) for top in found.top(self._config.top)]
        if self._attacking is None:
            return rows
        held = self._attacking.run(
            x_nat, found.labels.to(x_nat.device), torch.tensor(numbers, device=x_nat.device)
        )
        masked = [None] * len(rows) if held.masked_B is None else held.masked_B.tolist()
        labels, holds = held.labels_B.tolist(), held.holds_B.tolist()
        answers = [
            AttackedAnswer(label, found.class_names[label], stands, hidden)
            for label, stands, hidden in zip(labels, holds, masked, strict=True)
        ]
        if self._config.save_adversarial is not None:
            answers = self._saved(answers, held.x_adv, found.labels.tolist(), numbers)
        return [replace(row, attacked=answer) for row, answer in zip(rows, answers, strict=True)]

    def _saved(
        self, answers: Sequence[AttackedAnswer], x_adv: Tensor, before: Sequence[int], numbers: Sequence[int]
    ) -> list[AttackedAnswer]:
        """The answers, with the files of the images that changed them; rounded ones are classified once more."""
        folder = self._config.save_adversarial
        assert folder is not None
        rounded_B = (x_adv * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        again = self._predictor.loaded.predict(rounded_B).labels.tolist()
        result = []
        for answer, label, own, number, image_HWC in zip(answers, again, before, numbers, rounded_B, strict=True):
            if answer.holds:
                result.append(answer)
                continue
            file = folder / f"{number:06d}.png"
            content = io.BytesIO()
            Image.fromarray(image_HWC.cpu().numpy()).save(content, "PNG")
            create(file, content.getvalue())
            result.append(answer._replace(saved=SavedImage(str(file), label, label != own)))
        return result
