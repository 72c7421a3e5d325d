"""Accuracy on natural and on attacked images, measured in full precision and without a trace on the model.

Shape suffixes: B batch, N all samples.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from engine.attacks import autoattack
from engine.attacks.autoattack import AutoAttack
from engine.attacks.masking import MOST_MASKED, MOST_ZEROS
from engine.attacks.pgd import THREAT_MODELS, batch_norm_mode, describe, frozen, pgd, presets
from engine.common.lookup import check_known
from engine.common.stopping import RunFailed, Stop
from engine.evaluation.partial_results import Ledger, Measured
from engine.pipelines.splits import Indexable, limited
from engine.system.distributed import World
from engine.system.precision import full_precision

COLUMNS = {
    "natural": "Natural",
    "fgsm": "FGSM",
    "fgsm-rs": "FGSM-RS",
    "pgd10": "PGD-10",
    "pgd20": "PGD-20",
    "pgd20-dlr": "PGD-20 DLR",
    "cw": "CW-inf",
    "aa": "AA",
}
"""Every name that `evaluate` knows, with its title in a table."""

UNMASKED = "pgd20-dlr"
"""The attack whose loss no factor on the logits changes."""
FEW = 100
"""Below so many images the standard error of an accuracy may exceed 5 percentage points."""

# Rounding alone may carry an image this far out of the ball or the range of images.
_SLACK = 1e-6


@dataclass(frozen=True)
class Result:
    """Samples classified correctly under one attack; description holds the numbers of the attack.

    seconds: of all processes together. zero_gradients, non_finite_gradients: shares of the entries of all the
    attack's gradients; None: it has none. masked: share of the samples that kept their class although most entries
    of their gradients were zero or NaN: the accuracy may be that much too high; None: not known.
    parts: accuracies after each part of an attack that has several. warnings: what makes the accuracy doubtful.
    samples: ascending indices in the data, int64 (n,). verdicts: whether each was classified correctly, bool (n,).
    """

    attack: str
    correct: int
    n: int
    description: str
    seconds: float
    zero_gradients: float | None = None
    non_finite_gradients: float | None = None
    masked: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    samples: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64), repr=False, compare=False)
    verdicts: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool), repr=False, compare=False)

    @property
    def accuracy(self) -> float:
        """Share in [0, 1] of samples classified correctly."""
        return self.correct / self.n

    @property
    def is_masked(self) -> bool:
        """Whether a loss that no factor on the logits changes may find many more images."""
        return self.masked is not None and self.masked > MOST_MASKED

    def as_dict(self) -> dict[str, Any]:
        """All numbers but those of each sample, for JSON."""
        numbers: dict[str, Any] = {"attack": self.attack, "correct": self.correct, "n": self.n}
        numbers |= {"accuracy": self.accuracy, "description": self.description, "seconds": self.seconds}
        numbers |= {"zero_gradients": self.zero_gradients, "non_finite_gradients": self.non_finite_gradients}
        return numbers | {"masked": self.masked, "parts": dict(self.parts), "warnings": list(self.warnings)}


class LabelledImages(Protocol):
    """Images with their labels, as the splits of `engine.pipelines`."""

    @property
    def images(self) -> Tensor | Indexable:
        """uint8 NHWC, in memory or not; or float NCHW in [0, 1]."""

    @property
    def labels(self) -> Tensor:
        """Integers, N."""


def evaluate(
    model: nn.Module,
    data: LabelledImages | tuple[Tensor, Tensor],
    attacks: Iterable[str],
    *,
    epsilon: float = 8 / 255,
    threat_model: str = "Linf",
    batch_size: int = 250,
    limit: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    on_batch: Callable[[str, int, int], object] | None = None,
    stop: Stop | None = None,
    world: World | None = None,
    ledger: Ledger | None = None,
) -> dict[str, Result]:
    """Accuracy of the model on natural images and under each of the attacks, by name in the order given.

    data: (images, labels), images uint8 NHWC or float NCHW in [0, 1]. attacks: keys of `COLUMNS`.
    epsilon, threat_model: the ball of every attack. device: where the model is, unless given.
    limit: that many samples, of every class as equally many as there are, whatever the order of the data; which
    ones depends on the labels alone. None: all.
    on_batch: called with (attack, samples done, samples in all) after each batch; what it raises ends everything.
    stop: whether the user asked to stop, looked at after each batch.
    world: processes that share the batches; each calls this with the same arguments, and all get the results of
    all. The batches are those of one process, so the numbers are.
    ledger: where the result of each batch is kept; what is there already is not measured again.

    Runs in eval mode and in the dtype of the parameters, float32 or float64, without autocast and TF32. Every mode
    and flag and the global random state come back. A random start depends on the seed, the attack and the sample's
    index in data alone, so neither on the batch nor on the limit. AutoAttack draws its numbers batch by batch.

    Raises ValueError for bad arguments, bad data, unknown attacks, and AutoAttack where it is not installed or the
    model has fewer than 4 classes; FloatingPointError where logits are not finite; RunFailed where an attack
    leaves its ball; Interrupted after a stop.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    images_N, labels_N = _checked(data)
    specs = presets(epsilon, threat_model)
    names = check_names(attacks)
    for argument, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        if type(value) is not int or not least <= value < 2**63:
            raise ValueError(f"{argument}: a whole number from {least} on is needed, got {value!r}")
    sample_N = limited(labels_N, limit, 0, "limit")
    parameter = next(model.parameters(), torch.empty(0))
    where, dtype = parameter.device if device is None else _device(device), parameter.dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"model: evaluation runs in float32 or float64, and its parameters are {dtype}")
    world = world or World()

    def crafts(name: str, num_classes: int) -> _Attack:
        if name == "natural":
            return _Attack(name, "no attack", lambda x_nat, labels_B, sample_B: x_nat)
        if name == "aa":
            aa = AutoAttack(model, num_classes, (threat_model, epsilon), seed, world.heartbeat)
            given = f"{aa.description}, {len(sample_N)} images, batch {batch_size}, seed {seed}"
            return _Attack(name, given, lambda x_nat, labels_B, sample_B: aa(x_nat, labels_B), autoattack.PARTS)
        spec, counter = specs[name], zlib.crc32(name.encode())
        return _Attack(
            name,
            describe(spec),
            lambda x_nat, labels_B, sample_B: pgd(
                model, x_nat, labels_B, spec, seed=seed, counter=counter, sample=sample_B
            ),
        )

    with _undisturbed(model, where):

        def batch(sample_B: Tensor) -> tuple[Tensor, Tensor]:
            return batch_of(images_N, labels_N, sample_B, where, dtype)

        num_classes = _classes(model, batch(sample_N[:1])[0], labels_N)
        run = _Run(model, batch, (epsilon, threat_model), on_batch, stop or Stop(), world, ledger)
        wanted = [crafts(name, num_classes) for name in names]  # what is refused is refused before the first batch
        return {attack.name: run.result(attack, sample_N, batch_size) for attack in wanted}


