"""`engine methods`, `models`, `datasets` and `recipes`: names that other commands take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

import click

from engine.commands.completion import named, one_of
from engine.commands.options import import_option
from engine.config.semantics import NAMES


@click.command("methods")
@click.argument("name", required=False, type=named("method"))
@click.option("--semantics", type=one_of(*NAMES), default=NAMES[0], show_default=True, help="Which reading.")
@import_option
def list_methods(name: str | None, semantics: str) -> None:
    """List the methods with the losses of the student and of the attack, or tell all of one.

    NAME may have additions: ard+igdm.
    """
    from engine.commands.tables import print_list
    from engine.training import method_text

    if name is not None:
        print_list(("", name), list(_facts(name, semantics)))
        return
    rows = [method_text.summary(known, semantics) for known in method_text.names()]
    columns = ("method", "loss of the student", "maximised by the attack", "source")
    print_list(columns, [(row.name, row.outer, row.inner, row.source) for row in rows])


def _facts(name: str, semantics: str) -> Iterator[tuple[str, str]]:
    """Lines about one method: what it is, what a step runs, and how it is trained unless told otherwise."""
    from engine.attacks.pgd import describe
    from engine.training import method_text

    row = method_text.summary(name, semantics)
    run, method = method_text.run_of(name, semantics)
    yield from (("source", row.source), ("semantics", semantics))
    yield from (("loss", row.outer), ("reads", row.reads))
    yield from method_text.factors(method).items()
    if method.needs_alpha:
        yield "alpha", f"softmax(T_at(x~))_y ** {run.loss.beta:g}"
    yield "attack", describe(run.attack) if method.needs_x_adv else row.inner
    if row.warmup:
        yield "warm-up", row.warmup
    yield "passes of a step", "\n".join(method_text.passes(run, method))
    yield "defaults of its own", "\n".join(f"{key} = {value}" for key, value in method_text.defaults(run).items())
    for key, told in method_text.differences(name).items():
        yield key, "\n".join(f"{reading}: {value}" for reading, value in zip(NAMES, told, strict=True))


@click.command("models")
@import_option
def list_models() -> None:
    """List the architectures, and the forms of names of further ones."""
    from engine import models
    from engine.commands.tables import print_list

    rows = [
        (name, entry.summary, ", ".join(f"{size}x{size}" for size in entry.input_sizes))
        for name, entry in models.TABLE.items()
    ]
    rows += [(form, family.summary, family.images) for form, family in models.FAMILIES.items()]
    print_list(("model", "what it is", "images"), rows)


@click.command("datasets")
@import_option
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


@click.command("attacks")
@click.option("--epsilon", default="8/255", show_default=True, help="Radius of the ball, for the numbers.")
@click.option("--threat-model", type=one_of("Linf", "L2"), default="Linf", show_default=True, help="Linf or L2.")
@click.option("--classes", type=click.IntRange(1), default=10, show_default=True, help="Classes of the data.")
@import_option
def list_attacks(epsilon: str, threat_model: str, classes: int) -> None:
    """List the attacks of evaluations with all their numbers, those that are defined for so many classes.

    They serve in `engine eval --attacks`, eval.attack and eval.final.
    """
    from engine.attacks import table
    from engine.commands.tables import print_list
    from engine.config import load

    attack = load({"attack": {"epsilon": epsilon, "threat_model": threat_model}}).attack
    ball = (attack.epsilon, attack.threat_model)
    rows = []
    for name in table.names():
        row = table.find(name)
        if row.is_defined(classes, threat_model):
            title = row.title_of(row.parts(classes))
            rows.append((name, title, row.numbers(classes, ball), f"from {row.least_classes}", row.source))
    rows += [(name, "", what, "", "") for name, what in table.PATTERNS.items()]
    print_list(("attack", "title", "what it is", "classes", "source"), rows)


@click.command("recipes")
def list_recipes() -> None:
    """List what `engine train --config recipe:NAME` runs.

    Rows of the paper's tables, with the paper's numbers in percent, and recipes that aim beyond them.
    """
    from engine.commands.tables import print_list
    from engine.config import recipes

    def percent(paper: Mapping[Any, float], name: str) -> str:
        return f"{paper[name]:.2f}" if name in paper else ""

    rows = [
        (row.name, row.row, *(percent(row.paper, name) for name in get_args(recipes.Measure)))
        for row in recipes.paper_rows()
    ]
    modern = [
        (
            recipe.name,
            recipe.summary,
            ", ".join(component.title for component in recipe.components.values()),
            "\n".join(f"{mark.accuracies['aa']:.2f} ({mark.short})" for mark in recipe.marks.values()),
        )
        for recipe in recipes.modern_recipes()
    ]
    print_list(
        ("recipe", "row", "natural", "FGSM", "PGD-20", "CW-inf", "AA"),
        rows,
        "Rows of the paper's tables, with the paper's accuracies in percent:",
    )
    print_list(
        ("recipe", "what it is", "components", "AA to pass"),
        modern,
        "Beyond the paper's rows: aims, not results. None of them was run. The last column has published "
        "accuracies under AutoAttack, in percent, that they are to pass:",
    )
