"""Run the tests that the benchmarks ask for: `python -m bench.gate`.

A benchmark times nothing while one of its tests fails. Tests that passed leave a mark, which `tests_pass` accepts
instead of running them again, as long as sources, native library, device and versions are those of the mark.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import torch

from bench.lib import command, passed_tests
from engine.common import optional
from engine.common.files import replacing
from engine.kernels import dispatch
from engine.system import environment

CHECKOUT = Path(__file__).resolve().parent.parent
MARKS = CHECKOUT / "build" / "gate"
NATIVE_LIBRARY = CHECKOUT / "kernels" / "_native.so"
ROOMS = ("engine", "kernels", "pipelines", "bench", "tests")
BUILD_FILES = ("pyproject.toml", "CMakeLists.txt")
NO_SOURCES = {"__pycache__", "results"}  # folders
MOST_JOBS = 8
# Everything that a bench asks for, by the device that it is asked for.
TESTS = {
    "cpu": (
        *(f"tests/kernels/test_{op}.py" for op in dispatch.SERVED_BY),
        "tests/kernels/test_table.py",
        "tests/pipelines/test_contract.py",
        "tests/pipelines/test_tensor.py",
        "tests/training/test_exactness.py",
    ),
    "cuda": ("tests/gpu", "tests/bench/lib/test_cuda_clock.py"),
}
SELECTED = {"cpu": "not slow and not gpu", "cuda": "not slow"}


@dataclass(frozen=True)
class State:
    """State that a test's result depends on. sources, library: SHA-256 of contents; empty without a library."""

    sources: str
    library: str
    device: str
    python: str
    torch: str
    triton: str


@dataclass(frozen=True)
class Mark:
    """Tests that passed. paths: where they were looked for, below the root; ops: only those that name one, or all.

    passed: `path::name` of each.
    """

    date: str
    commit: str
    state: State
    paths: tuple[str, ...]
    ops: tuple[str, ...]
    passed: tuple[str, ...]

    def covers(self, paths: Sequence[str], ops: Sequence[str]) -> bool:
        """True if these tests were all among those that ran, and one of them passed."""
        within = all(any(Path(path).is_relative_to(mine) for mine in self.paths) for path in paths)
        named = not self.ops or (bool(ops) and {*ops} <= {*self.ops})
        return within and named and any(_belongs(test, paths, ops) for test in self.passed)


def checks(ops: Sequence[str], device_type: str) -> list[Path]:
    """Paths of the tests of the ops, in the implementations that serve on a device."""
    if device_type == "cuda":
        return [CHECKOUT / "tests" / "gpu"]
    return [CHECKOUT / "tests" / "kernels" / f"test_{name}.py" for name in (*ops, "table")]


def tests_pass(paths: Sequence[Path], ops: Sequence[str], device_type: str) -> bool:
    """True if the fast tests there that name one of the ops pass; False if there are none.

    A mark that covers them counts, else they run, in a process of its own.
    """
    asked = [_below_root(path) for path in paths]
    state = state_of(device_type)
    for path, mark in marks(device_type):
        if mark.state == state and mark.covers(asked, ops):
            click.echo(f"tests: passed at {mark.date} on this device, of the same sources ({path})")
            return True
    return run(asked, ops, device_type, state, ["-x"])


def run(
    paths: Sequence[str], ops: Sequence[str], device_type: str, state: State, options: Sequence[str] = ()
) -> bool:
    """Run the tests in a process of its own; leave a mark if one passed and none failed, else remove the marks."""
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        passed_tests.__name__,
        "-m",
        SELECTED[device_type],
        *options,
    ]
    if ops:
        line += ["-k", " or ".join(ops)]
    began = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "passed_tests.json"
        variables = os.environ | {passed_tests.VARIABLE: str(report)}
        code = subprocess.run(  # noqa: S603  # no shell
            [*line, *(str(CHECKOUT / path) for path in paths)], cwd=CHECKOUT, env=variables, check=False
        ).returncode
        names = json.loads(report.read_text(encoding="utf-8")) if report.exists() else []
    if code or not names:
        for path in MARKS.glob(f"{device_type}-*.json"):
            path.unlink()
        return False
    if state_of(device_type) != state:
        click.echo("tests: passed; the sources were changed meanwhile, so there is no mark")
        return True
    tests = tuple(_below_root(Path(name)) for name in names)
    mark = Mark(began, environment.commit() or "", state, (*paths,), (*ops,), tests)
    click.echo(f"tests: {len(tests)} passed, noted in {leave(mark, device_type)}")
    return True


