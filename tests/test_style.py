"""Style of the whole project, read from the sources: short functions, few parameters, one name for each thing."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("engine", "kernels", "pipelines", "bench")
MOST_LINES, MOST_PARAMETERS = 60, 8
OPENINGS = ("What", "Where", "How", "Whether", "Which", "Of", "That")
"""Words with which no docstring opens: a noun or an imperative says the same sooner."""

PRIVATE_WORDS = {
    "from_main": "broadcast_from_main",
    "meet": "barrier",
    "beat": "heartbeat",
    "Given": "TeacherOutputs",
    "Seen": "OnOutput",
    "hostmemory": "host_memory",
    "rundir": "run_directory",
    "journal": "metrics_writer",
    "ledger": "partial_results",
}
"""Words that only this project knew, and the plain ones in their place."""

SHARED_NAMES: dict[str, str] = {}
"""Public names that may stand in several modules, with the reason."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Source(NamedTuple):
    """A module of the project. path: relative to the root."""

    path: str
    lines: list[str]
    tree: ast.Module


@cache
def parse(path: Path) -> Source:
    """Read a module."""
    text = path.read_text()
    return Source(str(path.relative_to(ROOT)), text.splitlines(), ast.parse(text))


def sources(*folders: str) -> Iterator[Source]:
    """Modules in the folders, but for those behind links, such as engine/kernels."""
    for folder in folders:
        root = ROOT / folder
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            if path.resolve() == path:
                yield parse(path)


def count_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Number of parameters, self and cls aside."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args]
    own = bool(named) and named[0].arg in ("self", "cls")
    return len(named) - own + len(arguments.kwonlyargs)


def reasons(source: Source, function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Limits from which comments right above a function, and above its decorators, excuse it."""
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    found = set()
    for line in reversed(source.lines[: first - 1]):
        if not line.strip().startswith("#"):
            break
        if match := re.match(r"\s*# (long|many parameters): \S", line):
            found.add(match[1])
    return found


def faults_of_size(source: Source) -> Iterator[str]:
    """Functions above a limit without a reason, reasons that are not needed, and reasons above no function."""
    used = 0
    for function in ast.walk(source.tree):
        if not isinstance(function, Function):
            continue
        lines, parameters = int(function.end_lineno or 0) - function.lineno + 1, count_parameters(function)
        excused = reasons(source, function)
        used += len(excused)
        place = f"{source.path}:{function.lineno}: {function.name}"
        for kind, size, most in (("long", lines, MOST_LINES), ("many parameters", parameters, MOST_PARAMETERS)):
            if size > most and kind not in excused:
                yield f"{place}: {size} ({kind}, at most {most}): make it smaller, or say why: # {kind}: REASON"
            if size <= most and kind in excused:
                yield f"{place}: {size} is not {kind}: drop the comment"
    written = sum(bool(re.match(r"\s*# (long|many parameters):", line)) for line in source.lines)
    if written != used:
        yield f"{source.path}: {written - used} reasons are empty or stand above no function"


def faults_of_docstrings(source: Source) -> Iterator[str]:
    """Docstrings that open with a question word."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function):
            first = (ast.get_docstring(node) or "").split(maxsplit=1)[:1]
            if first and first[0].rstrip(",.:") in OPENINGS:
                yield f"{source.path}:{getattr(node, 'lineno', 1)}: opens with {first[0]!r}"


def public_names(tree: ast.Module) -> Iterator[str]:
    """Classes and constants that a module defines."""
    for node in tree.body:
        names: list[str] = []
        if isinstance(node, ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name) and target.id.isupper()]
        yield from (name for name in names if not name.startswith("_"))


def homonyms(found: Iterable[Source]) -> dict[str, list[str]]:
    """Public names that several modules define."""
    modules: dict[str, list[str]] = defaultdict(list)
    for source in found:
        for name in set(public_names(source.tree)):
            modules[name].append(source.path)
    return {name: paths for name, paths in modules.items() if len(paths) > 1}


def faults_of_words(source: Source) -> Iterator[str]:
    """Private words among the identifiers of a module and in its path."""
    names = set(Path(source.path).with_suffix("").parts)
    for node in ast.walk(source.tree):
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(value := getattr(node, field, None), str):
                names |= set(value.split("."))
    for word in sorted(names & PRIVATE_WORDS.keys()):
        yield f"{source.path}: {word!r} is called {PRIVATE_WORDS[word]!r}"


def test_functions_are_short_and_take_few_parameters() -> None:
    found = [fault for source in sources(*PRODUCT, "tests", "setup.py") for fault in faults_of_size(source)]
    assert not found, "\n".join(found)


def test_docstrings_open_with_a_noun_or_an_imperative() -> None:
    found = [fault for source in sources(*PRODUCT, "tests") for fault in faults_of_docstrings(source)]
    assert not found, "\n".join(found)


def test_a_public_name_is_of_one_thing() -> None:
    found = homonyms(sources(*PRODUCT))
    assert found.keys() == SHARED_NAMES.keys(), found


def test_private_words_are_gone() -> None:
    found = [fault for source in sources("engine") for fault in faults_of_words(source)]
    assert not found, "\n".join(found)


def test_all_of_the_project_is_read() -> None:
    paths = {source.path for source in sources(*PRODUCT, "tests", "setup.py")}
    assert {"engine/__init__.py", "kernels/philox.py", "pipelines/splits.py", "setup.py"} <= paths
    assert not any(path.startswith(("engine/kernels/", "engine/pipelines/")) for path in paths)


def source_of(text: str) -> Source:
    return Source("made.py", text.splitlines(), ast.parse(text))


LONG = "def f():\n" + "    x = 0\n" * MOST_LINES
SHORT = LONG.replace("    x = 0\n", "", 1)
WIDE = "def f(first, {}): ...\n".format(", ".join(f"p{number}" for number in range(MOST_PARAMETERS)))
METHOD = WIDE.replace("first", "self")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (SHORT, 0),
        (LONG, 1),
        ("# long: a table\n" + LONG, 0),
        ("# long: a table\n# and more\n@decorator\n" + LONG, 0),
        ("# long:\n" + LONG, 2),
        ("# long: a table\n\n" + LONG, 2),
        ("# long: a table\n" + SHORT, 1),
        (METHOD, 0),
        (WIDE, 1),
        (METHOD.replace("p0", "*, key, p0"), 1),
        ("# many parameters: as the op has\n" + WIDE, 0),
        ("# many parameters: as the op has\n" + METHOD, 1),
    ],
)
def test_sizes_are_counted_and_reasons_asked_for(text: str, count: int) -> None:
    assert len(list(faults_of_size(source_of(text)))) == count


def test_what_the_other_checks_find() -> None:
    text = '"""Whether."""\nclass A:\n    """Of, say."""\ndef meet():\n    """Offer."""\nLIMIT: int = 3\n'
    text += "_B = C_D = 1\n"
    source = source_of(text)
    assert len(list(faults_of_docstrings(source))) == 2
    assert list(public_names(source.tree)) == ["A", "LIMIT", "C_D"]
    assert list(faults_of_words(source)) == ["made.py: 'meet' is called 'barrier'"]
    assert homonyms([source, source._replace(path="other.py")]).keys() == {"A", "LIMIT", "C_D"}
