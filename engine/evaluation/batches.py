"""Measurement of one attack, batch by batch, shared by all processes.

Shape suffixes: B batch, N all samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.attacks.autoattack import Outcome, complaints, raised
from engine.attacks.checks import SLACK, GradientCounts, excess_of
from engine.attacks.kinds import Perturb
from engine.common.stopping import RunFailed, Stop
from engine.evaluation.files.kept_images import KeptImages
from engine.evaluation.partial_results import Measured, PartialResults
from engine.evaluation.results import Result, gradient_warnings
from engine.pipelines.base import unit_images
from engine.pipelines.splits import Indexable
from engine.system.distributed import World


def batch_of(
    images_N: Tensor | Indexable, labels_N: Tensor, sample_B: Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Images as evaluation sees them, BCHW in [0, 1] and channels-last, and their labels, on the device."""
    images_B = images_N[sample_B.to(images_N.device) if isinstance(images_N, Tensor) else sample_B]
    return unit_images(images_B, device, dtype), labels_N[sample_B].to(device)


OnPass = Callable[[str, int, int, str], object]
"""Gets attack, samples done, samples in all, and what it is at in words, or ""; several times a batch."""


class Attack(NamedTuple):
    """Attack that is made.

    classifier: the network that is attacked. crafts_on: the one whose gradients it takes. parts: to survive, in
    order. by_image: every gradient is of all images of the batch, so that those without one can be counted.
    gradients: passes of a batch that have one; None: not known.
    """

    name: str
    description: str
    perturb: Perturb
    classifier: nn.Module
    crafts_on: nn.Module
    parts: tuple[str, ...]
    by_image: bool
    gradients: int | None = None


