"""Kinds of attacks in an evaluation: each with its title, its numbers in words, its identity, and its making.

Shape suffix: B batch.
"""

from __future__ import annotations

import hashlib
import inspect
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.attacks.auto.search import Ball
from engine.attacks.auto.standard import AttackBatch, AutoAttack
from engine.attacks.autoattack import (
    AA_PARTS,
    NO_ATTACK,
    PACKAGE,
    PARTS,
    WHOLE,
    WITHOUT_GRADIENTS,
    Outcome,
    PackagedAttack,
    defined_parts,
    describe_autoattack,
    describe_part,
    installed,
    package_version,
)
from engine.attacks.fast import FAST_PARTS, NUMBERS, describe_fast
from engine.attacks.pgd import NORMS, batch_norm_mode, describe, frozen, pgd, preset
from engine.common.stopping import RunFailed
from engine.config import KEYS
from engine.models.weights import LoadedModel, load_model, weights_sha256

Perturb = Callable[[Tensor, Tensor, Tensor], Tensor | Outcome]
"""(x_nat, labels, sample) -> x_adv, or an outcome of the packaged attacks; sample: indices in the data."""
AttackFunction = Callable[..., Tensor]
"""f(model, x, y) -> x_adv, and by keyword those of `KEYWORDS` that it names."""
KEYWORDS = ("epsilon", "threat_model", "seed", "sample")


def _no_heartbeat() -> None:
    """Tell nobody: there is one process."""


class Task(NamedTuple):
    """Network to attack, and the setting. ball: epsilon, threat model.

    class_names: of the data, where they are told. heartbeat: called in passes of attacks that take hours.
    counter: of random starts; None: a hash of the attack's name.
    """

    model: nn.Module
    num_classes: int
    ball: tuple[float, str]
    seed: int = 0
    class_names: tuple[str, ...] | None = None
    heartbeat: Callable[[], None] = _no_heartbeat
    counter: int | None = None


@dataclass(frozen=True, eq=False)
class EvaluationAttack(ABC):
    """An attack of an evaluation.

    name: as it is asked for. title: in a table. source: who published it, when. least_classes, threat_models: for
    which it is defined.
    """

    name: str
    title: str
    source: str
    least_classes: int = 2
    threat_models: tuple[str, ...] = tuple(NORMS)

    @property
    def takes_whole_batches(self) -> bool:
        """True if every gradient is of all images of the batch, in their order."""
        return False

    @property
    def gradients(self) -> int | None:
        """Passes with a gradient over every image of a batch; None: that depends on the images, or is unknown."""
        return None

    @property
    def takes_any_form(self) -> bool:
        """False if it may look into the network, and so gets it with the layers that it has."""
        return True

    @property
    def needs_gradients(self) -> bool:
        """True if it differentiates the network that is attacked."""
        return True

    @abstractmethod
    def numbers(self, num_classes: int, ball: tuple[float, str]) -> str:
        """All its numbers in words."""

    @abstractmethod
    def parameters(self, task: Task, batch_size: int) -> dict[str, Any]:
        """Everything of the attack that decides its result, for JSON."""

    @abstractmethod
    def make(self, task: Task) -> Perturb:
        """The attack on a network. Raises ValueError where it cannot be made."""

    def describe(self, task: Task, size: str) -> str:
        """Numbers in words with those of the task on which they depend. size: images and batch."""
        return self.numbers(task.num_classes, task.ball)

    def parts(self, num_classes: int) -> tuple[str, ...]:
        """Steps that an image has to survive, in order."""
        return ("all",)

    def title_of(self, parts: Collection[str]) -> str:
        """Title of a result, in which these parts were run."""
        return self.title

    def crafts_on(self, task: Task) -> nn.Module:
        """The network whose gradients it takes."""
        return task.model

    def notes(self, task: Task) -> tuple[str, ...]:
        """Sentences for the user to read before it begins."""
        return ()

    def check_installed(self) -> None:  # noqa: B027  # most need nothing
        """Raise ValueError where a package or a file that it needs is not there."""

    def is_defined(self, num_classes: int, threat_model: str) -> bool:
        """True if it is defined for so many classes and for the threat model."""
        return num_classes >= self.least_classes and threat_model in self.threat_models


class NoAttack(EvaluationAttack):
    """The images as they are."""

    @property
    def gradients(self) -> int:
        return 0

    @property
    def needs_gradients(self) -> bool:
        return False

    def numbers(self, num_classes: int, ball: tuple[float, str]) -> str:
        return "no attack"

    def parameters(self, task: Task, batch_size: int) -> dict[str, Any]:
        return {}

    def make(self, task: Task) -> Perturb:
        return lambda x_nat, labels_B, sample_B: x_nat


