"""Objects of a Python program in place of names: a run's model, data set, teachers and callbacks.

While such a run is trained, its objects are registered under names that begin with "python:", which its
config.yaml has too: nothing but the program can bring them back.
"""

from __future__ import annotations

import copy
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from engine import models
from engine.common.lookup import OBJECT, check_known
from engine.config import RunConfig, Tree
from engine.objectives import TEACHERS
from engine.pipelines.datasets import DATASETS, Entry
from engine.plugins import own_data
from engine.plugins.loggers import RowFunction
from engine.plugins.register import architecture

Model = nn.Module | Callable[[int], nn.Module]
"""A network whose copy is trained, or a function from the number of classes to a fresh one."""

Kind = TypeVar("Kind")
_SIZES = (32,)  # that a network which normalises is tried with


@dataclass(frozen=True, eq=False)
class Objects:
    """Objects of a run. dataset: (train, test), or a function that gives it. teachers: networks by section."""

    model: Model | None = None
    dataset: Any = None
    teachers: Mapping[str, nn.Module] = field(default_factory=dict)
    callbacks: Sequence[RowFunction] = ()

    def __post_init__(self) -> None:
        if self.model is not None and not callable(self.model):
            raise ValueError(
                "model: a name, a torch.nn.Module or a function of the number of classes is expected, "
                f"got {self.model!r:.100}"
            )
        for section, teacher in self.teachers.items():
            check_known("teachers", section, TEACHERS)
            if not isinstance(teacher, nn.Module):
                raise ValueError(f"teachers: {section}: a torch.nn.Module is expected, got {teacher!r:.100}")
        for callback in self.callbacks:
            if not callable(callback):
                raise ValueError(f"callbacks: functions of a row are expected, got {callback!r:.100}")

    def names(self) -> Tree:
        """The keys of a configuration that stand for the objects."""
        tree: Tree = {section: {"model": _name(teacher)} for section, teacher in self.teachers.items()}
        tree |= {} if self.model is None else {"model": _name(self.model)}
        return tree | ({} if self.dataset is None else {"dataset": _name(self.dataset)})

    def check(self, config: RunConfig) -> None:
        """Raise ValueError where a run that goes on has a name in the place of an object, or the reverse."""
        given = {"model": self.model is not None, "dataset": self.dataset is not None}
        given |= {section: section in self.teachers for section in TEACHERS}
        for argument, is_given in given.items():
            wanted = getattr(config, argument) if argument not in TEACHERS else getattr(config, argument).model
            what = f"teachers: {argument}" if argument in TEACHERS else argument
            if is_given and not str(wanted).startswith(OBJECT):
                raise ValueError(f"{what}: the run began with {wanted!r}, and not with an object; drop it")
            if not is_given and argument in TEACHERS and str(wanted).startswith(OBJECT):
                raise ValueError(
                    f"{what}: {wanted!r} stands for an object that was given to engine.train; in Python, "
                    f"engine.resume(PATH, teachers={{{argument!r}: ...}}) goes on with the same one"
                )

    @contextmanager
    def registered(self, config: RunConfig) -> Iterator[None]:
        """Let the names in a configuration stand for the objects inside."""
        with ExitStack() as entries:
            if self.model is not None:
                version = secrets.token_hex(16)  # a teacher of that network is no other run's
                network = architecture(config.model, _builder(self.model), "", _SIZES, version)
                entries.enter_context(_entered(models.TABLE, config.model, network))
            if self.dataset is not None:
                loader = self.dataset if callable(self.dataset) else lambda: self.dataset
                find = own_data.finder(config.dataset, loader, None, "an object of the program")
                data = Entry("", "", None, None, flip=True, find=find)
                entries.enter_context(_entered(DATASETS, config.dataset, data))
            yield


@contextmanager
def _entered(table: dict[str, Kind], name: str, entry: Kind) -> Iterator[None]:
    """The table has the entry inside, in place of one of that name."""
    before = table.get(name)
    table[name] = entry
    try:
        yield
    finally:
        del table[name]
        if before is not None:
            table[name] = before


def _name(given: object) -> str:
    """The name in a configuration: of the object's function or class."""
    first = given[0] if isinstance(given, tuple | list) and given else given
    name = getattr(first, "__name__", type(first).__name__)
    return OBJECT + re.sub(r"[^A-Za-z0-9_.-]", "", name)[:64]


def _builder(model: Model) -> Callable[[int], nn.Module]:
    if isinstance(model, nn.Module):
        return lambda num_classes: copy.deepcopy(model)
    return model
