"""Adversarial images that an attack has found, on the disk beside an evaluation's notes, and judged again.

Shape suffixes: N images of the set, R some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.attacks.auto.search import Ball
from engine.attacks.auto.standard import filled_pass, outside
from engine.attacks.pgd import NORMS
from engine.common.stopping import RunFailed
from engine.evaluation.partial_results import PartialResults

_LEVELS = 255
_ROUNDING = 1e-12  # of a distance between images of whole numbers of 255ths, computed in float64


class Hit(NamedTuple):
    """An image that broke. x_adv: CHW. part: number of the attack's part that broke it; rank: as of `Outcome`."""

    x_adv: Tensor
    part: int
    rank: int


class HitNotes:
    """The images that broke under one attack, of all processes, by their places in the set."""

    def __init__(self, partial: PartialResults, attack: str) -> None:
        self._partial, self._attack = partial, attack

    def add(self, hits: Mapping[int, Hit]) -> None:
        """Put images on the disk. Raises RunFailed where that cannot be."""
        x_adv_R, part_R, rank_R = zip(*hits.values(), strict=True)
        numbers = {"places": list(hits), "parts": part_R, "ranks": rank_R}
        tensors = {name: torch.tensor(values) for name, values in numbers.items()}
        images = torch.stack([x.cpu() for x in x_adv_R]).contiguous()
        self._partial.add_tensors(self._attack, tensors | {"images": images})

    def read(self, fell: Mapping[int, int]) -> dict[int, Hit]:
        """Images at these places that broke under the part of that number."""
        found = {}
        for record in self._partial.tensors(self._attack):
            columns = (record[name].tolist() for name in ("places", "parts", "ranks"))
            for row, (place, part, rank) in enumerate(zip(*columns, strict=True)):
                if fell.get(place) == part:
                    found[place] = Hit(record["images"][row], part, rank)
        if lost := fell.keys() - found.keys():
            raise RunFailed(
                f"{self._attack}: {len(lost)} of the images that were found are not on the disk any more"
            )
        return found

    def with_images(self, notes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The notes of `whole_set`, without the images that broke and are not here. Part 0 is no attack."""
        there: set[tuple[int, int]] = set()
        for record in self._partial.tensors(self._attack):
            there.update(zip(record["parts"].tolist(), record["places"].tolist(), strict=True))
        return [_with_images(note, there) for note in notes]


def _with_images(note: Mapping[str, Any], there: Collection[tuple[int, int]]) -> dict[str, Any]:
    part, images, stood = note["part"], note["images"], note["stood"]
    rows = [row for row, image in enumerate(images) if part == 0 or stood[row] == "1" or (part, image) in there]
    return rows_of_note(note, rows)


def rows_of_note(note: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """A note of `whole_set` with some of its images alone."""
    columns = {name: [note[name][row] for row in rows] for name in ("images", "predicted", "forward", "backward")}
    return {**note, **columns, "stood": "".join(note["stood"][row] for row in rows)}


class Judgement(NamedTuple):
    """The network's classes of images; whether they are hits; and whether they still are, rounded to n/255.

    A hit is misclassified, its logits are finite, and it lies in the ball and in [0, 1].
    """

    predicted_R: Tensor
    hit_R: Tensor
    hit_rounded_R: Tensor


def judged(network: nn.Module, x_adv: Tensor, x_nat: Tensor, labels_R: Tensor, ball: Ball) -> Judgement:
    """Classify images by the network itself, as they are and rounded to whole numbers of 255ths."""
    predicted_R, finite_R = classified(network, x_adv)
    rounded = (x_adv.double() * _LEVELS).round().clamp(0, _LEVELS) / _LEVELS
    rounded_class_R, rounded_finite_R = classified(network, rounded.to(x_adv.dtype))
    hit_R = (predicted_R != labels_R) & finite_R & ~outside(x_adv, x_nat, ball)
    hit_rounded_R = (rounded_class_R != labels_R) & rounded_finite_R & _near(rounded, x_nat, ball)
    return Judgement(predicted_R, hit_R, hit_rounded_R)


def classified(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The network's classes, and True where all logits are finite."""
    logits_RC = filled_pass(network, images)
    return logits_RC.argmax(dim=1), logits_RC.isfinite().all(dim=1)


def _near(rounded: Tensor, x_nat: Tensor, ball: Ball) -> Tensor:
    """True where images of whole 255ths, in float64, lie in the ball around images; those as the file has them."""
    whole = (x_nat.double() * _LEVELS).round() / _LEVELS
    origin = torch.where(whole.to(x_nat.dtype) == x_nat, whole, x_nat.double())
    length_R = torch.linalg.vector_norm((rounded - origin).flatten(1), NORMS[ball.threat_model].order, dim=1)
    near_R: Tensor = length_R <= ball.epsilon + _ROUNDING
    return near_R


def in_parts(places: Sequence[int], size: int, heartbeat: Callable[[], None]) -> Iterable[list[int]]:
    """The places, at most so many at a time."""
    for first in range(0, len(places), size):
        heartbeat()
        yield list(places[first : first + size])