class Preset(EvaluationAttack):
    """An attack by `pgd`, of a name that `preset` knows. Its random starts depend on seed, name and sample."""

    @property
    def gradients(self) -> int:
        return preset(self.name, 1.0).num_steps

    @property
    def takes_whole_batches(self) -> bool:
        return True

    def numbers(self, num_classes: int, ball: tuple[float, str]) -> str:
        return describe(preset(self.name, *ball))

    def parameters(self, task: Task, batch_size: int) -> dict[str, Any]:
        written = preset(self.name, *task.ball)
        default = type(written)().model_dump(mode="json")
        # A key that is younger than the first reports stands in one only where it matters.
        return {
            key: value
            for key, value in written.model_dump(mode="json").items()
            if value != default[key] or not KEYS[f"attack.{key}"].later
        }

    def make(self, task: Task) -> Perturb:
        spec = preset(self.name, *task.ball)
        counter = zlib.crc32(self.name.encode()) if task.counter is None else task.counter
        return lambda x_nat, labels_B, sample_B: pgd(
            task.model, x_nat, labels_B, spec, seed=task.seed, counter=counter, sample=sample_B
        )


class AutoAttackPart(EvaluationAttack):
    """One of `autoattack.PARTS`, on the images that are classified correctly. It depends on no batch."""

    search_format = "float32"

    @property
    def needs_gradients(self) -> bool:
        return self.name not in WITHOUT_GRADIENTS

    def numbers(self, num_classes: int, ball: tuple[float, str]) -> str:
        return describe_part(self.name, num_classes, ball[1], ball[0])

    def parts(self, num_classes: int) -> tuple[str, ...]:
        return (NO_ATTACK, self.name)

    def describe(self, task: Task, size: str) -> str:
        return f"{self.numbers(task.num_classes, task.ball)}, {size}, seed {task.seed}"

    def parameters(self, task: Task, batch_size: int) -> dict[str, Any]:
        return _version(self.parts(task.num_classes), task.ball) | self._own_search()

    def on(self, task: Task) -> AutoAttack:
        """Its attacks on the network."""
        epsilon, threat_model = task.ball
        return AutoAttack(
            task.model,
            task.num_classes,
            Ball(threat_model, epsilon),
            seed=task.seed,
            heartbeat=task.heartbeat,
            search_format=self.search_format,
        )

    def _own_search(self) -> dict[str, str]:
        return {"implementation": "engine", "search_format": self.search_format}

    def make(self, task: Task) -> Perturb:
        attack, parts = self.on(task), self.parts(task.num_classes)
        return lambda x_nat, labels_B, sample_B: _attacked(attack, parts, Images(x_nat, labels_B, sample_B))


class WholeAutoAttack(AutoAttackPart):
    """Version "standard"; for few classes those of its parts that are defined, and named so."""

    def numbers(self, num_classes: int, ball: tuple[float, str]) -> str:
        return describe_autoattack(num_classes, ball[1], ball[0])

    def parts(self, num_classes: int) -> tuple[str, ...]:
        return defined_parts(num_classes)

    def title_of(self, parts: Collection[str]) -> str:
        without = ", ".join(PARTS[part].title for part in AA_PARTS[1:] if part not in parts)
        return f"{self.title} without {without}" if without else self.title


class RoundedAutoAttack(WholeAutoAttack):
    """The same, on GPUs its search in TF32, as torch has it by default; every hit is verified in float32."""

    search_format = "tf32"

    def numbers(self, num_classes: int, ball: tuple[float, str]) -> str:
        return f"{super().numbers(num_classes, ball)}, searched in TF32 on a GPU"


class FastAutoAttack(AutoAttackPart):
    """The parts of `fast`; on GPUs the search is in bfloat16, and every hit is verified in float32."""

    search_format = "bfloat16"

    def numbers(self, num_classes: int, ball: tuple[float, str]) -> str:
        return describe_fast(num_classes, ball[1], ball[0])

    def parts(self, num_classes: int) -> tuple[str, ...]:
        return FAST_PARTS

    def parameters(self, task: Task, batch_size: int) -> dict[str, Any]:
        ball = {"threat_model": task.ball[1], "epsilon": task.ball[0]}
        return ball | {"parts": list(FAST_PARTS), **NUMBERS._asdict()} | self._own_search()


class Images(NamedTuple):
    """Images BCHW, labels, and indices in the data."""

    x_nat: Tensor
    labels_B: Tensor
    sample_B: Tensor


