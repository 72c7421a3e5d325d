"""Tables of docs/architecture.md, from the wings and the docstrings: `python -m tests.module_tables`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.test_architecture import ROOT, WINGS

PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tables: python -m tests.module_tables -->", "<!-- end of tables -->"


def written(page: str) -> str:
    """The page with the tables as they must be."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + "\n".join([BEGIN, "", *lines(), END]) + after


def lines() -> Iterator[str]:
    """The arrow, and a table of each wing in the order of its imports."""
    yield from ("```", " < ".join(name or "config, methods, ..." for name, _, _ in WINGS), "```", "")
    for wing, purpose, groups in WINGS:
        folder = (ROOT / "engine" / wing).resolve()
        yield from (f"### {folder.relative_to(ROOT).as_posix()}/", "", f"{purpose[0].upper()}{purpose[1:]}.", "")
        yield from ("| module | contents |", "|---|---|")
        for name in modules(folder, [name for group in groups for name in group]):
            yield f"| `{name}` | {summary(folder / name.replace('.', '/'))} |"
        yield ""


def modules(folder: Path, order: list[str]) -> list[str]:
    """Modules of a wing by name, e.g. ffcv and ffcv.loader, in that order; by the alphabet where there is none."""
    paths = [path.relative_to(folder) for path in folder.rglob("*.py")]
    names = sorted(".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths)

    def place(name: str) -> int:
        known = name if name in order else name.partition(".")[0]
        return order.index(known) if known in order else -1

    shown = [name for name in names if not name.startswith("_") and (not order or place(name) >= 0)]
    return sorted(shown, key=place)


def summary(module: Path) -> str:
    """First line of a module's docstring, as a cell."""
    file = module.with_suffix(".py") if module.with_suffix(".py").is_file() else module / "__init__.py"
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert docstring, f"{file}: the module has no docstring"
    return docstring.partition("\n")[0].removesuffix(".").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
