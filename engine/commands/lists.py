"""`engine methods`, `models`, `datasets` and `recipes`: names that other commands take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import click


@click.command("methods")
def list_methods() -> None:
    """List the methods."""
    from engine import methods
    from engine.commands.tables import print_list

    print_list(
        ("method", "what it is"),
        [(name, row.summary) for name, row in methods.METHODS.items()],
    )


@click.command("models")
def list_models() -> None:
    """List the architectures."""
    from engine import models
    from engine.commands.tables import print_list

    rows = [
        (name, entry.summary, ", ".join(f"{size}x{size}" for size in entry.input_sizes))
        for name, entry in models.TABLE.items()
    ]
    print_list(("model", "what it is", "images"), rows)


@click.command("datasets")
def list_datasets() -> None:
    """List the data sets."""
    from engine.commands.tables import print_list
    from engine.pipelines.datasets import DATASETS

    rows = [
        (
            name,
            entry.summary,
            str(entry.num_classes or "yours"),
            str(entry.image_size or "yours"),
            entry.origin,
        )
        for name, entry in DATASETS.items()
    ]
    print_list(("dataset", "what it is", "classes", "pixels", "from"), rows)


@click.command("recipes")
def list_recipes() -> None:
    """List the rows of the paper's tables that `engine train --config recipe:NAME` runs.

    The numbers are the paper's, in percent.
    """
    from engine import recipes
    from engine.commands.tables import print_list

    def percent(paper: Mapping[Any, float], name: str) -> str:
        return f"{paper[name]:.2f}" if name in paper else ""

    rows = [
        (
            recipe.name,
            recipe.row,
            *(percent(recipe.paper, name) for name in get_args(recipes.Measure)),
        )
        for recipe in recipes.all_recipes()
    ]
    print_list(("recipe", "row", "natural", "FGSM", "PGD-20", "CW-inf", "AA"), rows)
