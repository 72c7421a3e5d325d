"""Accuracy on natural and on attacked images, measured in full precision and without a trace on the model.

Shape suffixes: B batch, N all samples.
"""

from __future__ import annotations

import importlib
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn

from engine.attack import batch_norm_mode, describe, frozen, in_255, pgd, presets
from engine.config import nearest
from engine.distributed import World
from engine.ledger import Ledger, Measured
from engine.pipelines.splits import Indexable, limited
from engine.precision import full_precision
from engine.stopping import Stop

COLUMNS = {
    "natural": "Natural",
    "fgsm": "FGSM",
    "fgsm-rs": "FGSM-RS",
    "pgd10": "PGD-10",
    "pgd20": "PGD-20",
    "cw": "CW-inf",
    "aa": "AA",
}
"""Every name that `evaluate` knows, with its title in a table."""

# Rounding alone may carry an image this far out of the ball or the range of images.
_SLACK = 1e-6
# Package of AutoAttack -> arguments that keep it quiet, and its name of the batch size.
_AUTO_ATTACKS: dict[str, tuple[dict[str, object], str]] = {
    "pyautoattack": ({}, "batch_size"),
    "autoattack": ({"verbose": False}, "bs"),
}

Craft = Callable[[Tensor, Tensor, Tensor], Tensor]
"""An attack: (x_nat, labels, sample) -> x_adv."""


@dataclass(frozen=True)
class Result:
    """Samples classified correctly under one attack; description holds the numbers of the attack.

    seconds: of all processes together.
    """

    attack: str
    correct: int
    n: int
    description: str
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share in [0, 1] of samples classified correctly."""
        return self.correct / self.n

    def as_dict(self) -> dict[str, object]:
        """All numbers, for JSON."""
        return asdict(self) | {"accuracy": self.accuracy}


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

    Raises ValueError for bad data, unknown attacks, and AutoAttack where it is not installed or the model has
    fewer than 4 classes; RuntimeError where an attack leaves its ball; Interrupted after a stop.
    """
    world, stop = world or World(), stop or Stop()
    images_N, labels_N = _checked(data)
    specs = presets(epsilon, threat_model)
    names = check_names(attacks)
    if batch_size < 1:
        raise ValueError(f"batch_size: at least 1 is needed, got {batch_size}")
    sample_N = limited(labels_N, limit, 0, "limit")
    total = len(sample_N)

    parameter = next(model.parameters(), torch.empty(0))
    where, dtype = parameter.device if device is None else torch.device(device), parameter.dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"model: evaluation runs in float32 or float64, and its parameters are {dtype}")

    def craft(name: str) -> tuple[str, Craft]:
        if name == "natural":
            return "no attack", lambda x_nat, labels_B, sample_B: x_nat
        if name == "aa":
            given, attack = _auto_attack(model, num_classes, epsilon, threat_model, seed, world.beat)
            return f"{given}, {total} images, batch {batch_size}, seed {seed}", attack
        spec, counter = specs[name], zlib.crc32(name.encode())
        return describe(spec), lambda x_nat, labels_B, sample_B: pgd(
            model, x_nat, labels_B, spec, seed=seed, counter=counter, sample=sample_B
        )

    results = {}
    with _undisturbed(model, where):
        num_classes = model(batch_of(images_N, labels_N, sample_N[:1], where, dtype)[0]).shape[1]
        if int(labels_N.max()) >= num_classes:
            raise ValueError(f"labels: up to {int(labels_N.max())}, and the model has {num_classes} classes")
        for name, (description, attack) in {name: craft(name) for name in names}.items():
            batches = torch.split(sample_N, batch_size)
            known = {} if ledger is None else world.from_main(partial(ledger.known, name))
            left = [number for number in range(len(batches)) if number not in known]
            done = sum(len(batches[number]) for number in known)
            # By batch: how often it was measured, and what was measured. The main process brings what is known.
            table = torch.zeros(len(batches), 1 + len(Measured._fields), dtype=torch.float64)
            for number, measured in known.items() if world.is_main else ():
                table[number] = torch.tensor((1, *measured))
            for number in left[world.rank :: world.size]:
                begin, sample_B = time.perf_counter(), batches[number]
                x_nat, labels_B = batch_of(images_N, labels_N, sample_B, where, dtype)
                x_adv = attack(x_nat, labels_B, sample_B.to(where))
                correct = (model(x_adv.to(dtype)).argmax(dim=1) == labels_B).sum()
                excess = _excess(x_adv, x_nat, epsilon, threat_model)
                count, farthest = torch.stack((correct.to(excess.dtype), excess)).tolist()
                measured = Measured(int(count), farthest, time.perf_counter() - begin)
                table[number] = torch.tensor((1, *measured))
                if ledger is not None:
                    ledger.add(name, number, measured)
                done += len(sample_B) * world.size
                if on_batch is not None:
                    on_batch(name, min(done, total), total)
                world.check(stop)
            world.meet(stop)
            times_B, correct_B, excess_B, seconds_B = world.gather(table).sum(0).unbind(1)
            if not (times_B == 1).all():
                raise RuntimeError(f"{name}: a batch was measured {times_B.tolist()} times; no result")
            if not (excess_B <= _SLACK).all():
                raise RuntimeError(
                    f"{name}: an image lies {excess_B.max():g} outside the ball or [0, 1]; no result"
                )
            results[name] = Result(name, int(correct_B.sum()), total, description, float(seconds_B.sum()))
    return results


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
    names = list(dict.fromkeys(attacks))
    for name in names:
        if name not in COLUMNS:
            raise ValueError(f"attack: {name!r} is not known; {nearest(name, COLUMNS)}")
    if "aa" in names:
        _installed()
    return names


