"""Accuracy under one attack: its numbers and its warnings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.attacks.masking import MOST_MASKED, MOST_ZEROS
from engine.attacks.table import TRANSFER

UNMASKED = "pgd20-dlr"
"""The attack whose loss no factor on the logits changes."""
FEW = 100
"""Below so many images the standard error of an accuracy may exceed 5 percentage points."""


class ClassAccuracy(NamedTuple):
    """Share in [0, 1] of the n images of a class that are classified correctly."""

    accuracy: float
    n: int


class Hits(NamedTuple):
    """The images that attacks broke, N', in the order of their samples, judged by the network once more.

    images: (N', C, H, W). part: number of the attack's part that broke it, from 1 on. rank: of the target class,
    from 2 on. rounded: True if it is a hit still when it is rounded to n/255. fell: of all n images of the
    result, the number of the part that broke it, 0 for no attack, -1 where it stood all.
    """

    images: Tensor
    samples: Tensor
    labels: Tensor
    predicted: Tensor
    part: Tensor
    rank: Tensor
    rounded: Tensor
    fell: Tensor


class PartResult(NamedTuple):
    """One part of AutoAttack: images that came to it and that stood it, passes of one image each, and seconds.

    forward, backward: that the verdicts took, without those of images that filled a batch.
    """

    images: int
    stood: int
    forward: int
    backward: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """Samples classified correctly under one attack; description holds the numbers of the attack.

    seconds: of all processes together. zero_gradients, non_finite_gradients: shares of the entries of all the
    attack's gradients; None: it has none. masked: share of the samples that kept their class although most entries
    of their gradients were zero or NaN: the accuracy may be that much too high; None: not known.
    parts: accuracies after each part of an attack that has several; details: more of each.
    per_class: by the class's name, else its number. flags: of AutoAttack's checks, those of `autoattack.FLAGS`
    that have found something. warnings: what makes the accuracy doubtful. hits: where they were asked for, in the
    main process.
    samples: ascending indices in the data, int64 (n,). verdicts: True if classified correctly, bool (n,).
    predicted: classes that the network gives the attacked images, int64 (n,), -1 where not known; of an image that
    AutoAttack has not broken the label. attacked: of samples that were asked for, (K, C, H, W), else None.
    """

    attack: str
    correct: int
    n: int
    description: str
    seconds: float
    zero_gradients: float | None = None
    non_finite_gradients: float | None = None
    masked: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, PartResult] = field(default_factory=dict)
    per_class: Mapping[str, ClassAccuracy] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    hits: Hits | None = field(default=None, repr=False, compare=False)
    samples: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64), repr=False, compare=False)
    verdicts: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool), repr=False, compare=False)
    predicted: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64), repr=False, compare=False)
    attacked: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def accuracy(self) -> float:
        """Share in [0, 1] of samples classified correctly."""
        return self.correct / self.n

    @property
    def is_masked(self) -> bool:
        """True if a loss that no factor on the logits changes may find many more images."""
        return self.masked is not None and self.masked > MOST_MASKED

    def as_dict(self) -> dict[str, Any]:
        """All numbers, and what is known of each image, for JSON."""
        return self.numbers() | {"images": self._images()}

    def _images(self) -> dict[str, Any]:
        """Index of each sample, a digit 1 where it is classified correctly, and its class, null if not known."""
        return {
            "samples": self.samples.tolist(),
            "correct": "".join("01"[verdict] for verdict in self.verdicts.tolist()),
            "predicted": [None if label < 0 else label for label in self.predicted.tolist()],
        }

    def numbers(self) -> dict[str, Any]:
        """All numbers but those of each sample, for JSON."""
        numbers: dict[str, Any] = {"attack": self.attack, "correct": self.correct, "n": self.n}
        numbers |= {"accuracy": self.accuracy, "description": self.description, "seconds": self.seconds}
        numbers |= {"zero_gradients": self.zero_gradients, "non_finite_gradients": self.non_finite_gradients}
        numbers |= {"masked": self.masked, "parts": dict(self.parts)}
        numbers |= {"flags": list(self.flags), "warnings": list(self.warnings)}
        numbers |= {"per_class": {name: of_class._asdict() for name, of_class in self.per_class.items()}}
        return numbers | {"details": {part: detail._asdict() for part, detail in self.details.items()}}


def per_class(result: Result, labels_N: Tensor, names: Sequence[str] | None) -> dict[str, ClassAccuracy]:
    """Accuracies of the classes that have images. labels_N: of all the data. names: of the classes, if known."""
    of_samples = labels_N[result.samples]
    found = {}
    for label in of_samples.unique().tolist():
        correct = result.verdicts[of_samples == label]
        name = str(label) if names is None else names[label]
        found[name] = ClassAccuracy(int(correct.sum()) / len(correct), len(correct))
    return found


def further(results: Mapping[str, Result]) -> list[str]:
    """The attack that is needed beside these: where gradients were masked, one with another loss.

    Gradients of another network, from which images are transferred, say nothing of this one.
    """
    masked = any(result.is_masked for name, result in results.items() if not name.startswith(TRANSFER))
    return [UNMASKED] if masked and UNMASKED not in results else []


def few_images(n: int) -> str:
    """sqrt(p (1 - p) / n) at p = 1/2, the largest standard error, in words; empty from `FEW` images on."""
    if n >= FEW:
        return ""
    points = 50 / math.sqrt(max(n, 1))
    return f"{n} of them: the standard error of an accuracy is up to {points:.0f} percentage points"


def is_chance(accuracy: float, n: int, num_classes: int) -> bool:
    """Accuracy <= 1/C + 2 sqrt(1/C (1 - 1/C) / n): no better than guessing, within two standard errors."""
    chance = 1 / num_classes
    return accuracy <= chance + 2 * math.sqrt(chance * (1 - chance) / n)


def gradient_warnings(result: Result) -> Iterator[str]:
    """Warnings that the gradients give of an accuracy."""
    name = result.attack
    if result.is_masked:
        yield (
            f"{name}: {result.masked:.2%} of the images kept their class although their gradient was zero "
            f"(limit {MOST_MASKED:.0%}): the accuracy may be that much too high"
        )
    elif (result.zero_gradients or 0) > MOST_ZEROS and result.masked is None:
        yield f"{name}: {result.zero_gradients:.2%} of its gradients are zero (limit {MOST_ZEROS:.0%})"
    if result.non_finite_gradients:
        yield f"{name}: {result.non_finite_gradients:.2%} of its gradients are not finite"
