"""AutoAttack (Croce and Hein, 2020) of the package that is installed, one of its attacks after the other.

Shape suffix: B batch.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.attacks.pgd import NORMS
from engine.common import optional

NO_ATTACK = "natural"
WHOLE, PACKAGE, ROUNDED = "aa", ":package", ":tf32"
"""Name of the whole, and what follows it where the package is to run it, or where the search may be in TF32."""
AA_PARTS = (NO_ATTACK, "apgd-ce", "apgd-t", "fab-t", "square")
"""No attack, and those of version "standard", in the order in which an image has to stand them."""
WITHOUT_GRADIENTS = ("square",)
"""Those that need logits alone."""


class PackagePart(NamedTuple):
    """An attack of the package. least_classes: to be defined. numbers: in words, {targets} for the classes."""

    title: str
    least_classes: int
    numbers: str
    source: str = "Croce and Hein (2020)"


_APGD = "100 steps, the first of 2 epsilon, from one random start"
PARTS = {
    "apgd-ce": PackagePart("APGD-CE", 2, f"{_APGD}, cross-entropy"),
    "apgd-dlr": PackagePart("APGD-DLR", 3, f"{_APGD}, DLR"),
    "apgd-t": PackagePart("APGD-T", 4, f"{_APGD} for each of {{targets}}, targeted DLR"),
    "fab-t": PackagePart(
        "FAB-T", 2, "100 steps for each of {targets}, smallest distance", "Croce and Hein (2020)"
    ),
    "square": PackagePart("Square", 2, "5,000 queries, margin, no gradient", "Andriushchenko et al. (2020)"),
}
"""The attacks of the package that serve alone or in AutoAttack, with the numbers of version "standard"."""


class Flag(NamedTuple):
    """A check of the package: words of its warning, and ours."""

    phrase: str
    meaning: str


FLAGS = {
    "random": Flag("randomized defense", "the same image gets other logits each time"),
    "probabilities": Flag("probability distribution", "the network gives probabilities, and logits are needed"),
    "dynamic": Flag("dynamic defense", "the network computes gradients as it classifies"),
    "zero_gradients": Flag(
        "zero gradient", "there are images whose gradient of the DLR loss or of the margin is zero"
    ),
}
"""The checks of the package, but Square's: that is of all images together (`complaints`)."""

# Package -> arguments that keep it quiet, and its name of the batch size.
_PACKAGES: dict[str, tuple[dict[str, object], str]] = {
    "pyautoattack": ({}, "batch_size"),
    "autoattack": ({"verbose": False}, "bs"),
}
_LOGGER = "auto-attack"
# The package's limit, and what one image alone says nothing of.
_MOST_BY_SQUARE, _FEWEST_BY_SQUARE = 0.002, 2


class Outcome(NamedTuple):
    """Attacked batch. x_adv: BCHW. survived_B: int8, number of parts stood. flags: a bit for each of `FLAGS`."""

    x_adv: Tensor
    survived_B: Tensor
    flags: int


