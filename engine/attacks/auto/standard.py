"""AutoAttack's attacks on a network and those of AA-fast, each on the images that stood those before.

Shape suffixes: B or R images, C classes, T target classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.attacks.auto.adaptive import Adaptive
from engine.attacks.auto.apgd import Apgd
from engine.attacks.auto.fab import FabT
from engine.attacks.auto.pool import FEWEST_SLOTS, ImageOutcome, attack_all
from engine.attacks.auto.search import Ball, Logits, Search, Start
from engine.attacks.auto.slots import Item
from engine.attacks.auto.square import Square
from engine.attacks.autoattack import count_targets
from engine.attacks.evaluated import prepared
from engine.attacks.fast import ADAPTIVE, FEW_SQUARES, MARGIN, NUMBERS
from engine.attacks.pgd import NORMS
from engine.common.lookup import look_up
from engine.kernels.philox import Stream
from engine.models.layers import fewest_images
from engine.system.precision import Precision, format_of, tf32_on_gpus

_FIRST_RANK = 2  # the likeliest class is of rank 1
_UNSCALED = ("apgd-t", "apgd-dlr", MARGIN)  # no factor on the logits changes their steps: a zero gradient tells
_SHRINK = 1 - 2.0**-20  # of a perturbation that rounding has put outside the ball
_DRAWS, _ALIKE = 5, 1e-4  # passes of the check for random networks, and the distance of their normalised logits
_RANDOM, _PROBABILITIES, _DYNAMIC, _ZERO_GRADIENTS = 1, 2, 4, 8  # in the order of `autoattack.FLAGS`


class Steps(NamedTuple):
    """Steps of APGD and FAB for each target class, and queries of Square."""

    apgd: int
    fab: int
    square: int


STANDARD = Steps(apgd=100, fab=100, square=5000)


class Look(NamedTuple):
    """Images as they are. correct: by the network itself. targets: the wrong classes, the likeliest first, BT.

    finite: the logits are.
    """

    correct_B: Tensor
    targets_BT: Tensor
    finite_B: Tensor


class AttackBatch(NamedTuple):
    """Images BCHW in [0, 1], labels, indices in the data, and target classes as of `Look`."""

    x_nat: Tensor
    labels_B: Tensor
    sample_B: Tensor
    targets_BT: Tensor


class AutoAttack:
    """The attacks of `_SEARCHES` on a network, every hit verified by the network as it is.

    network: in evaluation mode, its parameters frozen, kept as it is. It is attacked in the form of `prepared`.
    heartbeat: called all the time, since an attack may take hours.
    search_format: of the search on a GPU, a key of `_AROUND_STEPS`; hits are verified in float32.
    flags: a bit for each of `autoattack.FLAGS`, of what was seen so far.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        ball: Ball,
        *,
        seed: int,
        heartbeat: Callable[[], None],
        search_format: str = "float32",
    ) -> None:
        self._around_steps = look_up("search_format", search_format, _AROUND_STEPS)
        self.network, self._attacked = network, _attacked(network, search_format)
        self._num_classes, self._targets = num_classes, count_targets(num_classes)
        self.ball, self._seed, self._heartbeat = ball, seed, heartbeat
        self.flags = 0

    def look(self, x_nat: Tensor, labels_B: Tensor) -> Look:
        """Classify images as they are."""
        logits_BC = self._logits(x_nat)
        order_BC = logits_BC.argsort(dim=1)  # as published: ties by this order
        targets_BT = order_BC[:, -1 - self._targets : -1].flip(1)
        correct_B = logits_BC.argmax(dim=1) == labels_B
        return Look(correct_B, targets_BT, logits_BC.isfinite().all(dim=1))

    def check(self, x_nat: Tensor) -> None:
        """Note in `flags` a network that is random, gives probabilities, or takes gradients as it classifies."""
        draws = [self._logits(x_nat) for _ in range(_DRAWS - 1)]
        with _gradients_noted() as noted:
            draws.append(self._logits(x_nat))
        logits_BC = draws[0]
        unit = [each / (each.norm(dim=1, keepdim=True) + 1e-10) for each in draws]
        if any((each - unit[0]).norm(dim=1).max() > _ALIKE for each in unit):
            self.flags |= _RANDOM
        sums_B = logits_BC.sum(dim=1)
        if logits_BC.min() > -1e-5 and logits_BC.max() < 1 + 1e-5 and ((sums_B - 1).abs() < 1e-5).all():
            self.flags |= _PROBABILITIES
        if noted:
            self.flags |= _DYNAMIC

    def run(
        self,
        part: str,
        images: Sequence[int],
        batch: Callable[[Sequence[int]], AttackBatch],
        size: int,
        on_look: Callable[[], None] = lambda: None,
    ) -> Iterator[ImageOutcome]:
        """Attack images with one part; the outcome of each as soon as it is known.

        images: numbers that `batch` knows. size: images per pass at most. on_look: called after each look at the
        hits; what it raises ends the attack.
        Raises FloatingPointError where the network's logits are not finite.
        """
        if not images:
            return
        search = self.search(part)
        fewest = max(FEWEST_SLOTS, fewest_images(self._attacked, batch(images[:1]).x_nat))
        runs = look_up("attack", part, _RUNS)(self._targets)
        items = [Item(image, _FIRST_RANK + run) for run in range(runs) for image in images]

        def start(wanted: Sequence[Item]) -> Start:
            x_nat, labels_B, sample_B, targets_BT = batch([item.image for item in wanted])
            rank_B = torch.tensor([item.rank for item in wanted], device=x_nat.device)
            place_B = (rank_B - _FIRST_RANK) % self._targets
            target_B = targets_BT.gather(1, place_B[:, None]).squeeze(1)
            return Start(x_nat, labels_B, sample_B, rank_B, target_B)

        def confirm(wanted: Sequence[Item], found: Tensor) -> tuple[Tensor, Tensor]:
            x_nat, labels_R, *_ = batch([item.image for item in wanted])
            return self.verified(found, x_nat, labels_R)

        def look() -> None:
            self._heartbeat()
            on_look()

        for outcome in attack_all(search, start, items, size, confirm, look, fewest, self._around_steps):
            if isinstance(search, Apgd) and part in _UNSCALED and search.zero_gradients > 0:
                self.flags |= _ZERO_GRADIENTS
            yield outcome

    def verified(self, x_adv: Tensor, x_nat: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """The images in the ball and in [0, 1] exactly, and True for those that the network itself gets wrong."""
        x_adv = inside(x_adv, x_nat, self.ball)
        logits_BC = self._logits(x_adv)
        wrong_B = (logits_BC.argmax(dim=1) != labels_B) & logits_BC.isfinite().all(dim=1)
        return x_adv, wrong_B & ~outside(x_adv, x_nat, self.ball)

    def search(self, part: str) -> Search[Any]:
        """The attack of one part. Raises ValueError for an unknown one."""
        given = _Given(self._attacked, self._num_classes, self.ball, self._seed)
        return look_up("attack", part, _SEARCHES)(given)

    def _logits(self, images: Tensor) -> Tensor:
        self._heartbeat()
        return filled_pass(self.network, images).float()


_AROUND_STEPS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "float32": nullcontext,
    "tf32": tf32_on_gpus,  # of float32, as torch has convolutions by default
    "bfloat16": nullcontext,
}