def further(results: Mapping[str, Result]) -> list[str]:
    """The attack that is needed beside these: where gradients were masked, one with another loss."""
    masked = any(result.is_masked for result in results.values())
    return [UNMASKED] if masked and UNMASKED not in results else []


def few_images(n: int) -> str:
    """What so few images say of an accuracy, sqrt(p (1 - p) / n) at p = 1/2; empty where they are enough."""
    if n >= FEW:
        return ""
    points = 50 / math.sqrt(max(n, 1))
    return f"{n} of them: the standard error of an accuracy is up to {points:.0f} percentage points"


def is_chance(accuracy: float, n: int, num_classes: int) -> bool:
    """Whether an accuracy exceeds that of guessing, 1/C, by no more than two of its standard errors."""
    chance = 1 / num_classes
    return accuracy <= chance + 2 * math.sqrt(chance * (1 - chance) / n)


def batch_of(
    images_N: Tensor | Indexable, labels_N: Tensor, sample_B: Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Images as evaluation sees them, BCHW in [0, 1] and channels-last, and their labels, on the device."""
    x_B = images_N[sample_B.to(images_N.device) if isinstance(images_N, Tensor) else sample_B].to(device)
    if x_B.dtype == torch.uint8:
        x_B = x_B.permute(0, 3, 1, 2).to(dtype) / 255
    return x_B.to(dtype, memory_format=torch.channels_last), labels_N[sample_B].to(device)


def check_names(attacks: Iterable[str]) -> list[str]:
    """The names, each once. Raises ValueError for an unknown one, and for AutoAttack where it is not installed."""
    if isinstance(attacks, str) or not isinstance(attacks, Iterable):
        raise ValueError(f"attacks: expected a list of names such as 'pgd20', got {attacks!r:.100}")
    names = []
    for name in attacks:
        if not isinstance(name, str):
            raise ValueError(f"attacks: expected names such as 'pgd20', got {name!r:.100}")
        check_known("attack", name, COLUMNS)
        names.append(name)
    if "aa" in names:
        autoattack.installed()
    return list(dict.fromkeys(names))


# ---------------------------------------------------------------- one attack, batch by batch

Craft = Callable[[Tensor, Tensor, Tensor], "Tensor | autoattack.Outcome"]
"""An attack: (x_nat, labels, sample) -> x_adv, or with what each image stood."""
GetBatch = Callable[[Tensor], tuple[Tensor, Tensor]]


class _Attack(NamedTuple):
    """parts: what an image has to stand, one after the other; each tells of the accuracy after it."""

    name: str
    description: str
    craft: Craft
    parts: tuple[str, ...] = ("all",)


class _Gradients:
    """Counts, on the device, entries of the gradients with respect to what the model is given.

    useless_B: entries that are zero or NaN, which have no sign, of each image of the batch.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.entries = 0
        self.zeros, self.not_finite = torch.zeros(2, dtype=torch.int64, device=device)
        self.useless_B = torch.zeros(size, dtype=torch.int64, device=device)

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Gradients of passes inside count."""
        watching = model.register_forward_pre_hook(self._watch)
        try:
            yield
        finally:
            watching.remove()

    def _watch(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and inputs[0].requires_grad:
            inputs[0].register_hook(self._count)

    def _count(self, gradient: Tensor) -> None:
        useless_B = (~((gradient > 0) | (gradient < 0))).flatten(1).sum(dim=1)
        self.entries += gradient.numel()
        self.zeros += (gradient == 0).sum()
        self.not_finite += (~gradient.isfinite()).sum()
        if len(gradient) == len(self.useless_B):  # AutoAttack's passes are of those images that are left
            self.useless_B += useless_B

    def hidden_B(self) -> Tensor:
        """Images whose gradients were mostly useless: the attack stood still."""
        return self.useless_B * len(self.useless_B) > MOST_ZEROS * self.entries


class _Run:
    """What all attacks of an evaluation share."""

    def __init__(
        self,
        model: nn.Module,
        batch: GetBatch,
        ball: tuple[float, str],
        on_batch: Callable[[str, int, int], object] | None,
        stop: Stop,
        world: World,
        ledger: Ledger | None,
    ) -> None:
        self._model, self._batch, self._ball, self._on_batch = model, batch, ball, on_batch
        self._stop, self._world, self._ledger = stop, world, ledger

    def result(self, attack: _Attack, sample_N: Tensor, batch_size: int) -> Result:
        """The accuracy under an attack. Raises FloatingPointError and RunFailed as `evaluate` does."""
        batches = torch.split(sample_N, batch_size)
        table = _Table([len(sample_B) for sample_B in batches])
        world = self._world
        known = {} if self._ledger is None else world.broadcast_from_main(lambda: self._known(attack))
        if world.is_main:
            for number, values in known.items():
                table.put(number, Measured(*values))
        left = [number for number in range(len(batches)) if number not in known]
        done, total = sum(table.sizes[number] for number in known), len(sample_N)
        for number in left[world.rank :: world.size]:
            measured, lost = self._measure(attack, batches[number])
            table.put(number, measured, lost)
            if lost or not measured.excess <= _SLACK:
                break
            if self._ledger is not None:
                self._ledger.add(attack.name, number, measured)
            done += table.sizes[number] * world.size
            if self._on_batch is not None:
                self._on_batch(attack.name, min(done, total), total)
            world.check(self._stop)
        world.barrier(self._stop)
        return table.gathered(world, attack, sample_N)

    def _known(self, attack: _Attack) -> dict[int, list[Any]]:
        """What is noted, in the plain types that processes tell each other."""
        assert self._ledger is not None
        return {number: list(measured) for number, measured in self._ledger.known(attack.name).items()}

    def _measure(self, attack: _Attack, sample_B: Tensor) -> tuple[Measured, int]:
        """A batch, and how many of its images have logits that are not finite. The device is waited for once."""
        begin = time.perf_counter()
        x_nat, labels_B = self._batch(sample_B)
        gradients = _Gradients(len(sample_B), x_nat.device)
        with gradients.of(self._model):
            crafted = attack.craft(x_nat, labels_B, sample_B.to(x_nat.device))
        x_adv, stood_B, flags = (
            crafted if isinstance(crafted, autoattack.Outcome) else (crafted, torch.zeros_like(labels_B), 0)
        )
        logits_BC = self._model(x_adv.to(x_nat.dtype))
        correct_B = logits_BC.argmax(dim=1) == labels_B
        parts = len(attack.parts)
        survived_B = torch.where(correct_B, parts, stood_B.clamp(max=parts - 1))
        values = (
            (~logits_BC.isfinite().all(dim=1)).sum(),
            _excess(x_adv, x_nat, *self._ball),
            gradients.zeros,
            gradients.not_finite,
            (correct_B & gradients.hidden_B()).sum(),
        )
        row = torch.cat((torch.stack([value.double() for value in values]), survived_B.double())).tolist()
        lost, excess, zeros, not_finite, masked = row[: len(values)]
        survived = "".join(str(int(value)) for value in row[len(values) :])
        seconds = time.perf_counter() - begin
        counts = (gradients.entries, int(zeros), int(not_finite), int(masked), flags)
        return Measured(survived, excess, seconds, *counts), int(lost)


class _Table:
    """By batch: how often it was measured, images with logits that are not finite, and what else was measured."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self._rows = torch.zeros(len(sizes), 1 + len(Measured._fields), dtype=torch.float64)
        self._survived_N = torch.full((sum(sizes),), -1, dtype=torch.int8)

    def put(self, number: int, measured: Measured, lost: int = 0) -> None:
        """Enter a batch."""
        survived, *others = measured
        self._rows[number] = torch.tensor((1, lost, *others))
        of_batch_B = self._survived_N.split(list(self.sizes))[number]
        of_batch_B.copy_(torch.tensor([int(digit) for digit in survived]))

    def gathered(self, world: World, attack: _Attack, sample_N: Tensor) -> Result:
        """The result of all batches of all processes."""
        times_B, lost_B, excess_B, *sums = world.gather(self._rows).sum(0).unbind(1)
        survived_N = world.gather(self._survived_N).amax(0)
        name, n = attack.name, len(sample_N)
        if lost := int(lost_B.sum()):
            measured = int((survived_N >= 0).sum())
            raise FloatingPointError(
                f"{name}: the logits of {lost:,} of {measured:,} images are NaN or infinite; no result"
            )
        if not (excess_B <= _SLACK).all():
            raise RunFailed(f"{name}: an image lies {excess_B.max():g} outside the ball or [0, 1]; no result")
        if not (times_B == 1).all():
            raise RunFailed(f"{name}: a batch was measured {times_B.tolist()} times; no result")
        seconds, entries, zeros, not_finite, masked = (float(column_B.sum()) for column_B in sums[:-1])
        stood = [int((survived_N > part).sum()) for part in range(len(attack.parts))]
        result = Result(
            attack=name,
            correct=stood[-1],
            n=n,
            description=attack.description,
            seconds=seconds,
            zero_gradients=zeros / entries if entries else None,
            non_finite_gradients=not_finite / entries if entries else None,
            masked=masked / n if entries and len(attack.parts) == 1 else None,
            parts={part: count / n for part, count in zip(attack.parts, stood, strict=True) if len(stood) > 1},
            samples=sample_N,
            verdicts=survived_N == len(attack.parts),
        )
        flags = reduce(or_, map(int, sums[-1].tolist()))
        of_parts = autoattack.complaints(flags, stood) if result.parts else ()
        return replace(result, warnings=(*_doubts(result), *of_parts))


def _doubts(result: Result) -> Iterator[str]:
    """What the gradients say against an accuracy."""
    name = result.attack
    if result.is_masked:
        yield (
            f"{name}: {result.masked:.1%} of the images kept their class although their gradient was zero "
            f"(limit {MOST_MASKED:.0%}): the accuracy may be that much too high"
        )
    elif (result.zero_gradients or 0) > MOST_ZEROS and result.masked is None:
        yield f"{name}: {result.zero_gradients:.1%} of its gradients are zero (limit {MOST_ZEROS:.0%})"
    if result.non_finite_gradients:
        yield f"{name}: {result.non_finite_gradients:.2%} of its gradients are not finite"


# ---------------------------------------------------------------- what is refused


def _checked(data: LabelledImages | tuple[Tensor, Tensor]) -> tuple[Tensor | Indexable, Tensor]:
    """Images as they are, and labels as int64 on the CPU."""
    pair: Any = data if isinstance(data, tuple) else (getattr(data, "images", None), getattr(data, "labels", None))
    if len(pair) != 2 or any(part is None for part in pair):
        raise ValueError(
            f"data: expected (images, labels), or an object with .images and .labels, got {type(data).__name__}"
        )
    images, labels = pair
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels: expected integers of shape (N,) in a tensor, got {type(labels).__name__}")
    if labels.dim() != 1 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(f"labels: expected integers of shape (N,), got {labels.dtype} {tuple(labels.shape)}")
    labels = labels.long().cpu()
    if isinstance(images, Tensor):
        _check_images(images, len(labels))
    elif not len(labels):
        raise ValueError("data: there is nothing to evaluate in 0 images")
    else:
        try:
            first = images[torch.zeros(1, dtype=torch.int64)]
        except (TypeError, IndexError, KeyError):
            first = None
        if not isinstance(first, Tensor) or first.dim() != 4:
            raise ValueError(f"images: expected a tensor, or tensors by index, got {type(images).__name__}")
    if int(labels.min()) < 0:
        raise ValueError(f"labels: expected 0 <= label, got {int(labels.min())}")
    return images, labels


def _check_images(images: Tensor, count: int) -> None:
    if images.dim() != 4 or not (images.dtype == torch.uint8 or images.dtype.is_floating_point):
        raise ValueError(
            f"images: expected uint8 (N, H, W, C) or float (N, C, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    if len(images) != count:
        raise ValueError(f"data: {len(images)} images and {count} labels")
    if not images.numel():
        raise ValueError(f"data: there is nothing to evaluate in images of shape {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        low, high = (float(bound) for bound in images.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"images: floats must lie in [0, 1], got {low:g}..{high:g}")


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: {device!r} is not known; known: cpu, cuda, cuda:N") from None


def _classes(model: nn.Module, x_1: Tensor, labels_N: Tensor) -> int:
    """How many the model tells apart, by an image. Raises ValueError where its output or the labels do not fit."""
    logits = model(x_1)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model: expected logits of shape (B, C), got {got}")
    if int(labels_N.max()) >= logits.shape[1]:
        raise ValueError(f"labels: up to {int(labels_N.max())}, and the model has {logits.shape[1]} classes")
    return logits.shape[1]


def _excess(x_adv: Tensor, x_nat: Tensor, epsilon: float, threat_model: str) -> Tensor:
    """How far the worst image lies outside the ball or the range [0, 1]; NaN where a pixel is."""
    distance_B = torch.linalg.vector_norm((x_adv - x_nat).flatten(1), THREAT_MODELS[threat_model].order, dim=1)
    outside = (x_adv - x_adv.clamp(0, 1)).abs().amax()
    return torch.maximum(distance_B.amax() - epsilon, outside)


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, no gradient, full float32 precision inside; everything comes back afterwards."""
    with (
        batch_norm_mode(model, "eval"),
        frozen(model),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        full_precision(),
    ):
        yield
