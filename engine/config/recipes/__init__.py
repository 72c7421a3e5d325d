"""The rows of the paper's tables as configurations, one YAML file each, named after what varies in the table.

The numbers in a recipe are the paper's. Imports no torch.
"""

from __future__ import annotations

import re
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import Field

from engine.common import yaml_text
from engine.common.lookup import nearest
from engine.config import Section, validated

_FILES = resources.files(__name__)

Measure = Literal["natural", "fgsm", "pgd20", "cw", "aa"]


class Recipe(Section):
    """One row of a table of the paper.

    paper: accuracies in percent, as printed. note: the reading taken where the paper is unclear.
    config: nested keys for `engine.config.load`, only what the row decides.
    """

    name: str
    table: int
    row: str
    paper: Annotated[dict[Measure, Annotated[float, Field(ge=0, le=100)]], Field(min_length=1)]
    note: str = ""
    config: dict[str, Any]


def names() -> list[str]:
    """Every recipe's name, by table."""
    stems = [file.name.removesuffix(".yaml") for file in _FILES.iterdir() if file.name.endswith(".yaml")]
    return sorted(stems, key=_by_number)


def get(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError where there is none, naming those of the same table."""
    known = names()
    if name not in known:
        table = name.partition("-")[0]
        same_table = [other for other in known if other.partition("-")[0] == table]
        if not same_table:
            raise ValueError(f"recipe: {name!r} is not known; `engine recipes` lists them")
        raise ValueError(f"recipe: {name!r} is not known; {nearest(name, same_table)}")
    tree = yaml_text.read(_FILES.joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    return validated(Recipe, {"name": name, **tree})


def all_recipes() -> list[Recipe]:
    """Every recipe, by table."""
    return [get(name) for name in names()]


def _by_number(name: str) -> list[str | float]:
    # "table2" before "table10" and "beta0.05" before "beta0.1": text and numbers alternate in the parts.
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]
