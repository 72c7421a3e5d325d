"""Measurement of AutoAttack on a whole set of images, shared by all processes, each image's result on the disk.

Shape suffixes: P parts of the attack, N images of the set, R some of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.attacks.auto.pool import ImageOutcome
from engine.attacks.auto.search import PassCount
from engine.attacks.auto.standard import AttackBatch, AutoAttack
from engine.attacks.autoattack import complaints, raised
from engine.common.stopping import Stop
from engine.evaluation.batches import OnPass
from engine.evaluation.files.hits import Hit, HitNotes, classified, in_parts, judged, rows_of_note
from engine.evaluation.files.kept_images import KeptImages
from engine.evaluation.partial_results import PartialResults
from engine.evaluation.results import Hits, PartResult, Result
from engine.system.distributed import World

_SECONDS_BETWEEN_NOTES = 1.0
_WAITS, _FELL, _STOOD = 0, 1, 2


class SetAttack(NamedTuple):
    """AutoAttack that is made. parts: to survive, in order, the first without an attack."""

    name: str
    description: str
    attack: AutoAttack
    parts: tuple[str, ...]


@dataclass(frozen=True)
class SetRunner:
    """Runs AutoAttack on images, of which each process takes every world.size-th of those that are left.

    batch: images and labels of samples, on the device. keeps_images: the images that broke are kept on the disk,
    and are in the result; keeps: samples whose attacked images are. The others are as of `BatchRunner`.
    """

    batch: Callable[[Tensor], tuple[Tensor, Tensor]]
    on_batch: Callable[[str, int, int], object] | None
    stop: Stop
    world: World
    partial: PartialResults | None
    keeps_images: bool = False
    keeps: Tensor | None = None
    on_pass: OnPass | None = None

    def hit_notes(self, attack: SetAttack) -> HitNotes | None:
        """The place of the images that broke, where they are kept."""
        return HitNotes(self.partial, attack.name) if self.keeps_images and self.partial is not None else None

    def result(self, attack: SetAttack, sample_N: Tensor, size: int) -> Result:
        """The accuracy under an attack. Raises FloatingPointError where logits are not finite."""
        table = _Table(attack.parts, len(sample_N))
        partial, world, kept = self.partial, self.world, KeptImages(self.keeps)
        again = {place for place, sample in enumerate(sample_N.tolist()) if sample in kept}
        if partial is not None:
            for note in world.broadcast_from_main(lambda: self._notes(attack, partial)):
                rows = [row for row, place in enumerate(note["images"]) if place not in again]
                table.enter(_Note(**rows_of_note(note, rows)), mine=world.is_main)
        share = _Share(self, attack, sample_N, table, kept)
        try:
            share.attack_all(table.unfinished()[world.rank :: world.size], size)
        finally:
            share.flush()
        world.barrier(self.stop)
        result = replace(table.gathered(world, attack, sample_N), attacked=kept.gathered(world, self.batch))
        return replace(result, hits=self._hits(attack, sample_N, table, size))

    def _notes(self, attack: SetAttack, partial: PartialResults) -> list[dict[str, Any]]:
        whole = [note for note in partial.notes(attack.name) if note.keys() == set(_Note._fields)]
        kept = self.hit_notes(attack)
        return whole if kept is None else kept.with_images(whole)

    def _hits(self, attack: SetAttack, sample_N: Tensor, table: _Table, size: int) -> Hits | None:
        """The images that broke, of which each process judges its share. None in others than the main one."""
        notes, world = self.hit_notes(attack), self.world
        if notes is None:
            return None
        fell_N = table.fell(world)
        places = (fell_N > 0).nonzero().flatten()
        told_3N = torch.zeros(3, len(sample_N), dtype=torch.int64)
        for some in in_parts(places.tolist()[world.rank :: world.size], size, world.heartbeat):
            x_nat, labels_R = self.batch(sample_N[some])
            found = notes.read({place: int(fell_N[place]) for place in some})
            x_adv = torch.stack([found[place].x_adv for place in some]).to(x_nat.device)
            judgement = judged(attack.attack.network, x_adv, x_nat, labels_R, attack.attack.ball)
            told_3N[:, some] = torch.stack((judgement.predicted_R, judgement.hit_rounded_R, labels_R)).cpu()
        world.barrier(self.stop)
        predicted_N, rounded_N, labels_N = world.gather(told_3N).amax(0)
        if not world.is_main:
            return None
        found = notes.read({place: int(fell_N[place]) for place in places.tolist()})
        kept = [found[place] for place in places.tolist()]
        images = torch.stack([hit.x_adv for hit in kept]) if kept else self.batch(sample_N[:1])[0][:0].cpu()
        part, rank = (
            torch.tensor(numbers, dtype=torch.int64)
            for numbers in ([h.part for h in kept], [h.rank for h in kept])
        )
        columns = (labels_N[places], predicted_N[places], part, rank, rounded_N[places] > 0)
        return Hits(images, sample_N[places], *columns, fell_N)


class _Note(NamedTuple):
    """Results of a part for some images, by their places in the set. stood: a digit for each, 1 if it stood.

    predicted: the classes of the images that broke, -1 for those that stood and where it is not known.
    seconds: that went by since the note before. flags: of `AutoAttack` until then.
    """

    part: int
    images: list[int]
    stood: str
    predicted: list[int]
    forward: list[int]
    backward: list[int]
    seconds: float
    flags: int


class _Table:
    """Results of all images under all parts, as far as they are known. seconds, flags: of this process."""

    def __init__(self, parts: Sequence[str], count: int) -> None:
        self._status_PN = torch.full((len(parts), count), _WAITS, dtype=torch.int8)
        self._predicted_N = torch.full((count,), -1)
        self._passes_PN2 = torch.zeros(len(parts), count, 2, dtype=torch.int64)
        self._seconds_P = torch.zeros(len(parts), dtype=torch.float64)
        self._flags = 0

    def enter(self, note: _Note, *, mine: bool = True) -> None:
        """Add a note. mine: its seconds are to be counted by this process."""
        status_R = torch.tensor([_STOOD if digit == "1" else _FELL for digit in note.stood], dtype=torch.int8)
        self._status_PN[note.part, note.images] = status_R
        fell_R, predicted_R = status_R == _FELL, torch.tensor(note.predicted, dtype=torch.int64)
        self._predicted_N[torch.tensor(note.images, dtype=torch.int64)[fell_R]] = predicted_R[fell_R]
        self._passes_PN2[note.part, note.images] = torch.tensor([note.forward, note.backward], dtype=torch.int64).T
        self._seconds_P[note.part] += note.seconds * mine
        self._flags |= note.flags

    def unfinished(self) -> list[int]:
        """Images that have neither fallen nor stood all."""
        over_N = (self._status_PN == _FELL).any(dim=0) | (self._status_PN[-1] == _STOOD)
        return (~over_N).nonzero().flatten().tolist()

    def waiting(self, part: int, images: Iterable[int]) -> list[int]:
        """Those of the images that have stood the parts before, and have no result of this one."""
        before_N = self._status_PN[part - 1] == _STOOD if part else torch.ones_like(self._status_PN[0]) > 0
        waits_N = before_N & (self._status_PN[part] == _WAITS)
        return [image for image in images if waits_N[image]]

    def share_done(self) -> float:
        """Part of the work that is done, in [0, 1], as if all parts cost the same."""
        fell_N = (self._status_PN == _FELL).any(dim=0)
        done_N = (self._status_PN != _WAITS).double().mean(dim=0)
        return float(done_N.where(~fell_N, 1.0).mean())

    def fell(self, world: World) -> Tensor:
        """Number of the part that broke each image, -1 where it stood all; of all processes."""
        fell_PN = world.gather(self._status_PN).amax(0) == _FELL
        return torch.where(fell_PN.any(0), fell_PN.long().argmax(0), -1)

    def gathered(self, world: World, attack: SetAttack, sample_N: Tensor) -> Result:
        """The result of all processes."""
        status_PN = world.gather(self._status_PN).amax(0)
        passes_P2 = world.gather(self._passes_PN2).amax(0).sum(1)
        seconds_P = world.gather(self._seconds_P).sum(0)
        flags = 0
        for each in world.gather(torch.tensor(self._flags)).tolist():
            flags |= each
        stood_P = (status_PN == _STOOD).sum(1).tolist()
        n = len(sample_N)
        details = {}
        entering = n
        for row, part in enumerate(attack.parts):
            forward, backward = passes_P2[row].tolist()
            details[part] = PartResult(entering, stood_P[row], forward, backward, float(seconds_P[row]))
            entering = stood_P[row]
        stood = dict(zip(attack.parts, stood_P, strict=True))
        return Result(
            attack=attack.name,
            correct=stood_P[-1],
            n=n,
            description=attack.description,
            seconds=float(seconds_P.sum()),
            parts={part: count / n for part, count in stood.items()},
            details=details,
            flags=raised(flags),
            warnings=tuple(complaints(attack.name, flags, stood)),
            samples=sample_N,
            verdicts=status_PN[-1] == _STOOD,
            predicted=world.gather(self._predicted_N).amax(0),
        )


class _Share:
    """The images that this process attacks."""

    def __init__(
        self, runner: SetRunner, attack: SetAttack, sample_N: Tensor, table: _Table, kept: KeptImages
    ) -> None:
        self._runner, self._attack, self._table = runner, attack, table
        self._sample_N, self._kept = sample_N, kept
        self._targets: dict[int, Tensor] = {}
        self._part = self._checks = 0
        self._fresh: list[ImageOutcome] = []
        self._begin = self._told = time.perf_counter()

    def attack_all(self, images: list[int], size: int) -> None:
        """Attack them with all parts."""
        auto = self._attack.attack
        if images:
            auto.check(self._batch(images[:size])[0])
        for some in in_parts(images, size, self._runner.world.heartbeat):
            self._look(some)
        for part in range(1, len(self._attack.parts)):
            self.flush()
            self._part, self._checks = part, 0
            name, waiting = self._attack.parts[part], self._table.waiting(part, images)
            for outcome in auto.run(name, waiting, self._with_targets, size, self._check):
                self._add(outcome)

    def flush(self) -> None:
        """Put what was found since the last time into the table and on the disk."""
        now = time.perf_counter()
        note = _Note(
            self._part,
            [found.image for found in self._fresh],
            "".join(str(int(found.x_adv is None)) for found in self._fresh),
            self._classes(),
            [found.passes.forward for found in self._fresh],
            [found.passes.backward for found in self._fresh],
            now - self._begin,
            self._attack.attack.flags,
        )
        self._keep_images()
        self._fresh, self._begin = [], now
        self._table.enter(note)
        if self._runner.partial is not None and note.images:
            self._runner.partial.add_note(self._attack.name, note._asdict())
        if self._runner.on_batch is not None:
            n = len(self._sample_N)
            self._runner.on_batch(self._attack.name, int(n * self._table.share_done()), n)
        self._tell()

    def _classes(self) -> list[int]:
        """Classes of the images that broke since the last time, -1 for others.

        It is -1 also where the network gives the label in this batch: which class it gave is not known then.
        """
        classes = [-1] * len(self._fresh)
        rows = [row for row, found in enumerate(self._fresh) if found.x_adv is not None]
        if rows:
            images = torch.stack([x_adv for found in self._fresh if (x_adv := found.x_adv) is not None])
            labels_R = self._batch([self._fresh[row].image for row in rows])[1]
            predicted_R, _ = classified(self._attack.attack.network, images)
            for row, predicted in zip(rows, predicted_R.where(predicted_R != labels_R, -1).tolist(), strict=True):
                classes[row] = predicted
        return classes

    def _keep_images(self) -> None:
        """Put the images that broke on the disk, before their notes: whoever finds a note finds its images."""
        notes = self._runner.hit_notes(self._attack)
        hits = {
            found.image: Hit(found.x_adv, self._part, found.rank)
            for found in self._fresh
            if found.x_adv is not None and found.rank is not None
        }
        if notes is not None and hits:
            notes.add(hits)

    def _look(self, images: list[int]) -> None:
        """Classify images as they are."""
        x_nat, labels_R = self._batch(images)
        correct_R, targets_RT, finite_R = self._attack.attack.look(x_nat, labels_R)
        if lost := int((~finite_R).sum()):
            raise FloatingPointError(
                f"{self._attack.name}: the logits of {lost:,} of {len(images):,} images are NaN or infinite; "
                "no result"
            )
        self._targets |= dict(zip(images, targets_RT, strict=True))
        new = set(self._table.waiting(0, images))
        for image, x, correct in zip(images, x_nat, correct_R.tolist(), strict=True):
            if image in new:
                self._add(ImageOutcome(image, None if correct else x, None, PassCount(1, 0)))

    def _add(self, outcome: ImageOutcome) -> None:
        self._fresh.append(outcome)
        if outcome.x_adv is not None:
            self._kept.add(self._sample_N[outcome.image].reshape(1), outcome.x_adv[None])
        if time.perf_counter() - self._begin > _SECONDS_BETWEEN_NOTES:
            self.flush()

    def _check(self) -> None:
        """Look after the steps of an attack at the other processes, and tell of them."""
        self._checks += 1
        now = time.perf_counter()
        if now - self._told > _SECONDS_BETWEEN_NOTES:
            self._told = now
            self._tell()
        self._runner.world.check(self._runner.stop)

    def _tell(self) -> None:
        if self._runner.on_pass is not None:
            n, part = len(self._sample_N), self._attack.parts[self._part]
            doing = f"{part}, {self._checks:,} checks" if self._part else ""
            self._runner.on_pass(self._attack.name, int(n * self._table.share_done()), n, doing)

    def _batch(self, images: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self._runner.batch(self._sample_N[torch.tensor(images)])

    def _with_targets(self, images: Sequence[int]) -> AttackBatch:
        x_nat, labels_R = self._batch(images)
        sample_R = self._sample_N[torch.tensor(images)].to(x_nat.device)
        return AttackBatch(x_nat, labels_R, sample_R, torch.stack([self._targets[image] for image in images]))
