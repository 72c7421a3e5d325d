"""Tables of docs/methods.md and README.md, from the code's tables of methods: `python -m tests.method_tables`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.lib.output import csv_rows
from bench.lib.output.csv_rows import MethodRow
from engine.attacks.pgd import describe
from engine.config import recipes
from engine.config.semantics import NAMES
from engine.training import method_text

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "docs" / "methods.md", ROOT / "README.md")
MEASURED = ROOT / "bench" / "results" / "cpu" / "methods.csv"
BLOCK = re.compile(
    r"(<!-- table of (\w+): python -m tests\.method_tables -->\n).*?(<!-- end of table -->)", re.DOTALL
)
# Numbers in percent as their authors state them, with the page on which they were read.
ELSEWHERE = {
    "fgsm-rs": "natural 86.06, PGD 46.06 on CIFAR-10 ([README](https://github.com/locuslab/fast_adversarial))",
    "adaad": "AA about 52, of ResNet-18 on CIFAR-10, as a user quotes the paper, who had 47 with its code "
    "([issue 2](https://github.com/boyellow/AdaAD/issues/2))",
    "ard+igdm": "AA from 28.06 to 30.32, of ResNet-18 on CIFAR-100 beside a method that is not named "
    "([abstract](https://arxiv.org/abs/2312.03286))",
}
NOT_CHECKED = "not checked here"


def written(page: str) -> str:
    """The page with the tables as they must be."""
    return BLOCK.sub(lambda found: "\n".join([found[1], *TABLES[found[2]](), "", found[3]]), page)


def line(*cells: str) -> str:
    """A row of a table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |".replace("|  |", "| |")


def table(headings: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    """A table with its headings."""
    yield line(*headings)
    yield "|---" * len(headings) + "|"
    yield from (line(*row) for row in rows)


def losses() -> Iterator[str]:
    """Both losses of every method, the logits that they read, and the warm-up."""
    rows = map(method_text.summary, method_text.names())
    headings = ("method", "loss of the student", "reads", "the attack maximises", "warm-up")
    return table(headings, ((f"`{row.name}`", row.outer, row.reads, row.inner, row.warmup) for row in rows))


def short() -> Iterator[str]:
    """Both losses of every method."""
    rows = map(method_text.summary, method_text.names())
    headings = ("`--method`", "loss of the student", "the attack maximises")
    return table(headings, ((f"`{row.name}`", row.outer, row.inner) for row in rows))


def defaults() -> Iterator[str]:
    """The attack with all numbers, the order of the passes, and keys that have other defaults than usual."""

    def rows() -> Iterator[tuple[str, ...]]:
        for name in method_text.names():
            run, method = method_text.run_of(name)
            attack = describe(run.attack) if method.needs_x_adv else "none"
            keys = "; ".join(f"`{key}` {value}" for key, value in method_text.defaults(run).items())
            yield f"`{name}`", attack, ", ".join(method_text.passes(run, method)), keys

    return table(("method", "attack", "passes of a step", "other defaults"), rows())


def readings() -> Iterator[str]:
    """The losses that differ between both readings, with the numbers of the defaults."""

    def rows() -> Iterator[tuple[str, ...]]:
        for name in method_text.names():
            if told := method_text.differences(name).get("loss"):
                yield f"`{name}`", *told

    return table(("method", *(f"`{name}`" for name in NAMES)), rows())


def sources() -> Iterator[str]:
    """Paper and code of every method, and published accuracies."""

    def rows() -> Iterator[tuple[str, ...]]:
        for name in method_text.names():
            row = method_text.rows_of(name)[-1]
            code = f"[{row.source}](https://{row.source.split()[0]})" if row.source else ""
            yield f"`{name}`", row.summary, code, published(name)

    return table(("method", "what it is", "code", "published, in percent"), rows())


def published(method: str) -> str:
    """Accuracies of the IAD paper's table that has the method first, or as stated elsewhere."""
    for recipe in recipes.paper_rows():
        if recipe.config["method"] == method and recipe.config.get("dataset") == "cifar10":
            numbers = ", ".join(
                f"{title} {recipe.paper[key]:.2f}" for key, title in MEASURES.items() if key in recipe.paper
            )
            return f"{numbers} (IAD's Table {recipe.table}: {recipe.row})"
    return ELSEWHERE.get(method, NOT_CHECKED)


def measured() -> Iterator[str]:
    """Times and accuracies that bench.methods measured, and what they were measured with."""
    rows = csv_rows.read(MEASURED, MethodRow)
    first = rows[0]
    yield (
        f"{first.model}, {first.images:,} training images, {first.epochs} epochs, batches of {first.batch_size}, "
        f"seed {first.seed}, on one core of an {first.processor}; {first.test_images:,} test images, of which "
        f"guessing has {first.chance:.0%} right, and {first.attacked_images:,} under PGD-20:"
    )
    yield ""
    headings = ("method", "s/epoch", "x AT", "natural", "PGD-20", "natural by guessing: p")
    yield from table(
        headings,
        (
            (
                f"`{row.method}`",
                f"{row.epoch_s:.1f}",
                f"{row.relative_to_at:.2f}",
                f"{row.natural:.1%}",
                f"{row.pgd20:.1%}",
                f"{row.p_value:.0e}",
            )
            for row in rows
        ),
    )
    if absent := [f"`{name}`" for name in method_text.names() if name not in {row.method for row in rows}]:
        yield from ("", f"Not measured: {', '.join(absent)}.")


MEASURES = {"natural": "natural", "pgd20": "PGD-20", "aa": "AA"}
TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "losses": losses,
    "methods": short,
    "defaults": defaults,
    "readings": readings,
    "sources": sources,
    "measured": measured,
}

if __name__ == "__main__":
    for path in PAGES:
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
