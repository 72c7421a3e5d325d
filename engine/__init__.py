"""engine: a training engine for adversarially robust image classifiers by adversarial distillation."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "register", "resume", "train"]

if TYPE_CHECKING:
    from engine.plugins import register
    from engine.runs.lifecycle import resume, train

EARLIER_NAMES = {
    "engine.attack": "engine.attacks.pgd",
    "engine.distributed": "engine.system.distributed",
    "engine.evaluate": "engine.evaluation.measure",
    "engine.learner": "engine.training.learner",
    "engine.precision": "engine.system.precision",
    "engine.recipes": "engine.config.recipes",
    "engine.reporter": "engine.common.console",
    "engine.semantics": "engine.config.semantics",
    "engine.stopping": "engine.common.stopping",
    "engine.trainer": "engine.runs.lifecycle",
    "engine.weights": "engine.models.weights",
}
"""Modules that may still be imported by a name that they had, and what they are called."""


def __getattr__(name: str) -> object:
    # Lazy: `engine --help` and the configuration must not wait for torch.
    if name == "register":
        return importlib.import_module("engine.plugins.register")
    if name in ("resume", "train"):
        return getattr(importlib.import_module("engine.runs.lifecycle"), name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")


class _EarlierNames(MetaPathFinder, Loader):
    """Finds the module of an earlier name: the same module, not a second one of its file."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in EARLIER_NAMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(EARLIER_NAMES[spec.name])
        self._own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own_spec  # the import system has put the earlier name's there


sys.meta_path.append(_EarlierNames())
