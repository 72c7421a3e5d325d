"""Files, modules and installed packages that register names of their own.

A file is run only where a user names it: by `--import`, or by `load` in Python. What a configuration or a
checkpoint says under `imports` is compared with that and never run.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.common.files import expand_user, regular_file
from engine.config import RunConfig
from engine.plugins.guests import told
from engine.plugins.origins import REGISTERED, Origin, registering

GROUP = "engine.plugins"
"""Entry points of installed packages: a module that registers its names, or a function that does when called."""

LARGEST_FILE = 10_000_000

_loaded: dict[str, Origin] = {}
_installed: list[str] = []


def load(*names: str) -> tuple[str, ...]:
    """Run files PATH.py and import modules package.module, so that they register their names.

    One that was loaded before is run again only where its content has changed.
    Returns the files with their absolute paths, and the modules, as `imports` of a configuration has them.
    Raises ValueError, one line, for what is no such file or module, and for whatever its code raises.
    """
    return tuple(_load_file(name) if name.endswith(".py") or "/" in name else _load_module(name) for name in names)


def arguments(config: RunConfig) -> list[str]:
    """Arguments of a command by which other processes import what a configuration needs, as this one has.

    Raises ValueError as `check_loaded` does.
    """
    check_loaded(config)
    return [word for name in config.imports for word in ("--import", name)]


def load_installed(say: Callable[[str], object]) -> None:
    """Let the entry points of installed packages register their names, once a process.

    One that fails is told of in one line, and the others are loaded.
    """
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        package = "unknown" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
        key = f"{package}: {entry.name} = {entry.value}"
        if key in _installed:
            continue
        _installed.append(key)
        origin = Origin(package, hashlib.sha256(key.encode()).hexdigest(), package)
        try:
            with registering(origin):
                found = entry.load()
                if callable(found):
                    found()
        except Exception as error:
            say(f"Warning: the plugin {entry.value} of the package {package} failed: {told(error)}")


def check_loaded(config: RunConfig) -> None:
    """Raise ValueError where a configuration names what was not imported: only its user may run it."""
    if missing := [name for name in config.imports if name not in _loaded]:
        needed = " ".join(f"--import {name}" for name in missing)
        raise ValueError(
            f"imports: this run needs {needed}; no file is run only because a configuration names it (in Python: "
            "engine.plugins.imports.load)"
        )


def record(config: RunConfig) -> dict[str, Any]:
    """Files and packages of a run for provenance.json: hashes of its imports, and packages whose names it uses."""
    used = {REGISTERED[key] for key in _names(config) if key in REGISTERED}
    return {
        "imports": {name: _loaded[name].version for name in config.imports},
        "packages": sorted({origin.package for origin in used if origin.package is not None}),
    }


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each import or package that is another than before. before, now: as of `record`."""
    lines = [
        f"{name} changed since this run's last session"
        for name, version in now["imports"].items()
        if before.get("imports", {}).get(name, version) != version
    ]
    packages = before.get("packages", now["packages"])
    if packages != now["packages"]:
        lines.append(
            f"the plugin packages were {', '.join(packages) or 'none'}, and are "
            f"{', '.join(now['packages']) or 'none'}"
        )
    return lines


def _names(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Kind and name of everything that a run uses and users may register."""
    yield from (("method", config.method.partition("+")[0]), ("dataset", config.dataset))
    for model in (config.model, config.teacher.model, config.teacher_st.model):
        yield ("model", str(model))
    yield from (("attack", name) for name in (config.eval.attack, *config.eval.final))
    yield from (("logger", name) for name in config.loggers)


def _load_file(name: str) -> str:
    path = expand_user("--import", name).absolute()
    if path.suffix != ".py":
        raise ValueError(f"--import: {name!r} is no Python file NAME.py and no module package.module")
    try:
        source = regular_file(path, LARGEST_FILE).read_bytes()
    except OSError as error:
        raise ValueError(f"--import: cannot read {name}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"--import: {error}") from None
    origin = Origin(str(path), hashlib.sha256(source).hexdigest())
    if _loaded.get(str(path)) == origin:
        return str(path)
    # Compiled here and not by the import system: what is run is what was hashed, and nothing is written beside it.
    module_name = f"engine_import_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"
    spec = importlib.machinery.ModuleSpec(module_name, None, origin=str(path))
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[module_name] = module  # dataclasses, for one, look themselves up there
    with _one_line(name), registering(origin):
        exec(compile(source, str(path), "exec"), module.__dict__)  # noqa: S102  # its user named it
    _loaded[str(path)] = origin
    return str(path)


def _load_module(name: str) -> str:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"--import: {name!r} is no Python file NAME.py and no module package.module")
    if name in _loaded:
        return name
    if name in sys.modules:  # it has registered its names by itself
        _loaded[name] = _origin_of(name, sys.modules[name])
        return name
    with _one_line(name), _without_current_folder():
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(
                f"no module of that name is installed (a file is named by its path, {name}.py)"
            )
        with registering(Origin(name, "")):
            module = importlib.import_module(name)
    _loaded[name] = _origin_of(name, module)
    for key, origin in REGISTERED.items():
        if origin.where == name:
            REGISTERED[key] = _loaded[name]
    return name


def _origin_of(name: str, module: ModuleType) -> Origin:
    file = getattr(module, "__file__", None)
    content = Path(file).read_bytes() if file is not None else name.encode()
    return Origin(name, hashlib.sha256(content).hexdigest())


@contextmanager
def _without_current_folder() -> Iterator[None]:
    """No module is looked for in the current folder where Python would do so by itself."""
    before = list(sys.path)
    sys.path[:] = [place for place in before if place]
    try:
        yield
    finally:
        sys.path[:] = before


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Raise whatever a file's code raises as a ValueError of one line with its place."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ValueError(f"--import {name}: {told(error)}") from error
