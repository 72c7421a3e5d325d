"""Completion of the command line by the shell: names, paths, recipes, and KEY=VALUE of --set."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

from engine import objectives
from engine.config import semantics

if TYPE_CHECKING:
    from engine.config import Key

    _Text = click.ParamType[str]
else:
    _Text = click.ParamType  # click 8.1 has no parameter for it

Words = Callable[[str], Iterable[str]]
"""From what stands on the command line so far to what it may become."""


class Completed(_Text):
    """Text that is taken as it is, and that the shell completes to words, or where none fits to a path.

    What knows the values judges them: its line names the nearest, and that of `click.Choice` does not.
    """

    name = "text"

    def __init__(self, words: Words, *, path: Literal["file", "dir"] | None = None) -> None:
        self._words, self._path = words, path

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = [CompletionItem(word) for word in self._words(incomplete) if word.startswith(incomplete)]
        if self._path is not None and not (incomplete and found):
            return [CompletionItem(incomplete, type=self._path)]
        return found


def one_of(*words: str) -> Completed:
    """A type of which the shell knows those words."""
    return Completed(lambda incomplete: words)


def named(values: str) -> Completed:
    """A type of which the shell knows the names in a table: see `KNOWN_NAMES`."""
    return Completed(lambda incomplete: KNOWN_NAMES[values]())


def list_of(values: str) -> Completed:
    """A type of names separated by commas, of which the last is completed: see `KNOWN_NAMES`."""

    def words(incomplete: str) -> Iterator[str]:
        before = incomplete[: incomplete.rfind(",") + 1]
        yield from (f"{before}{name}" for name in KNOWN_NAMES[values]())

    return Completed(words)


def _methods() -> Sequence[str]:
    from engine import methods

    return tuple(methods.METHODS)


def _models() -> Sequence[str]:
    from engine import models

    return tuple(models.TABLE)


def _datasets() -> Sequence[str]:
    from engine.pipelines.datasets import DATASETS

    return tuple(DATASETS)


def _attacks() -> Sequence[str]:
    from engine.attacks import table

    return table.names()


def _normalisations() -> Sequence[str]:
    from engine.models import normalize

    return tuple(normalize.CONSTANTS)


def _loggers() -> Sequence[str]:
    from engine.plugins import loggers

    return loggers.known_names()


KNOWN_NAMES: dict[str, Callable[[], Sequence[str]]] = {
    "method": _methods,
    "teacher method": lambda: semantics.TEACHER_METHODS,
    "model": _models,
    "dataset": _datasets,
    "attack": _attacks,
    "attack loss": lambda: tuple(objectives.ATTACK_LOSSES),
    "normalisation": _normalisations,
    "device": lambda: ("auto", "cpu", "cuda"),
    "logger": _loggers,
}
"""Names that a value may be."""
WITHOUT_TORCH = ("method", "teacher method", "attack loss", "device", "logger")


def values_of(key: Key) -> Iterator[str]:
    """Words that a key may be set to, as far as they can be listed."""
    if bool in key.kinds:
        yield from ("true", "false")
    yield from (str(word).lower() if isinstance(word, bool) else str(word) for word in key.choices)
    if key.values in KNOWN_NAMES:
        yield from KNOWN_NAMES[key.values]()


def _assignments(incomplete: str) -> Iterator[str]:
    """KEY=VALUE of --set: keys, and values where one key is left."""
    from engine.config import KEYS

    fitting = [name for name in KEYS if f"{name}=".startswith(incomplete) or incomplete.startswith(f"{name}=")]
    if len(fitting) > 1:
        yield from (f"{name}=" for name in fitting)
        return
    for name in fitting:
        yield from (f"{name}={word}" for word in ("", *values_of(KEYS[name])))


def _recipes(incomplete: str) -> Iterator[str]:
    from engine.config import recipes

    yield from (f"recipe:{name}" for name in recipes.names())


FILE, DIR = (
    Completed(lambda incomplete: (), path="file"),
    Completed(lambda incomplete: (), path="dir"),
)
CONFIG = Completed(_recipes, path="file")
RUN = Completed(lambda incomplete: ("auto",), path="dir")
ASSIGNMENT = Completed(_assignments)


@add_completion_class
class WholeWords(BashComplete):
    """Completion in bash, which breaks words at ":" and "=": recipe:NAME and KEY=VALUE are put together again."""

    _before = ""  # of the last word, what bash takes for words of its own

    def get_completion_args(self) -> tuple[list[str], str]:
        args, incomplete = super().get_completion_args()
        whole: list[str] = []
        for word in (*args, incomplete):
            if whole and (word in (":", "=") or whole[-1].endswith((":", "="))):
                whole[-1] += word
            else:
                whole.append(word)
        self._before = re.sub(r"^--[\w-]+=|[^:=]*$", "", whole[-1])
        return whole[:-1], whole[-1]

    def format_completion(self, item: CompletionItem) -> str:
        return f"{item.type},{item.value.removeprefix(self._before)}"