def _attacked(network: nn.Module, search_format: str) -> nn.Module:
    """The form of a network that is attacked. Never in float16, where large logits overflow."""
    parameter = next(network.parameters(), torch.empty(0))
    place = parameter.device
    if search_format == "bfloat16" and format_of(place) == "bfloat16":
        with suppress(TypeError, RuntimeError):  # a module that refuses to be copied
            return prepared(network, Precision(place, torch.float32, torch.bfloat16))
    return prepared(network, Precision(place, parameter.dtype, winograd=place.type == "cpu"))


def filled_pass(network: nn.Module, images: Tensor) -> Tensor:
    """Logits of images, in a batch that is filled up to `FEWEST_SLOTS`, so that their bits depend on no other."""
    missing = FEWEST_SLOTS - len(images)
    filled = torch.cat((images, images[:1].expand(missing, -1, -1, -1))) if missing > 0 else images
    logits_BC: Tensor = network(filled.contiguous(memory_format=torch.channels_last))
    return logits_BC[: len(images)]


def inside(x_adv: Tensor, x_nat: Tensor, ball: Ball) -> Tensor:
    """The images in the ball and in [0, 1] in exact arithmetic, moved by rounding errors at most."""
    x_adv = x_adv.clamp(0, 1)
    return look_up("threat_model", ball.threat_model, _INSIDE)(x_adv, x_nat, ball.epsilon)


