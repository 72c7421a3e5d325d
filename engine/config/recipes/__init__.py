"""Configurations by name, one YAML file each: the rows of the paper's tables, and recipes that aim beyond them.

The accuracies in a row are the paper's; those that a recipe aims at are `PUBLISHED_MARKS`. None was measured here.
Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field

from engine.common import yaml_text
from engine.common.lookup import check_known, look_up, nearest
from engine.config import Section, Tree, flat, merge, validated

_FILES = resources.files(__name__)

Measure = Literal["natural", "fgsm", "pgd20", "cw", "aa"]


class PublishedMark(NamedTuple):
    """Published accuracies, in percent, of ResNet-18 on CIFAR-10 at epsilon 8/255 in L-inf, without other images.

    short: the source in few words. source: where they stand, in Markdown.
    """

    title: str
    short: str
    source: str
    accuracies: Mapping[Measure, float]


PUBLISHED_MARKS: dict[str, PublishedMark] = {
    "fastat-pgd-at-wa": PublishedMark(
        "AT with averaged weights (PGD-AT-WA)",
        "FastAT",
        "[FastAT benchmark](https://github.com/fzjcdt/FastAT_Benchmark), mean of the three seeds in "
        "`log/cifar10/pgd_at_wa`",
        {"natural": 82.36, "pgd20": 54.28, "aa": 50.49},
    ),
    "robustbench-addepalli2022": PublishedMark(
        "Efficient and Effective Augmentation Strategy for Adversarial Training",
        "RobustBench",
        "[RobustBench](https://robustbench.github.io/), `Addepalli2022Efficient_RN18` "
        "([Addepalli et al., 2022](https://arxiv.org/abs/2210.15318))",
        {"natural": 85.71, "aa": 52.48},
    ),
}
"""What recipes may aim at besides rows of the paper."""


class Component(NamedTuple):
    """A change of the training that is known to make networks more robust. source: who found it, in Markdown."""

    title: str
    source: str


COMPONENTS: dict[str, Component] = {
    "averaging.kind": Component(
        "averaged weights",
        "[Rebuffi et al., 2021](https://arxiv.org/abs/2111.05328): averages of weights against robust overfitting "
        "([Rice et al., 2020](https://arxiv.org/abs/2002.11569)); the decay in 100 epochs is FastAT's",
    ),
    "awp.gamma": Component(
        "AWP", "[Wu et al., 2020](https://arxiv.org/abs/2004.05884); gamma is that of their code"
    ),
    "loss.label_smoothing": Component(
        "label smoothing",
        "[Pang et al., 2021](https://arxiv.org/abs/2010.00467): about 0.2 helps, above 0.3 may harm; "
        "FastAT has 0.4",
    ),
    "optim.schedule": Component("one-cycle schedule", "FastAT: 100 epochs, up to a rate of 0.1"),
    "optim.weight_decay": Component(
        "weight decay", "Pang et al., 2021: 5e-4, as of Rice et al., in place of 2e-4; FastAT alike"
    ),
}
"""By the key that turns it on."""


def _known_mark(name: str) -> str:
    check_known("aims", name, [*PUBLISHED_MARKS, *_names_of(PaperRow)])
    return name


def _known_teacher(name: str | None) -> str | None:
    if name is not None:
        check_known("teacher", name, _names_of(ModernRecipe))
    return name


class Recipe(Section):
    """A configuration by name.

    note: what its reader should know, as the reading taken where the paper is unclear.
    config: nested keys for `engine.config.load`, only what the recipe decides.
    """

    name: str
    note: str = ""
    config: dict[str, Any]

    def run_keys(self) -> Tree:
        """Nested keys of a run of it."""
        return self.config


class PaperRow(Recipe):
    """One row of a table of the paper. paper: accuracies in percent, as printed."""

    table: int
    row: str
    paper: Annotated[dict[Measure, Annotated[float, Field(ge=0, le=100)]], Field(min_length=1)]

    def run_keys(self) -> Tree:
        """Nested keys of a run, which measures what the row prints but AutoAttack, which takes hours."""
        return merge({"eval": {"final": [attack for attack in self.paper if attack != "aa"]}}, self.config)


class ModernRecipe(Recipe):
    """A recipe that aims beyond the paper's rows: an aim, and no result.

    aims: names of `PUBLISHED_MARKS` and of rows of the paper, whose accuracy under AutoAttack it is to pass.
    teacher: the recipe whose run is to be its robust teacher; None where it reads none.
    """

    summary: Annotated[str, Field(min_length=1)]
    aims: Annotated[tuple[Annotated[str, AfterValidator(_known_mark)], ...], Field(min_length=1)]
    teacher: Annotated[str | None, AfterValidator(_known_teacher)] = None

    @property
    def components(self) -> dict[str, Component]:
        """Those that its configuration has, by key."""
        given = flat(self.config)
        return {key: component for key, component in COMPONENTS.items() if key in given}

    @property
    def marks(self) -> dict[str, PublishedMark]:
        """Published accuracies that it aims at, by name."""
        return {name: published(name) for name in self.aims}


AnyRecipe = PaperRow | ModernRecipe
# By the letters with which the name begins; in the order of the lists.
_KINDS: dict[str, type[PaperRow] | type[ModernRecipe]] = {"table": PaperRow, "modern": ModernRecipe}


def names() -> list[str]:
    """Every recipe's name: the paper's rows by table, then the others."""
    return [name for kind in _KINDS.values() for name in _names_of(kind)]


def get(name: str) -> AnyRecipe:
    """The recipe of that name. Raises ValueError where there is none, naming those that begin alike."""
    known = names()
    if name not in known:
        begin = name.partition("-")[0]
        alike = [other for other in known if other.partition("-")[0] == begin]
        if not alike:
            raise ValueError(f"recipe: {name!r} is not known; `engine recipes` lists them")
        raise ValueError(f"recipe: {name!r} is not known; {nearest(name, alike)}")
    tree = yaml_text.read(_FILES.joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    return validated(_kind_of(name), {"name": name, **tree})


def paper_row(name: str) -> PaperRow:
    """The row of the paper of that name. Raises ValueError for another recipe, and where there is none."""
    recipe = get(name)
    if not isinstance(recipe, PaperRow):
        raise ValueError(f"recipe: {name!r} is no row of the paper's tables, so it has no accuracies of the paper")
    return recipe


def modern_recipe(name: str) -> ModernRecipe:
    """The recipe of that name beyond the paper's rows. Raises ValueError for a row, and where there is none."""
    recipe = get(name)
    if not isinstance(recipe, ModernRecipe):
        raise ValueError(f"recipe: {name!r} is a row of the paper's tables")
    return recipe


