"""Attacks of AutoAttack, each as a state of some images and one step of all of them.

Every image of a state is at a step of its own, and what is random of it depends on the seed, the attack and its
sample alone. So images may come, go and change places at any time, and each goes the way it would go alone.

Shape suffixes: B images of the state, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]


class Ball(NamedTuple):
    """Threat model, a key of `pgd.NORMS`, and radius in the units of images in [0, 1]."""

    threat_model: str
    epsilon: float


class Start(NamedTuple):
    """Images to begin with. x_nat: BCHW in [0, 1]. sample: indices in the data.

    rank: from 2 on, 2 for the likeliest of the wrong classes; target: that class.
    """

    x_nat: Tensor
    labels_B: Tensor
    sample_B: Tensor
    rank_B: Tensor
    target_B: Tensor


class StepResult(NamedTuple):
    """Result of one step of each image. x: images that were looked at, BCHW.

    hit: the attack's aim is reached by x. finite: the logits are.
    """

    hit_B: Tensor
    x: Tensor
    finite_B: Tensor


class PassCount(NamedTuple):
    """Forward and backward passes of one image."""

    forward: int
    backward: int


@dataclass
class AttackState:
    """Images under attack. step: number of steps that each has gone."""

    x_nat: Tensor
    labels_B: Tensor
    step_B: Tensor

    def tensors(self) -> list[Tensor]:
        """All of it, the first dimension of each that of the images."""
        return [getattr(self, field.name) for field in fields(self)]


S = TypeVar("S", bound=AttackState)


def put(state: AttackState, rows_R: Tensor, new: AttackState) -> None:
    """Put the images of a new state into rows of a state."""
    for own, others in zip(state.tensors(), new.tensors(), strict=True):
        own.index_copy_(0, rows_R, others)


def taken(state: S, rows_R: Tensor) -> S:
    """A state of these rows, in memory of its own and in the layout of the images."""
    values: list[Any] = []
    for tensor in state.tensors():
        rows = tensor.index_select(0, rows_R)
        values.append(rows.contiguous(memory_format=torch.channels_last) if rows.dim() == 4 else rows)
    return type(state)(*values)


class Search(ABC, Generic[S]):
    """An attack on images, of which each is attacked with one target class or none.

    steps: of an image at most, until its attack has failed.
    """

    steps: int

    @abstractmethod
    def begin(self, start: Start) -> S:
        """The state of images that have gone no step."""

    @abstractmethod
    def advance(self, state: S, *, last: bool) -> StepResult:
        """One step of all images, in place. last: it is that of each, so that nothing is prepared for another."""

    @abstractmethod
    def passes(self, steps: int) -> PassCount:
        """PassCount that so many steps of an image need, the last of which is of no further use."""


def per_image(values_B: Tensor) -> Tensor:
    """A number of each image, to be broadcast over its pixels."""
    return values_B[:, None, None, None]


def norms(images: Tensor) -> Tensor:
    """L2 norm of each image, (B, 1, 1, 1)."""
    norms_B: Tensor = torch.linalg.vector_norm(images, dim=(1, 2, 3), keepdim=True)
    return norms_B