def state_of(device_type: str) -> State:
    """State of this checkout, on this machine."""
    on_gpu = device_type == "cuda" and torch.cuda.is_available()
    return State(
        sources=digest(),
        library=hashlib.sha256(NATIVE_LIBRARY.read_bytes()).hexdigest() if NATIVE_LIBRARY.exists() else "",
        device=torch.cuda.get_device_name() if on_gpu else environment.processor(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=optional.version("triton") or "",
    )


def digest() -> str:
    """SHA-256 of names and contents of all sources: a copy of the tree has no commit."""
    found = hashlib.sha256()
    for path in sources():
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        found.update(f"{path.relative_to(CHECKOUT).as_posix()} {content}\n".encode())
    return found.hexdigest()


def sources() -> Iterator[Path]:
    """Every file that a result may depend on, and none that a test or a measurement writes."""
    yield from (CHECKOUT / name for name in BUILD_FILES)
    for room in ROOMS:
        for folder, folders, files in os.walk(CHECKOUT / room):  # links to folders are not followed
            folders[:] = sorted({*folders} - NO_SOURCES)
            for name in sorted(files):
                if not name.startswith(".") and not name.endswith((".md", ".pyc", ".so", ".part")):
                    yield Path(folder, name)


def marks(device_type: str) -> Iterator[tuple[Path, Mark]]:
    """Marks that can be read, with their paths; a line for each other one."""
    for path in sorted(MARKS.glob(f"{device_type}-*.json")):
        try:
            yield path, _mark(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, KeyError, TypeError, ValueError) as error:
            click.echo(f"tests: {path} is no mark and does not count: {error}")


def leave(mark: Mark, device_type: str) -> Path:
    """Write a mark, in the place of an older one of the same tests, and return where."""
    MARKS.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(json.dumps([mark.paths, mark.ops]).encode()).hexdigest()[:12]
    path = MARKS / f"{device_type}-{name}.json"
    with replacing(path) as beside:
        beside.write_text(json.dumps(asdict(mark), indent=1) + "\n", encoding="utf-8")
    return path


def _mark(found: object) -> Mark:
    """The mark of a file's content. Raises TypeError or ValueError where it is none."""
    if not isinstance(found, dict):
        raise ValueError("it holds no table")
    lists: dict[str, Any] = {name: found.pop(name, None) for name in ("paths", "ops", "passed")}
    for name, values in lists.items():
        if not isinstance(values, list):
            raise ValueError(f"{name} is no list")
        lists[name] = tuple(values)
    mark = Mark(**found | lists | {"state": State(**found["state"])})
    texts = (mark.date, mark.commit, *asdict(mark.state).values(), *mark.paths, *mark.ops, *mark.passed)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("an entry is no text")
    return mark


def _below_root(path: Path) -> str:
    """Path relative to the checkout where it lies there."""
    return (path.relative_to(CHECKOUT) if path.is_relative_to(CHECKOUT) else path).as_posix()


def _belongs(test: str, paths: Sequence[str], ops: Sequence[str]) -> bool:
    """True if a run of the tests in the paths that name one of the ops would have had this one."""
    file = test.partition("::")[0]
    named = test[file.rfind("/") + 1 :].lower()
    return any(Path(file).is_relative_to(path) for path in paths) and (
        not ops or any(op.lower() in named for op in ops)
    )


@command.command
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), help="Processes at the same time. [processors, 8 at most]")
def main(device: str, jobs: int | None) -> None:
    """Run the tests that the benches ask for, once, and leave a mark that they accept."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: there is no CUDA device; known here: cpu")
    options = []
    if importlib.util.find_spec("xdist"):
        # The implementations serve a module one after the other, and what was measured is kept in its process.
        options = ["-n", str(jobs or min(MOST_JOBS, os.cpu_count() or 1)), "--dist", "loadscope"]
    elif jobs:
        raise click.UsageError(f"--jobs {jobs}: it needs pytest-xdist")
    if not run(TESTS[device], (), device, state_of(device), options):
        raise click.ClickException("the tests do not pass, or none ran: older marks are removed")


if __name__ == "__main__":
    main()
