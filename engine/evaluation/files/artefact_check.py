"""Robustness of an exported file beside that of its original, on the same images.

Shape suffixes: N all samples, B batch, R rows, C classes, T target classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.attacks import table
from engine.attacks.auto.search import Ball
from engine.attacks.auto.standard import AttackBatch, AutoAttack
from engine.attacks.evaluated import undisturbed
from engine.attacks.fast import FEW_SQUARES, NUMBERS
from engine.attacks.kinds import Task, craft
from engine.attacks.parts import size_of_batch
from engine.attacks.pgd import NORMS
from engine.evaluation.batches import batch_of
from engine.evaluation.evaluate_checkpoint import TRANSFERRED
from engine.evaluation.statistics.intervals import wilson
from engine.pipelines.datasets import AnySplit

_FEW = 50
"""Images of attacks that cost a hundred passes of each."""
_SQUARE = f"Square, {NUMBERS.queries} queries"


class Compared(NamedTuple):
    """Images that each of two networks classifies correctly, of the same n. numbers: of the attack, in words."""

    title: str
    n: int
    original: int
    exported: int
    tolerance: float
    numbers: str

    @property
    def passed(self) -> bool:
        """True if the accuracies differ by no more than the tolerance, or by one image."""
        return abs(self.exported - self.original) <= max(1.0, self.tolerance * self.n + 1e-9)

    def interval(self) -> tuple[float, float]:
        """95 % interval of the exported file's accuracy."""
        return wilson(self.exported, self.n)


class _ImageSet(NamedTuple):
    """Batches of images and their labels, on the CPU, the same for every network. numbers: of what made them."""

    title: str
    numbers: str
    batches: list[tuple[Tensor, Tensor]]

    @property
    def n(self) -> int:
        """Number of images."""
        return sum(len(labels_B) for _, labels_B in self.batches)


@dataclass(frozen=True)
class ArtefactCheck:
    """Comparisons of exported files with one original, on the same images, in evaluation mode and full precision.

    images, sample_N: test images, and the indices of those that are taken. ball: epsilon, threat model.
    on_batch: called with (what, done, total). The original is attacked once, for all files.
    """

    original: nn.Module
    num_classes: int
    ball: tuple[float, str]
    images: AnySplit
    sample_N: Tensor
    seed: int = 0
    on_batch: Callable[[str, int, int], object] = lambda what, done, total: None

    def compare(self, exported: nn.Module, tolerance: float) -> list[Compared]:
        """Accuracies on natural images, on those that `TRANSFERRED` craft on the original, and under Square.

        Square attacks each of both networks by its logits alone, on at most 50 of the images.
        Raises ValueError where an attack is not defined, FloatingPointError where logits are not finite.
        """
        with undisturbed(self.original, self._device):
            originals, by_square_on_original = self._of_original
            found, by_square = self._counts(exported), self._square(exported, "the exported file")
        rows = [
            Compared(made.title, made.n, before, after, tolerance, made.numbers)
            for made, before, after in zip(self._sets, originals, found, strict=True)
        ]
        numbers = self._numbers_of_square()
        return [*rows, Compared(_SQUARE, len(self._few_N), by_square_on_original, by_square, tolerance, numbers)]

    def _numbers_of_square(self) -> str:
        norm = NORMS[self.ball[1]]
        return f"{norm.name}, epsilon {norm.length(self.ball[0])}, margin, {NUMBERS.queries} queries, no gradient"

    @property
    def _device(self) -> torch.device:
        return next(self.original.parameters()).device

    @cached_property
    def _few_N(self) -> Tensor:
        return _spread(self.sample_N, _FEW)

    @cached_property
    def _of_original(self) -> tuple[list[int], int]:
        """Images that the original classifies correctly: of each set, and after Square."""
        return self._counts(self.original), self._square(self.original, "the original")

    @cached_property
    def _sets(self) -> list[_ImageSet]:
        """The images as they are, and what each attack makes of them on the original."""
        natural = [(x_nat.cpu(), labels_B.cpu()) for x_nat, labels_B, _ in self._natural(self.sample_N)]
        crafted = zip(TRANSFERRED, (self.sample_N, self._few_N), strict=True)  # APGD takes 100 steps
        return [_ImageSet("natural", "no attack", natural), *(self._crafted(*each) for each in crafted)]

    def _natural(self, sample_N: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of images on the device, with labels and samples."""
        for sample_B in sample_N.split(size_of_batch(None, self._device, *self.images.shape)):
            of_batch = batch_of(self.images.images, self.images.labels, sample_B, self._device, torch.float32)
            yield *of_batch, sample_B.to(self._device)

    def _crafted(self, name: str, sample_N: Tensor) -> _ImageSet:
        """Images that an attack crafts on the original."""
        attack = table.find(name)
        table.check_defined(attack, self.num_classes, self.ball[1])
        task = Task(self.original, self.num_classes, self.ball, self.seed)
        batches, done = [], 0
        for x_nat, labels_B, sample_B in self._natural(sample_N):
            batches.append((craft(attack, task, x_nat, labels_B, sample_B).cpu(), labels_B.cpu()))
            done += len(sample_B)
            self.on_batch(f"{attack.title} on the original", done, len(sample_N))
        title = f"{attack.title} crafted on the original"
        return _ImageSet(title, attack.numbers(self.num_classes, self.ball), batches)

    def _counts(self, network: nn.Module) -> list[int]:
        """Images of each set that a network classifies correctly."""
        return [sum(self._correct(network, *batch) for batch in made.batches) for made in self._sets]

    def _correct(self, network: nn.Module, x: Tensor, labels_B: Tensor) -> int:
        logits_BC = network(x.to(self._device)).cpu()
        if not logits_BC.isfinite().all():
            raise FloatingPointError("logits are NaN or infinite; no result")
        return int((logits_BC.argmax(dim=1) == labels_B).sum())

    def _square(self, network: nn.Module, title: str) -> int:
        """Images that the network still classifies correctly after Square."""
        place, few_N = self._device, self._few_N
        ball = Ball(self.ball[1], self.ball[0])
        attack = AutoAttack(network, self.num_classes, ball, seed=self.seed, heartbeat=lambda: None)
        x_nat, labels_N = batch_of(self.images.images, self.images.labels, few_N, place, torch.float32)
        size = size_of_batch(None, place, *self.images.shape)
        looks = [attack.look(*pair) for pair in zip(x_nat.split(size), labels_N.split(size), strict=True)]
        correct_N = torch.cat([look.correct_B for look in looks])
        targets_NT = torch.cat([look.targets_BT for look in looks])

        def batch(rows: Sequence[int]) -> AttackBatch:
            rows_R = torch.tensor(rows, device=place)
            return AttackBatch(x_nat[rows_R], labels_N[rows_R], few_N.to(place)[rows_R], targets_NT[rows_R])

        left = correct_N.nonzero().flatten().tolist()
        stood = 0
        for done, outcome in enumerate(attack.run(FEW_SQUARES, left, batch, size), start=1):
            stood += outcome.x_adv is None
            self.on_batch(f"Square on {title}", done, len(left))
        return stood


def _spread(sample_N: Tensor, most: int) -> Tensor:
    """At most so many of the samples, evenly chosen."""
    if len(sample_N) <= most:
        return sample_N
    return sample_N[torch.arange(most) * len(sample_N) // most]
