"""Packages that may be absent: how they are imported, and their versions. Imports nothing of engine."""

from __future__ import annotations

import importlib
from importlib import metadata
from types import ModuleType


def load(*modules: str, missing: str) -> ModuleType:
    """The first of these modules that can be imported.

    Raises ValueError(missing) where none can; "{reason}" in it becomes the error of the last import, in one line.
    """
    reason = ""
    for module in modules:
        try:
            return importlib.import_module(module)
        except Exception as error:  # a package that does not fit the others raises anything as it is imported
            reason = " ".join(str(error).split())
    raise ValueError(missing.replace("{reason}", reason))


def version(*distributions: str) -> str | None:
    """Version of the first of these distributions that is installed; None where none is."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