def paper_rows() -> list[PaperRow]:
    """Every row of the paper's tables, by table."""
    return [paper_row(name) for name in _names_of(PaperRow)]


def modern_recipes() -> list[ModernRecipe]:
    """Every recipe that aims beyond the paper's rows."""
    return [modern_recipe(name) for name in _names_of(ModernRecipe)]


def all_recipes() -> list[AnyRecipe]:
    """Every recipe, in the order of `names`."""
    return [get(name) for name in names()]


def published(name: str) -> PublishedMark:
    """Published accuracies by name, of `PUBLISHED_MARKS` or a row of the paper. Raises ValueError for others."""
    if name in PUBLISHED_MARKS:
        return PUBLISHED_MARKS[name]
    row = paper_row(name)
    where = f"Table {row.table}"
    return PublishedMark(row.row, where, f"the paper's {where}, `{name}`", row.paper)


@cache
def _names_of(kind: type[PaperRow] | type[ModernRecipe]) -> tuple[str, ...]:
    """Names of that kind, "table2" before "table10"."""
    stems = [file.name.removesuffix(".yaml") for file in _FILES.iterdir() if file.name.endswith(".yaml")]
    return tuple(sorted((name for name in stems if _kind_of(name) is kind), key=_by_number))


def _kind_of(name: str) -> type[PaperRow] | type[ModernRecipe]:
    letters = re.match(r"[a-z]*", name)
    return look_up("recipe", letters[0] if letters else name, _KINDS)


def _by_number(name: str) -> list[str | float]:
    # "table2" before "table10" and "beta0.05" before "beta0.1": text and numbers alternate in the parts.
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]