@dataclass(frozen=True)
class BatchRunner:
    """Runs attacks over batches, of which each process takes every world.size-th.

    ball: epsilon, threat model. keeps: samples whose attacked images are in the result.
    """

    batch: Callable[[Tensor], tuple[Tensor, Tensor]]
    ball: tuple[float, str]
    on_batch: Callable[[str, int, int], object] | None
    stop: Stop
    world: World
    partial: PartialResults | None
    keeps: Tensor | None = None
    on_pass: OnPass | None = None

    def result(self, attack: Attack, sample_N: Tensor, batch_size: int) -> Result:
        """The accuracy under an attack. Raises FloatingPointError and RunFailed as `evaluate` does."""
        batches = torch.split(sample_N, batch_size)
        table = _BatchTable([len(sample_B) for sample_B in batches])
        world, kept = self.world, KeptImages(self.keeps)
        known = {} if self.partial is None else world.broadcast_from_main(lambda: self._known(attack))
        known = {number: values for number, values in known.items() if not kept.wants(batches[number])}
        if world.is_main:
            for number, values in known.items():
                table.add(number, Measured(*values))
        left = [number for number in range(len(batches)) if number not in known]
        done, total = sum(table.sizes[number] for number in known), len(sample_N)
        gradients = attack.gradients  # of a batch; where it is not known, as many as the batch before had
        for number in left[world.rank :: world.size]:
            tell = partial(self._tell, attack.name, (done, table.sizes[number] * world.size, total), gradients)
            measured, lost, gradients = self._measure(attack, batches[number], kept, tell)
            table.add(number, measured, lost)
            if lost or not measured.excess <= SLACK:
                break
            if self.partial is not None:
                self.partial.add(attack.name, number, measured)
            done += table.sizes[number] * world.size
            if self.on_batch is not None:
                self.on_batch(attack.name, min(done, total), total)
            self._tell(attack.name, (done, 0, total), None, 0)
            world.check(self.stop)
        world.barrier(self.stop)
        result = table.gathered(world, attack, sample_N)
        return replace(result, attacked=kept.gathered(world, self.batch))

    def _tell(self, name: str, images: tuple[int, int, int], gradients: int | None, count: int) -> None:
        """Tell of so many gradients of a batch. images: done before it, of the batch, and of all batches."""
        before, size, total = images
        if self.on_pass is not None:
            done = before + (min(count, gradients) * size // gradients if gradients else 0)
            self.on_pass(name, min(done, total), total, "")

    def _known(self, attack: Attack) -> dict[int, list[Any]]:
        """Batches on the disk, in plain types for the broadcast."""
        assert self.partial is not None
        return {number: list(measured) for number, measured in self.partial.known(attack.name).items()}

    def _measure(
        self, attack: Attack, sample_B: Tensor, kept: KeptImages, on_gradient: Callable[[int], object]
    ) -> tuple[Measured, int, int]:
        """A batch, its images whose logits are not finite, its gradients. The device is waited for once."""
        begin = time.perf_counter()
        x_nat, labels_B = self.batch(sample_B)
        gradients = GradientCounts(len(sample_B), x_nat.device, on_gradient)
        with gradients.of(attack.crafts_on):
            attacked = attack.perturb(x_nat, labels_B, sample_B.to(x_nat.device))
        x_adv, survived_parts_B, flags = (
            attacked if isinstance(attacked, Outcome) else (attacked, torch.zeros_like(labels_B), 0)
        )
        logits_BC = attack.classifier(x_adv.to(x_nat.dtype))
        predicted_B = logits_BC.argmax(dim=1)
        correct_B = predicted_B == labels_B
        parts = len(attack.parts)
        survived_B = torch.where(correct_B, parts, survived_parts_B.clamp(max=parts - 1))
        values = (
            (~logits_BC.isfinite().all(dim=1)).sum(),
            excess_of(x_adv, x_nat, *self.ball),
            gradients.zeros,
            gradients.not_finite,
            (correct_B & gradients.hidden_B()).sum(),
        )
        columns = (torch.stack([value.double() for value in values]), survived_B.double(), predicted_B.double())
        row = torch.cat(columns).tolist()
        of_images = [str(int(value)) for value in row[len(values) :]]
        survived, predicted = of_images[: len(sample_B)], of_images[len(sample_B) :]
        lost, excess, zeros, not_finite, masked = row[: len(values)]
        seconds = time.perf_counter() - begin
        kept.add(sample_B, x_adv.to(x_nat.dtype))
        counts = (gradients.entries, int(zeros), int(not_finite), int(masked), flags)
        measured = Measured("".join(survived), " ".join(predicted), excess, seconds, *counts)
        return measured, int(lost), gradients.passes


class _BatchTable:
    """Rows by batch: times measured, images with logits that are not finite, the numbers of `Measured`."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self._rows = torch.zeros(len(sizes), len(Measured._fields), dtype=torch.float64)
        self._survived_N = torch.full((sum(sizes),), -1, dtype=torch.int8)
        self._predicted_N = torch.full((sum(sizes),), -1)

    def add(self, number: int, measured: Measured, lost: int = 0) -> None:
        """Enter a batch."""
        survived, predicted, *others = measured
        self._rows[number] = torch.tensor((1, lost, *others))
        for of_all_N, of_batch in ((self._survived_N, survived), (self._predicted_N, predicted.split())):
            of_all_N.split(list(self.sizes))[number].copy_(torch.tensor([int(each) for each in of_batch]))

    def gathered(self, world: World, attack: Attack, sample_N: Tensor) -> Result:
        """The result of all batches of all processes."""
        times_B, lost_B, excess_B, *sums = world.gather(self._rows).sum(0).unbind(1)
        survived_N = world.gather(self._survived_N).amax(0)
        name, n = attack.name, len(sample_N)
        if lost := int(lost_B.sum()):
            measured = int((survived_N >= 0).sum())
            raise FloatingPointError(
                f"{name}: the logits of {lost:,} of {measured:,} images are NaN or infinite; no result"
            )
        if not (excess_B <= SLACK).all():
            raise RunFailed(f"{name}: an image lies {excess_B.max():g} outside the ball or [0, 1]; no result")
        if not (times_B == 1).all():
            raise RunFailed(f"{name}: a batch was measured {times_B.tolist()} times; no result")
        seconds, entries, zeros, not_finite, masked = (float(column_B.sum()) for column_B in sums[:-1])
        survived = [int((survived_N > part).sum()) for part in range(len(attack.parts))]
        result = Result(
            attack=name,
            correct=survived[-1],
            n=n,
            description=attack.description,
            seconds=seconds,
            zero_gradients=zeros / entries if entries else None,
            non_finite_gradients=not_finite / entries if entries else None,
            masked=masked / n if entries and attack.by_image else None,
            parts={
                part: count / n for part, count in zip(attack.parts, survived, strict=True) if len(survived) > 1
            },
            samples=sample_N,
            verdicts=survived_N == len(attack.parts),
            predicted=world.gather(self._predicted_N).amax(0),
        )
        flags = reduce(or_, map(int, sums[-1].tolist()))
        of_parts = complaints(name, flags, dict(zip(attack.parts, survived, strict=True)))
        return replace(result, flags=raised(flags), warnings=(*gradient_warnings(result), *of_parts))
