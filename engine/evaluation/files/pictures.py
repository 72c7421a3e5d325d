"""Pictures of an evaluation, in a folder beside its report: attacked images, accuracies by class, confusions.

Shape suffixes: N images of the data, K chosen ones.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.attacks.autoattack import NO_ATTACK
from engine.attacks.evaluated import undisturbed
from engine.attacks.kinds import Task
from engine.attacks.pgd import NORMS
from engine.common import pictures
from engine.common.files import write_atomically
from engine.common.stopping import RunFailed
from engine.evaluation.arguments import LabelledImages, check_place
from engine.evaluation.batches import batch_of
from engine.evaluation.files.class_plots import class_bars, confusion, count_confusions
from engine.evaluation.files.image_grid import AttackedImage, Guess, fallen, grid
from engine.evaluation.results import Result
from engine.pipelines.splits import limited

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = 100
_FOLDER = ".pictures"


@dataclass(frozen=True)
class Shown:
    """Subject of the pictures.

    network, data: as the titles have them. titles: of the attacks, by name. batch_size: images per forward.
    """

    network: str
    data: str
    titles: Mapping[str, str]
    task: Task
    images: LabelledImages
    batch_size: int

    def name_of(self, label: int) -> str:
        """Name of a class, its number where it has none."""
        names = self.task.class_names or ()
        return names[label] if label < len(names) else str(label)

    @property
    def ball(self) -> str:
        """Norm and radius in words."""
        epsilon, threat_model = self.task.ball
        norm = NORMS[threat_model]
        return f"{norm.name}, epsilon {norm.length(epsilon)}"

    def title(self, result: Result) -> str:
        """Network, data, attack, ball and number of images, for the head of a picture."""
        ball = "" if result.attack == NO_ATTACK else f"{self.ball}, "
        attack = pictures.shortened(self.titles[result.attack], 60)
        return f"{self.network}, {self.data}: {attack}\n{ball}n = {result.n:,}"


def check(count: int) -> None:
    """Raise ValueError where so many images cannot be shown."""
    if not 0 <= count <= _MOST:
        raise ValueError(f"--pictures: 0 to {_MOST} images can be shown, got {count}")


def folder_of(report: Path) -> Path:
    """Folder of a report's pictures."""
    return report.with_name(report.name.removesuffix(".json") + _FOLDER)


def choose(natural: Result, labels_N: Tensor, count: int, of: Iterable[Tensor]) -> Tensor:
    """Indices in the data of at most so many images, ascending, of every class as equally many as there are.

    natural: the result of no attack; they are correctly classified. of: sets of samples, of which all have them.
    """
    candidates = natural.samples[natural.verdicts]
    for sample_N in of:
        candidates = candidates[torch.isin(candidates, sample_N)]
    return candidates[limited(labels_N[candidates], count, 0, "--pictures")]


def write(
    folder: Path,
    shown: Shown,
    results: Mapping[str, Result],
    parameters: Mapping[str, Mapping[str, Any]],
    sample_K: Tensor,
) -> list[Path]:
    """Write the pictures of some results; each replaces one of the same parameters. Their paths.

    sample_K: the chosen images, of which every result has the attacked ones. Raises RunFailed for a full disk.
    """
    made = {f"classes-{_key([parameters[attack] for attack in results])}.png": partial(_bars, shown, results)}
    for attack, result in results.items():
        name, key = re.sub(r"[^\w.-]+", "_", attack)[:60], _key(parameters[attack])
        made[f"{name}-confusion-{key}.png"] = partial(_confusion, shown, result)
        if len(sample_K) and attack != NO_ATTACK:
            made[f"{name}-images-{key}.png"] = partial(_grid, shown, result, sample_K)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with pictures.style():
            for name, draw in made.items():
                write_atomically(folder / name, pictures.png(draw()))
    except OSError as error:
        raise RunFailed(f"{folder}: cannot be written: {error.strerror}; the report is complete") from None
    return [folder / name for name in made]


def _key(parameters: object) -> str:
    """Hash of all that decides the numbers of a picture."""
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:8]


def attacked_images(shown: Shown, result: Result, sample_K: Tensor) -> list[AttackedImage]:
    """The chosen images under an attack, with the network's classes."""
    assert result.attacked is not None
    device, dtype = check_place(shown.task.model, None)
    x_nat, labels_K = batch_of(shown.images.images, shown.images.labels, sample_K, device, dtype)
    place_K = torch.searchsorted(result.samples, sample_K)
    predicted_K, stood_K = result.predicted[place_K], result.verdicts[place_K].tolist()
    before_K = _probabilities(shown, x_nat, labels_K.cpu())
    after_K = _probabilities(shown, result.attacked.to(device), predicted_K)
    finds = bool(result.details)  # AutoAttack and its parts show nothing of what they tried in vain
    found = []
    for row, (label, predicted) in enumerate(zip(labels_K.tolist(), predicted_K.tolist(), strict=True)):
        name = shown.name_of(predicted) if predicted >= 0 else "not known"
        found.append(
            AttackedImage(
                x_nat[row].cpu(),
                result.attacked[row],
                shown.name_of(label),
                Guess(shown.name_of(label), before_K[row]),
                None if finds and stood_K[row] else Guess(name, after_K[row]),
                fell=not stood_K[row],
            )
        )
    return found


def _probabilities(shown: Shown, images: Tensor, label_K: Tensor) -> list[float]:
    """Probability of a class for each image; NaN where the class is -1."""
    with undisturbed(shown.task.model, images.device):
        some = [shown.task.model(part).double().softmax(dim=1).cpu() for part in images.split(shown.batch_size)]
    of_class_K = torch.cat(some).gather(1, label_K.clamp(min=0)[:, None])[:, 0]
    found: list[float] = of_class_K.where(label_K >= 0, torch.nan).tolist()
    return found


def _grid(shown: Shown, result: Result, sample_K: Tensor) -> Figure:
    images = attacked_images(shown, result, sample_K)
    return grid(f"{shown.title(result)}, accuracy {result.accuracy:.1%}\n{fallen(images)}", images)


def _confusion(shown: Shown, result: Result) -> Figure:
    labels_N, classes = shown.images.labels[result.samples], range(shown.task.num_classes)
    title = shown.title(result)
    if unknown := int((result.predicted < 0).sum()):
        title += f"; {unknown:,} left out, whose predicted class is not known"
    counts_CC = count_confusions(labels_N, result.predicted, len(classes))
    return confusion(title, counts_CC, [shown.name_of(label) for label in classes])


def _bars(shown: Shown, results: Mapping[str, Result]) -> Figure:
    n = " and ".join(f"{count:,}" for count in sorted({result.n for result in results.values()}))
    title = f"{shown.network}, {shown.data}: accuracy by class\n{shown.ball}, n = {n}"
    return class_bars(title, {shown.titles[attack]: result.per_class for attack, result in results.items()})
