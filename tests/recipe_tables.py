"""Tables of docs/recipes.md, from the recipes and a protocol: `python -m tests.recipe_tables`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from bench.lib.accuracy import protocol
from engine.config import flat, recipes
from tests.key_tables import default
from tests.method_tables import MEASURES, table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
BLOCK = re.compile(
    r"(<!-- table of (\w+): python -m tests\.recipe_tables -->\n).*?(<!-- end of table -->)", re.DOTALL
)


def written(page: str) -> str:
    """The page with the tables as they must be."""
    return BLOCK.sub(lambda found: "\n".join([found[1], *TABLES[found[2]](), "", found[3]]), page)


def rows_with(key: str) -> list[str]:
    """Rows of the table `components` of the protocol `cpu` that have a key of their own."""
    return [row for row, keys in protocol.read("cpu").tables["components"].rows.items() if key in flat(keys or {})]


def modern() -> Iterator[str]:
    """The recipes beyond the paper's rows."""

    def rows() -> Iterator[tuple[str, ...]]:
        for recipe in recipes.modern_recipes():
            yield (
                f"`{recipe.name}`",
                recipe.summary,
                str(recipe.config["epochs"]),
                ", ".join(component.title for component in recipe.components.values()),
                ", ".join(f"{mark.accuracies['aa']:.2f} ({mark.short})" for mark in recipe.marks.values()),
                f"`{recipe.teacher}`" if recipe.teacher else "",
            )

    return table(("recipe, not run", "what it is", "epochs", "components", "AA to pass", "its teacher"), rows())


def marks() -> Iterator[str]:
    """Published accuracies that recipes aim at."""
    names = dict.fromkeys(name for recipe in recipes.modern_recipes() for name in recipe.aims)

    def rows() -> Iterator[tuple[str, ...]]:
        for mark in sorted(map(recipes.published, names), key=lambda mark: mark.accuracies["aa"]):
            shown: dict[str, str] = {measure: f"{percent:.2f}" for measure, percent in mark.accuracies.items()}
            yield mark.title, mark.source, *(shown.get(measure, "") for measure in MEASURES)

    return table(("published, in percent", "where", *MEASURES.values()), rows())


def components() -> Iterator[str]:
    """The components, with their values and the rows that measure each."""

    def rows() -> Iterator[tuple[str, ...]]:
        for key, component in recipes.COMPONENTS.items():
            values = dict.fromkeys(
                default(flat(recipe.config)[key])
                for recipe in recipes.modern_recipes()
                if key in recipe.components
            )
            measured = ", ".join(f"`{row}`" for row in rows_with(key))
            yield component.title, f"`{key}`: {', '.join(values)}", component.source, measured

    return table(("component", "key and values", "from", "rows that measure it"), rows())


TABLES = {"modern": modern, "marks": marks, "components": components}

if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
