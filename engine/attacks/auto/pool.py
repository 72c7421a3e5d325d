"""Slots of a batch that are filled with images as others leave them, until all have been attacked.

An image leaves as soon as it is broken, and another takes its slot in the middle of the others' attacks. So
batches are full to the end, of whatever attack and of however many target classes.

Shape suffixes: B slots, R rows of them, N images.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from engine.attacks.auto.search import PassCount, S, Search, Start
from engine.attacks.auto.slots import Item, Slots, Stepper
from engine.common.numbers import ceil_div

FEWEST_SLOTS = 16
"""In smaller batches oneDNN chooses other algorithms, whose last bits differ."""
_SHRINK = 0.75  # the images are moved together where they fill no more of the slots
_STEPS_BETWEEN_LOOKS = {"cpu": 1}  # on other devices the host waits for the hits
_USUAL_STEPS = 16


class ImageOutcome(NamedTuple):
    """Result of an attack on an image. x_adv: CHW, that of the lowest rank that broke it; None: it stood.

    passes: that were needed: of the ranks up to that one.
    """

    image: int
    x_adv: Tensor | None
    rank: int | None
    passes: PassCount


Confirm = Callable[[Sequence[Item], Tensor], tuple[Tensor, Tensor]]
"""(items, images that were found, RCHW) -> (these, moved into the ball exactly; True for those that are hits)"""


class _Progress:
    """Ranks of each image that are still to be searched, what was needed for the others, and the lowest hit."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._open: dict[int, set[int]] = {}
        self._passes: dict[int, dict[int, PassCount]] = {}
        self._hit: dict[int, tuple[int, Tensor]] = {}
        for image, rank in items:
            self._open.setdefault(image, set()).add(rank)
            self._passes[image] = {}

    def wants(self, item: Item | None) -> bool:
        """True if the item's result can still matter."""
        return item is not None and item.rank in self._open.get(item.image, ())

    def add(self, item: Item, passes: PassCount, x_adv: Tensor | None) -> ImageOutcome | None:
        """Note the end of an item; the outcome of its image, where that is the last that matters."""
        image, rank = item
        left, needed = self._open[image], self._passes[image]
        left.discard(rank)
        needed[rank] = passes
        if x_adv is not None:
            self._hit[image] = (rank, x_adv)
            for higher in [other for other in (*left, *needed) if other > rank]:
                left.discard(higher)
                needed.pop(higher, None)
        if left:
            return None
        del self._open[image], self._passes[image]
        lowest, x_hit = self._hit.pop(image, (None, None))
        forward, backward = map(sum, zip(*needed.values(), strict=True))
        return ImageOutcome(image, x_hit, lowest, PassCount(forward, backward))


def attack_all(
    search: Search[S],
    start: Callable[[Sequence[Item]], Start],
    items: Iterable[Item],
    size: int,
    confirm: Confirm,
    heartbeat: Callable[[], None],
    fewest: int = FEWEST_SLOTS,
    around_steps: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[ImageOutcome]:
    """Attack all items, and yield the outcome of each image as soon as it is known.

    items: the lowest rank of all images first, since a hit makes the higher ones of its image needless.
    size: slots at most. start: images, labels and targets of items. confirm: decides of what was found; the attack
    goes on where that is no hit. heartbeat: called after each look at the hits. fewest: slots are filled up to so
    many, or to `size`, so that the bits of an image depend on no other. around_steps: the precision of the steps.
    Raises FloatingPointError where a network's logits are not finite.
    """
    queue, fewest = deque(items), min(fewest, size)
    progress, step = _Progress(queue), Stepper(search, around_steps)
    slots = _first(search, start, queue, max(slots_for(len(queue), size), fewest))
    while slots is not None:
        live = [row for row, item in enumerate(slots.items) if progress.wants(item)]
        for _ in range(_steps_until_look(search, slots, live)):
            last = all(slots.age[row] == search.steps - 1 for row in live)
            step(slots, last=last)
            slots.age = [age + 1 for age in slots.age]
        yield from _harvest(search, slots, live, progress, confirm)
        heartbeat()
        slots = _refilled(search, start, queue, slots, progress, fewest)


def slots_for(count: int, size: int) -> int:
    """Slots for so many items: at most `size`, and such that all fills are of about one size."""
    fills = max(ceil_div(count, size), 1)
    return ceil_div(count, fills)


def _first(
    search: Search[S], start: Callable[[Sequence[Item]], Start], queue: deque[Item], count: int
) -> Slots[S] | None:
    if not queue:
        return None
    items = [queue.popleft() for _ in range(min(count, len(queue)))]
    fillers = count - len(items)
    state = search.begin(start([*items, *[items[0]] * fillers]))
    return Slots(state, [*items, *[None] * fillers])


def _steps_until_look(search: Search[S], slots: Slots[S], live: Sequence[int]) -> int:
    """Steps until an image may leave: at its end, and before that as often as the device can be asked."""
    to_end = min(search.steps - slots.age[row] for row in live)
    return min(to_end, _STEPS_BETWEEN_LOOKS.get(slots.hit_B.device.type, _USUAL_STEPS))


def _harvest(
    search: Search[S],
    slots: Slots[S],
    live: Sequence[int],
    progress: _Progress,
    confirm: Confirm,
) -> Iterator[ImageOutcome]:
    """Outcomes of the images whose attacks have ended."""
    hit, lost = torch.stack((slots.hit_B, slots.lost_B)).tolist()
    if count := sum(lost[row] for row in live):
        raise FloatingPointError(f"the logits of {count:,} images under attack are NaN or infinite; no result")
    rows = [row for row in live if hit[row]]
    confirmed: dict[int, Tensor] = {}
    if rows:
        rows_R = torch.tensor(rows, device=slots.hit_B.device)
        items = [item for row in rows if (item := slots.items[row]) is not None]
        found, good_R = confirm(items, slots.x_hit[rows_R])
        confirmed = {row: x for row, x, good in zip(rows, found, good_R.tolist(), strict=True) if good}
        slots.hit_B[rows_R] = False
        steps = dict(zip(rows, slots.hit_step_B[rows_R].tolist(), strict=True))
    for row in live:
        item = slots.items[row]
        if item is None or not progress.wants(item):  # a lower rank has just broken the image
            continue
        if row in confirmed:
            outcome = progress.add(item, search.passes(steps[row]), confirmed[row])
        elif slots.age[row] == search.steps:
            outcome = progress.add(item, search.passes(search.steps), None)
        else:
            continue
        slots.items[row] = None
        if outcome is not None:
            yield outcome


def _refilled(
    search: Search[S],
    start: Callable[[Sequence[Item]], Start],
    queue: deque[Item],
    slots: Slots[S],
    progress: _Progress,
    fewest: int,
) -> Slots[S] | None:
    """The slots with new items where others have left; fewer of them where no item waits; None at the end."""
    free = [row for row, item in enumerate(slots.items) if not progress.wants(item)]
    for row in free:
        slots.items[row] = None
    rows, items = [], []
    for row in free:
        while queue and not progress.wants(queue[0]):
            queue.popleft()
        if not queue:
            break
        rows.append(row)
        items.append(queue.popleft())
    if rows:
        slots.fill(rows, items, search.begin(start(items)))
    live = [row for row, item in enumerate(slots.items) if item is not None]
    if not live:
        return None
    wanted = max(len(live), fewest)
    if wanted > _SHRINK * len(slots.items):
        return slots
    others = [row for row in range(len(slots.items)) if slots.items[row] is None]
    return slots.shrunk([*live, *others[: wanted - len(live)]])
