"""List of the commands: `python -m bench`. Needs nothing but Python itself."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path


def commands() -> Iterator[tuple[str, str]]:
    """Name of each command, and the first words of its module."""
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        yield path.stem, docstring.partition(": `python -m")[0]


def main() -> None:
    """Print a line for each command."""
    for name, summary in commands():
        sys.stdout.write(f"python -m bench.{name:<12} {summary}\n")


if __name__ == "__main__":
    main()