def _checked(data: LabelledImages | tuple[Tensor, Tensor]) -> tuple[Tensor | Indexable, Tensor]:
    """Images as they are, and labels as int64 on the CPU."""
    images, labels = data if isinstance(data, tuple) else (data.images, data.labels)
    if not isinstance(images, Tensor):
        return images, labels
    if images.dim() != 4 or not (images.dtype == torch.uint8 or images.dtype.is_floating_point):
        raise ValueError(
            f"images: expected uint8 (N, H, W, C) or float (N, C, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    if labels.dim() != 1 or labels.dtype.is_floating_point:
        raise ValueError(f"labels: expected integers of shape (N,), got {labels.dtype} {tuple(labels.shape)}")
    if len(images) != len(labels):
        raise ValueError(f"data: {len(images)} images and {len(labels)} labels")
    if not images.numel():
        raise ValueError(f"data: there is nothing to evaluate in images of shape {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        low, high = (float(bound) for bound in images.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"images: floats must lie in [0, 1], got {low:g}..{high:g}")
    labels = labels.long().cpu()
    if int(labels.min()) < 0:
        raise ValueError(f"labels: expected 0 <= label, got {int(labels.min())}")
    return images, labels


def _excess(x_adv: Tensor, x_nat: Tensor, epsilon: float, threat_model: str) -> Tensor:
    """How far the worst image lies outside the ball or the range [0, 1]; NaN where a pixel is."""
    order = torch.inf if threat_model == "Linf" else 2
    distance_B = torch.linalg.vector_norm((x_adv - x_nat).flatten(1), order, dim=1)
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


def _auto_attack(
    model: nn.Module, num_classes: int, epsilon: float, threat_model: str, seed: int, beat: Callable[[], None]
) -> tuple[str, Craft]:
    """Standard AutoAttack (Croce and Hein, 2020), with as many target classes as there are, at most 9.

    beat: called in every pass, since a batch may take hours. Batches are attacked one after the other.
    Raises ValueError where no package has it, and below 4 classes.
    """
    if num_classes < 4:
        raise ValueError(f"aa: the targeted loss of AutoAttack needs 4 classes, and the model has {num_classes}")
    package, module = _installed()
    quiet, size_argument = _AUTO_ATTACKS[package]
    targets = min(9, num_classes - 1)
    dtype = next(model.parameters(), torch.empty(0)).dtype

    def logits(images: Tensor) -> Tensor:
        beat()
        out: Tensor = model(images.to(dtype))
        return out.float()  # AutoAttack computes in float32

    def craft(x_nat: Tensor, labels_B: Tensor, sample_B: Tensor) -> Tensor:
        auto_attack = module.AutoAttack(
            logits, norm=threat_model, eps=epsilon, version="standard", seed=seed, device=x_nat.device, **quiet
        )
        auto_attack.apgd_targeted.n_target_classes = auto_attack.fab.n_target_classes = targets
        # It views gradients as rows, and they take the strides of the images.
        images = x_nat.float().contiguous()
        trace = sys.gettrace()
        try:
            with redirect_stdout(sys.stderr):
                out = auto_attack.run_standard_evaluation(images, labels_B, **{size_argument: len(images)})
        finally:
            sys.settrace(trace)  # its check for dynamic models ends any tracing
        x_adv: Tensor = out[0] if isinstance(out, tuple) else out
        return x_adv

    ball = f"L-inf, epsilon {in_255(epsilon)}" if threat_model == "Linf" else f"L2, epsilon {epsilon:g}"
    parts = f"APGD-CE, APGD-T and FAB-T with {targets} target classes, Square"
    return f"AutoAttack standard ({parts}), {ball}, {package} {metadata.version(package)}", craft


def _installed() -> tuple[str, ModuleType]:
    for package in _AUTO_ATTACKS:
        try:
            return package, importlib.import_module(package)
        except ImportError:
            continue
    raise ValueError("aa: AutoAttack is not installed; pip install pyautoattack")