def _attacked(attack: AutoAttack, parts: tuple[str, ...], images: Images) -> Outcome:
    """One batch after all parts."""
    x_nat, labels_B, sample_B = images
    look = attack.look(x_nat, labels_B)
    attack.check(x_nat)
    x_adv = x_nat.clone()
    survived_B = look.correct_B.to(torch.int8)

    def batch(rows: Sequence[int]) -> AttackBatch:
        rows_R = torch.tensor(rows, device=x_nat.device)
        return AttackBatch(x_nat[rows_R], labels_B[rows_R], sample_B[rows_R], look.targets_BT[rows_R])

    for number, part in enumerate(parts[1:], 1):
        left = (survived_B == number).nonzero().flatten().tolist()
        for found in attack.run(part, left, batch, len(x_nat)):
            if found.x_adv is None:
                survived_B[found.image] += 1
            else:
                x_adv[found.image] = found.x_adv
    return Outcome(x_adv, survived_B, attack.flags)


def _version(parts: tuple[str, ...], ball: tuple[float, str]) -> dict[str, Any]:
    """Ball and version, with its parts where it is not the whole."""
    own = {"threat_model": ball[1], "epsilon": ball[0], "version": "standard"}
    return own if parts == AA_PARTS else own | {"parts": list(parts)}


class Packaged(EvaluationAttack):
    """An attack by AutoAttack's package, batch by batch."""

    @property
    def inner(self) -> str:
        """Its name without that it is the package's."""
        return self.name.removesuffix(PACKAGE)

    def numbers(self, num_classes: int, ball: tuple[float, str]) -> str:
        if self.inner == WHOLE:
            return describe_autoattack(num_classes, ball[1], ball[0])
        return describe_part(self.inner, num_classes, ball[1], ball[0])

    def parts(self, num_classes: int) -> tuple[str, ...]:
        return defined_parts(num_classes) if self.inner == WHOLE else (NO_ATTACK, self.inner)

    def describe(self, task: Task, size: str) -> str:
        package, version = package_version()
        return f"{self.numbers(task.num_classes, task.ball)}, {package} {version}, {size}, seed {task.seed}"

    def parameters(self, task: Task, batch_size: int) -> dict[str, Any]:
        package, version = package_version()
        own = _version(self.parts(task.num_classes), task.ball)
        return own | {"batch_size": batch_size, package: version}

    def make(self, task: Task) -> Perturb:
        epsilon, threat_model = task.ball
        attack = PackagedAttack(
            task.model,
            task.num_classes,
            (threat_model, epsilon),
            task.seed,
            task.heartbeat,
            self.parts(task.num_classes),
        )
        return lambda x_nat, labels_B, sample_B: attack(x_nat, labels_B)

    def check_installed(self) -> None:
        installed(self.name)


@dataclass(frozen=True, eq=False)
class Transferred(EvaluationAttack):
    """Images that an attack crafts on the network of one checkpoint, for that of another to classify."""

    path: Path = field(kw_only=True)
    inner: EvaluationAttack = field(kw_only=True)
    _loaded: dict[tuple[str, ...] | None, LoadedModel] = field(default_factory=dict, init=False, repr=False)

    @property
    def takes_whole_batches(self) -> bool:
        return self.inner.takes_whole_batches

    @property
    def gradients(self) -> int | None:
        return self.inner.gradients

    @property
    def needs_gradients(self) -> bool:
        return False  # of another network

    def numbers(self, num_classes: int, ball: tuple[float, str]) -> str:
        return f"crafted on {self.path}: {self.inner.numbers(num_classes, ball)}"

    def describe(self, task: Task, size: str) -> str:
        inner = self.inner.describe(self._inside(task), size)
        return f"crafted on {self.path} ({self._source(task).name}): {inner}"

    def parameters(self, task: Task, batch_size: int) -> dict[str, Any]:
        source = self._source(task)
        crafted_on = {"sha256": source.sha256, "weights": weights_sha256(source.module)}
        return self.inner.parameters(self._inside(task), batch_size) | {"crafted_on": crafted_on}

    def make(self, task: Task) -> Perturb:
        inside = self._inside(task)
        network, craft = inside.model, self.inner.make(inside)
        parameter = next(network.parameters(), torch.empty(0))

        def perturb(x_nat: Tensor, labels_B: Tensor, sample_B: Tensor) -> Outcome:
            network.to(x_nat.device)
            out = craft(x_nat.to(parameter.dtype), labels_B, sample_B)
            x_adv, flags = (out.x_adv, out.flags) if isinstance(out, Outcome) else (out, 0)
            return Outcome(x_adv.to(x_nat.dtype), torch.zeros_like(labels_B), flags)

        return perturb

    def crafts_on(self, task: Task) -> nn.Module:
        return self._source(task).module

    def notes(self, task: Task) -> tuple[str, ...]:
        return tuple(f"{self.path}: {note}" for note in self._source(task).notes)

    def check_installed(self) -> None:
        self.inner.check_installed()
        if not self.path.exists():
            raise ValueError(f"{self.name}: there is no file {self.path}")

    def _inside(self, task: Task) -> Task:
        """The task of the inner attack."""
        return task._replace(model=self._source(task).module)

    def _source(self, task: Task) -> LoadedModel:
        """The other checkpoint's network, its outputs in the order of the data's classes, read once."""
        names = task.class_names
        if names not in self._loaded:
            found = load_model(self.path, num_classes=task.num_classes, class_names=names)
            found.module.requires_grad_(False)
            self._loaded[names] = found
        return self._loaded[names]


