"""The places of a batch under attack, and the steps of all of them: on a GPU one launch for each.

Shape suffixes: B slots, R rows of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, NamedTuple

import torch

from engine.attacks.auto.search import S, Search, put, taken
from engine.system.graphs import CapturedCall, waits_noted

_CAPTURED_AT = 3  # of the steps of the same slots: what compiles or chooses an algorithm does so before


class Item(NamedTuple):
    """An image, by its place in the set, and the rank of its target class; see `Start`."""

    image: int
    rank: int


class Slots(Generic[S]):
    """The state of the items under attack, and of each the first image that was a hit, and its step."""

    def __init__(self, state: S, items: Sequence[Item | None]) -> None:
        self.state, self.items = state, list(items)
        self.age = [0] * len(self.items)
        device = state.step_B.device
        self.hit_B = torch.zeros(len(self.items), dtype=torch.bool, device=device)
        self.hit_step_B = torch.zeros_like(state.step_B)
        self.x_hit = state.x_nat.clone()
        self.lost_B = torch.zeros_like(self.hit_B)

    def advance(self, search: Search[S], *, last: bool) -> None:
        """One step of all, in place; images that are the first hits are kept."""
        found = search.advance(self.state, last=last)
        new_B = found.hit_B & ~self.hit_B
        self.lost_B |= ~found.finite_B
        if new_B.device.type == "cpu" and not new_B.any():  # elsewhere the host would wait for the answer
            return
        torch.where(new_B[:, None, None, None], found.x, self.x_hit, out=self.x_hit)
        self.hit_step_B.copy_(self.state.step_B.where(new_B, self.hit_step_B))
        self.hit_B |= new_B

    def fill(self, rows: Sequence[int], items: Sequence[Item], new: S) -> None:
        """Give slots to new items."""
        rows_R = torch.tensor(rows, device=self.hit_B.device)
        put(self.state, rows_R, new)
        for flags in (self.hit_B, self.lost_B):
            flags[rows_R] = False
        for row, item in zip(rows, items, strict=True):
            self.items[row], self.age[row] = item, 0

    def shrunk(self, rows: Sequence[int]) -> Slots[S]:
        """The same of these slots alone."""
        rows_R = torch.tensor(rows, device=self.hit_B.device)
        other = Slots(taken(self.state, rows_R), [self.items[row] for row in rows])
        other.age = [self.age[row] for row in rows]
        other.hit_B, other.lost_B = self.hit_B[rows_R], self.lost_B[rows_R]
        other.hit_step_B = self.hit_step_B[rows_R]
        other.x_hit.copy_(self.x_hit[rows_R])
        return other


class Stepper(Generic[S]):
    """Steps of a search on slots: op by op, and on a GPU from the third on replayed as a CUDA graph.

    Where the host waits for the GPU in a step, or a step cannot be captured, all are op by op, with a warning.
    around: a context of each step.
    """

    def __init__(
        self, search: Search[S], around: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self._search, self._around = search, around
        self._is_possible = True
        self._slots: Slots[S] | None = None
        self._count = 0
        self._graph: CapturedCall | None = None

    def __call__(self, slots: Slots[S], *, last: bool) -> None:
        """One step of all slots. last: it is that of each, as of `Search.advance`."""
        if slots is not self._slots:
            self._slots, self._count, self._graph = slots, 0, None
        self._count += 1
        with self._around():
            if slots.hit_B.device.type == "cuda" and self._is_possible and not last:
                self._step_of_gpu(slots)
            else:
                slots.advance(self._search, last=last)

    def _step_of_gpu(self, slots: Slots[S]) -> None:
        if self._graph is None and self._count >= _CAPTURED_AT:
            self._capture(slots)
        if self._graph is not None:
            self._graph.replay()
        elif self._count == _CAPTURED_AT - 1:
            with waits_noted() as waits:
                slots.advance(self._search, last=False)
            if waits:
                self._give_up(f"the host waits for the GPU ({waits[0]})")
        else:
            slots.advance(self._search, last=False)

    def _capture(self, slots: Slots[S]) -> None:
        try:
            self._graph = CapturedCall(lambda: slots.advance(self._search, last=False))
        except RuntimeError as error:  # of a network of anybody's, or the memory is too small
            torch.cuda.empty_cache()
            self._give_up(str(error).splitlines()[0])

    def _give_up(self, why: str) -> None:
        self._is_possible = False
        warnings.warn(
            f"a step of the attack is not captured as a CUDA graph, and so is slower ({why})", stacklevel=5
        )
