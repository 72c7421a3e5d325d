"""engine: a training engine for adversarially robust image classifiers by adversarial distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "train"]

if TYPE_CHECKING:
    from engine.trainer import train


def __getattr__(name: str) -> object:
    # Lazy: `engine --help` and the configuration must not wait for torch.
    if name == "train":
        from engine.trainer import train

        return train
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
