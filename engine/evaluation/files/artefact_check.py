"""Robustness of an exported file beside that of its original, on the same images.

Shape suffixes: N all samples, B batch, R rows, C classes, T target classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from engine.evaluation.statistics.intervals import wilson
from engine.pipelines.datasets import AnySplit

CRAFTED = "pgd20"
_SQUARE = f"Square, {NUMBERS.queries} queries"
MOST_BY_SQUARE = 50
"""Images that Square attacks: each costs up to `NUMBERS.queries` forwards of either network."""


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


class _Batch(NamedTuple):
    """Images as they are and as an attack on the original leaves them, on the CPU, with their labels."""

    x_nat: Tensor
    x_adv: Tensor
    labels_B: Tensor


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
        """Accuracies on natural images, on those that PGD crafts on the original, and under Square.

        Square attacks each of both networks by its logits alone, on at most `MOST_BY_SQUARE` of the images.
        Raises ValueError where an attack is not defined, FloatingPointError where logits are not finite.
        """
        attack = table.find(CRAFTED)
        with undisturbed(self.original, self._device):
            originals, found = self._of_original, self._counts(exported)
            by_square = self._square(exported, "the exported file")
        n, few = len(self.sample_N), len(self._few_N)
        crafted = f"{attack.title} crafted on the original"
        return [
            Compared("natural", n, originals[0], found[0], tolerance, "no attack"),
            Compared(crafted, n, originals[1], found[1], tolerance, attack.numbers(self.num_classes, self.ball)),
            Compared(_SQUARE, few, originals[2], by_square, tolerance, self._numbers_of_square()),
        ]

    def _numbers_of_square(self) -> str:
        norm = NORMS[self.ball[1]]
        return f"{norm.name}, epsilon {norm.length(self.ball[0])}, margin, {NUMBERS.queries} queries, no gradient"

    @property
    def _device(self) -> torch.device:
        return next(self.original.parameters()).device

    @cached_property
    def _few_N(self) -> Tensor:
        return _spread(self.sample_N, MOST_BY_SQUARE)

    @cached_property
    def _of_original(self) -> tuple[int, int, int]:
        """Images that the original classifies correctly: natural, crafted, after Square."""
        return (*self._counts(self.original), self._square(self.original, "the original"))

    @cached_property
    def _batches(self) -> list[_Batch]:
        """The images, and what the attack makes of them on the original."""
        attack, device = table.find(CRAFTED), self._device
        table.check_defined(attack, self.num_classes, self.ball[1])
        task = Task(self.original, self.num_classes, self.ball, self.seed)
        found, done = [], 0
        for sample_B in self.sample_N.split(size_of_batch(None, device, *self.images.shape)):
            x_nat, labels_B = batch_of(self.images.images, self.images.labels, sample_B, device, torch.float32)
            x_adv = craft(attack, task, x_nat, labels_B, sample_B.to(device))
            found.append(_Batch(x_nat.cpu(), x_adv.cpu(), labels_B.cpu()))
            done += len(sample_B)
            self.on_batch(f"{attack.title} on the original", done, len(self.sample_N))
        return found

    def _counts(self, network: nn.Module) -> tuple[int, int]:
        """Natural and crafted images that a network classifies correctly."""
        natural = sum(self._correct(network, batch.x_nat, batch.labels_B) for batch in self._batches)
        return natural, sum(self._correct(network, batch.x_adv, batch.labels_B) for batch in self._batches)

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
