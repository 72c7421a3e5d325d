"""Robustness of an exported file beside that of its original, on the same images.

Shape suffixes: N all samples, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.attacks import table
from engine.attacks.auto.search import Ball
from engine.attacks.auto.standard import AttackBatch, AutoAttack
from engine.attacks.fast import FEW_SQUARES, NUMBERS
from engine.attacks.kinds import Task, craft
from engine.evaluation.batches import batch_of, size_of_batch
from engine.evaluation.measure import undisturbed
from engine.evaluation.statistics.intervals import wilson
from engine.pipelines.datasets import AnySplit

CRAFTED = "pgd20"
MOST_BY_SQUARE = 50
"""Images that Square attacks: each costs up to `NUMBERS.queries` forwards of either network."""


class Compared(NamedTuple):
    """Images that each of two networks classifies correctly, of the same n."""

    title: str
    n: int
    original: int
    exported: int
    tolerance: float

    @property
    def difference(self) -> float:
        """Accuracy of the exported file minus that of the original, in [-1, 1]."""
        return (self.exported - self.original) / self.n

    @property
    def passed(self) -> bool:
        """True if the accuracies differ by no more than the tolerance, or by one image."""
        return abs(self.exported - self.original) <= max(1.0, self.tolerance * self.n + 1e-9)

    def interval(self) -> tuple[float, float]:
        """95 % interval of the exported file's accuracy."""
        return wilson(self.exported, self.n)


@dataclass(frozen=True)
class Check:
    """Setting of a comparison. ball: epsilon, threat model. on_batch: called with (what, done, total)."""

    num_classes: int
    ball: tuple[float, str]
    seed: int = 0
    on_batch: Callable[[str, int, int], object] = lambda what, done, total: None

    def compare(
        self, original: nn.Module, exported: nn.Module, images: AnySplit, sample_N: Tensor, tolerance: float
    ) -> list[Compared]:
        """Natural accuracy, that on images which PGD crafts on the original, and that under Square.

        Square attacks each of both by its logits alone, on at most `MOST_BY_SQUARE` of the images. The networks
        get the same images, in evaluation mode and full precision. sample: their indices.
        """
        task = Task(original, self.num_classes, self.ball, self.seed)
        attack = table.find(CRAFTED)
        table.check_defined(attack, self.num_classes, self.ball[1])
        device = next(original.parameters()).device
        counts = torch.zeros(2, 2, dtype=torch.int64)
        with undisturbed(original, device):
            done = 0
            for sample_B in sample_N.split(size_of_batch(None, device, *images.shape)):
                x_nat, labels_B = batch_of(images.images, images.labels, sample_B, device, torch.float32)
                x_adv = craft(attack, task, x_nat, labels_B, sample_B.to(device))
                for row, x in enumerate((x_nat, x_adv)):
                    for column, network in enumerate((original, exported)):
                        counts[row, column] += _correct(network, x, labels_B)
                done += len(sample_B)
                self.on_batch(f"natural and {attack.title} images", done, len(sample_N))
            few_N = _spread(sample_N, MOST_BY_SQUARE)
            stood = [
                self._square(network, images, few_N, title)
                for network, title in ((original, "the original"), (exported, "the exported file"))
            ]
        n, (natural, crafted) = len(sample_N), counts.tolist()
        return [
            Compared("natural", n, *natural, tolerance),
            Compared(f"{attack.title} crafted on the original", n, *crafted, tolerance),
            Compared(f"Square, {NUMBERS.queries} queries", len(few_N), *stood, tolerance),
        ]

    def _square(self, network: nn.Module, images: AnySplit, sample_N: Tensor, title: str) -> int:
        """Images that the network still classifies correctly after Square."""
        place = next(network.parameters(), torch.empty(0)).device
        attack = AutoAttack(
            network,
            self.num_classes,
            Ball(self.ball[1], self.ball[0]),
            seed=self.seed,
            heartbeat=lambda: None,
        )
        x_nat, labels_N = batch_of(images.images, images.labels, sample_N, place, torch.float32)
        size = size_of_batch(None, place, *images.shape)
        looks = [attack.look(*pair) for pair in zip(x_nat.split(size), labels_N.split(size), strict=True)]
        correct_N = torch.cat([look.correct_B for look in looks])
        targets_NT = torch.cat([look.targets_BT for look in looks])

        def batch(rows: Sequence[int]) -> AttackBatch:
            rows_R = torch.tensor(rows, device=place)
            return AttackBatch(x_nat[rows_R], labels_N[rows_R], sample_N.to(place)[rows_R], targets_NT[rows_R])

        left = correct_N.nonzero().flatten().tolist()
        stood = 0
        for done, outcome in enumerate(attack.run(FEW_SQUARES, left, batch, size), start=1):
            stood += outcome.x_adv is None
            self.on_batch(f"Square on {title}", done, len(left))
        return stood


def _correct(network: nn.Module, x: Tensor, labels_B: Tensor) -> int:
    logits_BC = network(x)
    if not logits_BC.isfinite().all():
        raise FloatingPointError("check: logits are NaN or infinite; no result")
    return int((logits_BC.argmax(dim=1) == labels_B).sum())


def _spread(sample_N: Tensor, most: int) -> Tensor:
    """At most so many of the samples, evenly chosen."""
    if len(sample_N) <= most:
        return sample_N
    return sample_N[torch.arange(most) * len(sample_N) // most]