def outside(x_adv: Tensor, x_nat: Tensor, ball: Ball) -> Tensor:
    """True for images that are not in the ball or not in [0, 1], computed in float64. NaN is outside."""
    away_BN = (x_adv.double() - x_nat.double()).flatten(1)
    length_B: Tensor = torch.linalg.vector_norm(away_BN, NORMS[ball.threat_model].order, dim=1)
    in_range_B = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(dim=1)
    return ~((length_B <= ball.epsilon) & in_range_B)


def _inside_box(x_adv: Tensor, x_nat: Tensor, epsilon: float) -> Tensor:
    low, high = x_nat.double() - epsilon, x_nat.double() + epsilon
    nearest_low, nearest_high = low.to(x_adv.dtype), high.to(x_adv.dtype)
    up, down = torch.full_like(x_adv, torch.inf), torch.full_like(x_adv, -torch.inf)
    inner_low = torch.where(nearest_low.double() < low, nearest_low.nextafter(up), nearest_low)
    inner_high = torch.where(nearest_high.double() > high, nearest_high.nextafter(down), nearest_high)
    return torch.clamp(x_adv, inner_low, inner_high)


def _inside_sphere(x_adv: Tensor, x_nat: Tensor, epsilon: float) -> Tensor:
    away = x_adv.double() - x_nat.double()
    length = torch.linalg.vector_norm(away, dim=(1, 2, 3), keepdim=True)
    moved = x_nat.double() + away * (epsilon / length.clamp(min=epsilon) * _SHRINK)
    return torch.where(length > epsilon, moved.to(x_adv.dtype).clamp(0, 1), x_adv)


_INSIDE: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"Linf": _inside_box, "L2": _inside_sphere}


class _Given(NamedTuple):
    """Arguments that all searches share."""

    network: Logits
    num_classes: int
    ball: Ball
    seed: int


def _apgd(given: _Given, loss: str, stream: Stream, num_steps: int) -> Apgd:
    return Apgd(given.network, loss, given.ball, seed=given.seed, stream=stream, num_steps=num_steps)


def _square(given: _Given, num_queries: int) -> Square:
    return Square(given.network, given.ball, seed=given.seed, num_queries=num_queries)


def _adaptive(given: _Given) -> Adaptive:
    return Adaptive(
        given.network,
        given.ball,
        given.num_classes,
        seed=given.seed,
        start_steps=NUMBERS.start_steps,
        margin_steps=NUMBERS.margin_steps,
    )


_SEARCHES: dict[str, Callable[[_Given], Search[Any]]] = {
    "apgd-ce": lambda given: _apgd(given, "ce", Stream.APGD_CE, STANDARD.apgd),
    "apgd-dlr": lambda given: _apgd(given, "dlr", Stream.APGD_DLR, STANDARD.apgd),
    "apgd-t": lambda given: _apgd(given, "dlr-targeted", Stream.APGD_T, STANDARD.apgd),
    "fab-t": lambda given: FabT(given.network, given.ball, num_steps=STANDARD.fab),
    "square": lambda given: _square(given, STANDARD.square),
    MARGIN: lambda given: _apgd(given, "margin-targeted", Stream.FAST, NUMBERS.target_steps),
    ADAPTIVE: _adaptive,
    FEW_SQUARES: lambda given: _square(given, NUMBERS.queries),
}
"""The attacks by the names of `autoattack.PARTS` and `fast.FAST_PARTS`."""
_RUNS: dict[str, Callable[[int], int]] = {
    **{part: lambda targets: 1 for part in ("apgd-ce", "apgd-dlr", "square", FEW_SQUARES)},
    **{part: lambda targets: targets for part in ("apgd-t", "fab-t")},
    MARGIN: lambda targets: min(NUMBERS.targets, targets),
    ADAPTIVE: lambda targets: NUMBERS.restarts,
}
"""Runs of each on an image that stands, of the number of target classes that there can be."""


@contextmanager
def _gradients_noted() -> Iterator[list[str]]:
    """A list that is not empty once torch was asked for gradients inside."""
    noted: list[str] = []
    kept: list[tuple[str, Any]] = [(name, getattr(torch.autograd, name)) for name in ("grad", "backward")]

    def noting(name: str, function: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            noted.append(name)
            return function(*given, **named)

        return call

    for name, function in kept:
        setattr(torch.autograd, name, noting(name, function))
    try:
        yield noted
    finally:
        for name, function in kept:
            setattr(torch.autograd, name, function)
