"""Table of the loggers that are built in: the packages that each needs, and its adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.common import optional
from engine.plugins.builtin_loggers.run_facts import Tool


@dataclass(frozen=True)
class BuiltIn:
    """A logger: what it is, distributions of which one must be installed, and its adapter.

    make: None where the run writes it in any case.
    """

    summary: str
    distributions: tuple[str, ...]
    make: Callable[[], Tool] | None = None


def _trackio() -> Tool:
    from engine.plugins.builtin_loggers.to_trackio import TrackioRun

    return TrackioRun()


def _wandb() -> Tool:
    from engine.plugins.builtin_loggers.to_wandb import WandbRun

    return WandbRun()


def _mlflow() -> Tool:
    from engine.plugins.builtin_loggers.to_mlflow import MlflowRun

    return MlflowRun()


BUILT_IN = {
    "tensorboard": BuiltIn("curves in the run directory, which every run writes", ("tensorboard",)),
    "trackio": BuiltIn("Trackio, a local store", ("trackio",), _trackio),
    "wandb": BuiltIn("Weights & Biases", ("wandb",), _wandb),
    "mlflow": BuiltIn("MLflow", ("mlflow", "mlflow-skinny"), _mlflow),
}
"""The loggers by name, which is the name of the extra that installs them, too."""


def how_to_install(name: str) -> str:
    """Command that installs what a logger needs."""
    return f"pip install 'iad-engine[{name}]'"


def check_installed(name: str) -> None:
    """Raise ValueError, one line with the command to get it, where a logger's package is not installed."""
    packages = BUILT_IN[name].distributions
    if optional.version(*packages) is None:
        raise ValueError(
            f"loggers: {name} needs the package {packages[0]}, which is not installed; {how_to_install(name)}"
        )