class PackagedAttack:
    """Attacks of version "standard", one after the other; images are attacked in float32.

    parts: as `defined_parts` gives them. There are as many target classes as there can be, at most 9. The network
    gets images of the dtype of those that are given.
    heartbeat: called in every pass, since a batch may take hours.
    Raises ValueError where no package has them.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        ball: tuple[str, float],
        seed: int,
        heartbeat: Callable[[], None],
        parts: Sequence[str] = AA_PARTS,
    ) -> None:
        self._package, self._module = installed()
        self._parts, self._targets = parts, count_targets(num_classes)
        self._threat_model, self._epsilon = ball
        self._seed = seed
        self._model, self._heartbeat = model, heartbeat

    def __call__(self, x_nat: Tensor, labels_B: Tensor) -> Outcome:
        """Attack a batch: each part gets the images that stood those before, as they were."""
        quiet, size_argument = _PACKAGES[self._package]
        # It views gradients as rows, and they take the strides of the images.
        images = x_nat.float().contiguous()
        logits = partial(self._logits, x_nat.dtype)
        with _heard(self._module) as warnings:
            attack = self._module.AutoAttack(
                logits,
                norm=self._threat_model,
                eps=self._epsilon,
                version="standard",
                seed=self._seed,
                device=images.device,
                **quiet,
            )
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = self._targets
            x_adv = images.clone()
            survived_B = torch.zeros_like(labels_B, dtype=torch.int8)
            left = torch.arange(len(images), device=images.device)
            for part in self._parts:
                if part != NO_ATTACK:
                    attack.attacks_to_run = [part]
                    size = {size_argument: len(left)}
                    out = attack.run_standard_evaluation(images[left], labels_B[left], **size)
                    x_adv[left] = out[0] if isinstance(out, tuple) else out
                left = left[logits(x_adv[left]).argmax(dim=1) == labels_B[left]]
                survived_B[left] += 1
                if not len(left):
                    break
        heard = (any(flag.phrase in text for text in warnings) for flag in FLAGS.values())
        return Outcome(x_adv, survived_B, sum(bit << place for place, bit in enumerate(heard)))

    def _logits(self, dtype: torch.dtype, images: Tensor) -> Tensor:
        self._heartbeat()
        out: Tensor = self._model(images.to(dtype))
        return out.float()


def count_targets(num_classes: int) -> int:
    """Target classes of the targeted attacks: the others, at most 9."""
    return min(9, num_classes - 1)


def defined_parts(num_classes: int) -> tuple[str, ...]:
    """Those of `AA_PARTS` whose loss is defined for so many classes."""
    return tuple(part for part in AA_PARTS if part == NO_ATTACK or PARTS[part].least_classes <= num_classes)


def describe_autoattack(num_classes: int, threat_model: str, epsilon: float) -> str:
    """Parts, target classes and ball in words; where a part is not defined, that too, and never "standard"."""
    targets = _targets(num_classes)
    titles = {part: PARTS[part].title for part in AA_PARTS[1:]}
    parts = defined_parts(num_classes)
    if parts == AA_PARTS:
        what = f"standard ({titles['apgd-ce']}, {titles['apgd-t']} and {titles['fab-t']} with {targets}, Square)"
    else:
        left = [f"{titles[part]}{f' with {targets}' * (part == 'fab-t')}" for part in parts if part in titles]
        without = ", ".join(title for part, title in titles.items() if part not in parts)
        what = f"without {without}, which {num_classes} classes do not define ({', '.join(left)})"
    return f"AutoAttack {what}, {_ball(threat_model, epsilon)}"


def describe_part(part: str, num_classes: int, threat_model: str, epsilon: float) -> str:
    """All numbers of one of `PARTS`."""
    return f"{_ball(threat_model, epsilon)}, {PARTS[part].numbers.format(targets=_targets(num_classes))}"


def _targets(num_classes: int) -> str:
    count = count_targets(num_classes)
    return f"{count} target class{'es' * (count != 1)}"


def _ball(threat_model: str, epsilon: float) -> str:
    norm = NORMS[threat_model]
    return f"{norm.name}, epsilon {norm.length(epsilon)}"


def package_version() -> tuple[str, str | None]:
    """Name and version of the package that has AutoAttack. Raises ValueError as `installed` does."""
    package, _ = installed()
    return package, optional.version(package)


def raised(flags: int) -> tuple[str, ...]:
    """Those of `FLAGS` whose bits are set."""
    return tuple(name for place, name in enumerate(FLAGS) if flags >> place & 1)


def complaints(name: str, flags: int, stood: Mapping[str, int]) -> list[str]:
    """Warnings of the checks, in words. stood: images that stood each part of the attack and those before."""
    found = [FLAGS[flag].meaning for flag in raised(flags)]
    if len(stood) > 2 and [*stood][-1].startswith("square"):
        n, *_, before, square = stood.values()
        by_square = before - square
        if by_square >= _FEWEST_BY_SQUARE and by_square > _MOST_BY_SQUARE * n:
            found.append(
                f"Square, which needs no gradient, broke {by_square} of {n} images that all others had left"
            )
    return [f"{name}: {text}; the accuracy may be too high" for text in found]


def installed(name: str = "aa") -> tuple[str, ModuleType]:
    """The package that has AutoAttack. Raises ValueError, for the attack of that name, where there is none."""
    module = optional.load(*_PACKAGES, missing=f"{name}: AutoAttack is not installed; pip install pyautoattack")
    return module.__name__, module


class _Handler(logging.Handler):
    def __init__(self, texts: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._texts = texts

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(record.getMessage())


@contextmanager
def _heard(module: Any) -> Iterator[list[str]]:
    """Warnings of the package inside, by its log or its output; those of no check go to standard error."""
    texts: list[str] = []
    printed, logger, trace = StringIO(), logging.getLogger(_LOGGER), sys.gettrace()
    handler, propagates = _Handler(texts), logger.propagate
    if counts := getattr(getattr(module, "checks", None), "funcs", None):
        counts.update(dict.fromkeys(counts, 0))  # of earlier networks: the package never resets them
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with redirect_stdout(printed):
            yield texts
    finally:
        sys.settrace(trace)  # the check for dynamic networks ends any tracing
        logger.removeHandler(handler)
        logger.propagate = propagates
        texts += printed.getvalue().splitlines()
        for text in dict.fromkeys(texts):
            if not any(flag.phrase in text for flag in FLAGS.values()):
                print(text, file=sys.stderr)  # noqa: T201