@dataclass(frozen=True, eq=False)
class ByFunction(EvaluationAttack):
    """A function of the user's. summary: its numbers in words."""

    function: AttackFunction = field(kw_only=True)
    summary: str = field(kw_only=True)

    @property
    def takes_any_form(self) -> bool:
        return False

    @property
    def needs_gradients(self) -> bool:
        return False  # it may; the network says so where it is asked for some

    def numbers(self, num_classes: int, ball: tuple[float, str]) -> str:
        norm = NORMS[ball[1]]
        return f"{norm.name}, epsilon {norm.length(ball[0])}, {self.summary}"

    def describe(self, task: Task, size: str) -> str:
        return f"{self.numbers(task.num_classes, task.ball)}, {size}, seed {task.seed}"

    def parameters(self, task: Task, batch_size: int) -> dict[str, Any]:
        epsilon, threat_model = task.ball
        own = {"threat_model": threat_model, "epsilon": epsilon, "batch_size": batch_size}
        return own | {"function": place_of(self.function), "code": _hash_of_code(self.function)}

    def make(self, task: Task) -> Perturb:
        known: dict[str, Any] = dict(zip(KEYWORDS, (*task.ball, task.seed), strict=False))

        def perturb(x_nat: Tensor, labels_B: Tensor, sample_B: Tensor) -> Tensor:
            model = task.model
            state = (*model.parameters(), *model.buffers())
            versions = [tensor._version for tensor in state]
            torch.manual_seed(zlib.crc32(f"{self.name} {task.seed} {int(sample_B[0])}".encode()))
            given = {key: value for key, value in (known | {"sample": sample_B}).items() if key in wanted}
            with batch_norm_mode(model, "eval"), frozen(model), torch.enable_grad():
                x_adv = self.function(model, x_nat.clone(), labels_B.clone(), **given)
            if [tensor._version for tensor in state] != versions:
                raise RunFailed(f"{self.name}: the attack changed the network's tensors; no result")
            if _kind(x_adv) != _kind(x_nat):
                raise RunFailed(f"{self.name}: expected {_kind(x_nat)} from the attack, got {_kind(x_adv)}")
            return x_adv.detach()

        wanted = _keywords(self.function)
        return perturb


def craft(attack: EvaluationAttack, task: Task, x_nat: Tensor, labels_B: Tensor, sample_B: Tensor) -> Tensor:
    """x_adv of one batch; the network and torch's random state are left as they were."""
    device = x_nat.device
    with (
        batch_norm_mode(task.model, "eval"),
        frozen(task.model),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        out = attack.make(task)(x_nat, labels_B, sample_B)
    return out.x_adv.to(x_nat.dtype) if isinstance(out, Outcome) else out


def _kind(value: object) -> str:
    """Shape and device of a tensor, or the type of something else, in words."""
    return f"{tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else type(value).__name__


def _keywords(function: AttackFunction) -> set[str]:
    """Those of `KEYWORDS` that a function names."""
    try:
        return set(inspect.signature(function).parameters) & set(KEYWORDS)
    except (ValueError, TypeError):  # one that is not written in Python
        return set()


def place_of(function: AttackFunction) -> str:
    """Module and name of a function, or of the class of an object that is called."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _hash_of_code(function: AttackFunction) -> str | None:
    """Hash of a function's file; None where that does not tell all: of objects, of closures, without a file."""
    if not inspect.isfunction(function) or function.__closure__:
        return None
    try:
        return hashlib.sha256(Path(inspect.getfile(function)).read_bytes()).hexdigest()
    except (TypeError, OSError):
        return None
