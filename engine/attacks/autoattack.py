"""AutoAttack (Croce and Hein, 2020) of the package that is installed, one of its attacks after the other.

Shape suffix: B batch.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.attacks.pgd import NORMS
from engine.common import optional

LEAST_CLASSES = 4
AA_PARTS = ("natural", "apgd-ce", "apgd-t", "fab-t", "square")
"""No attack, and those of version "standard", in the order in which an image has to stand them."""


class Flag(NamedTuple):
    """A check of the package: words of its warning, and ours."""

    phrase: str
    meaning: str


FLAGS = {
    "random": Flag("randomized defense", "the same image gets other logits each time"),
    "probabilities": Flag("probability distribution", "the network gives probabilities, and logits are needed"),
    "dynamic": Flag("dynamic defense", "the network computes gradients as it classifies"),
    "zero_gradients": Flag("zero gradient", "there are images whose gradient of the DLR loss is zero"),
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
    """Attacked batch. x_adv: BCHW. survived_B: int8, number of `AA_PARTS` stood. flags: a bit for each flag."""

    x_adv: Tensor
    survived_B: Tensor
    flags: int


class AutoAttack:
    """Version "standard", with as many target classes as there are, at most 9; images are attacked in float32.

    heartbeat: called in every pass, since a batch may take hours.
    Raises ValueError where no package has it, and below 4 classes.
    """

    def __init__(
        self, model: nn.Module, num_classes: int, ball: tuple[str, float], seed: int, heartbeat: Callable[[], None]
    ) -> None:
        check_classes(num_classes)
        self._package, self._module = installed()
        self._targets = min(9, num_classes - 1)
        self._threat_model, self._epsilon = ball
        self._seed = seed
        dtype = next(model.parameters(), torch.empty(0)).dtype

        def logits(images: Tensor) -> Tensor:
            heartbeat()
            out: Tensor = model(images.to(dtype))
            return out.float()

        self._logits = logits

    @property
    def description(self) -> str:
        """Parts, target classes, ball and package in words."""
        parts = f"APGD-CE, APGD-T and FAB-T with {self._targets} target classes, Square"
        norm = NORMS[self._threat_model]
        package = f"{self._package} {optional.version(self._package)}"
        return f"AutoAttack standard ({parts}), {norm.name}, epsilon {norm.length(self._epsilon)}, {package}"

    def __call__(self, x_nat: Tensor, labels_B: Tensor) -> Outcome:
        """Attack a batch: each part gets the images that stood those before, as they were."""
        quiet, size_argument = _PACKAGES[self._package]
        # It views gradients as rows, and they take the strides of the images.
        images = x_nat.float().contiguous()
        with _heard(self._module) as warnings:
            attack = self._module.AutoAttack(
                self._logits,
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
            for part in AA_PARTS:
                if part != AA_PARTS[0]:
                    attack.attacks_to_run = [part]
                    size = {size_argument: len(left)}
                    out = attack.run_standard_evaluation(images[left], labels_B[left], **size)
                    x_adv[left] = out[0] if isinstance(out, tuple) else out
                left = left[self._logits(x_adv[left]).argmax(dim=1) == labels_B[left]]
                survived_B[left] += 1
                if not len(left):
                    break
        raised = (any(flag.phrase in text for text in warnings) for flag in FLAGS.values())
        return Outcome(x_adv, survived_B, sum(bit << place for place, bit in enumerate(raised)))


def check_classes(num_classes: int) -> None:
    """Raise ValueError where AutoAttack is not defined."""
    if num_classes < LEAST_CLASSES:
        raise ValueError(
            f"aa: the targeted loss of AutoAttack needs {LEAST_CLASSES} classes, and the model has {num_classes}"
        )


def complaints(flags: int, stood: Sequence[int]) -> list[str]:
    """Warnings of the checks, in words. stood: images that stood each of `AA_PARTS` and those before."""
    found = [flag.meaning for place, flag in enumerate(FLAGS.values()) if flags >> place & 1]
    *_, before, square = stood
    by_square, n = before - square, stood[0]
    if by_square >= _FEWEST_BY_SQUARE and by_square > _MOST_BY_SQUARE * n:
        found.append(f"Square, which needs no gradient, broke {by_square} of {n} images that all others had left")
    return [f"aa: {text}; the accuracy may be too high" for text in found]


def installed() -> tuple[str, ModuleType]:
    """The package that has AutoAttack. Raises ValueError where there is none."""
    module = optional.load(*_PACKAGES, missing="aa: AutoAttack is not installed; pip install pyautoattack")
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
