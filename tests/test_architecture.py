"""The arrow of imports: each module may import only what stands before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the bottom up. A module may import those of its own layer and of the layers above it in this list.
LAYERS = (
    ("semantics", "names", "yaml_text", "stopping", "files", "faults", "terminal", "hostmemory"),
    ("config",),
    ("methods", "recipes", "kernels", "schedule", "tensor_files"),
    ("plan", "class_names", "state_dicts"),
    ("pipelines", "models"),
    ("precision", "attack", "weights", "rundir", "results", "reporter", "optimizer", "layout"),
    ("distributed", "twin", "streams", "speed", "masking", "autoattack", "profiling"),
    ("adversary",),
    ("networks", "averaging", "awp", "ledger"),
    ("step", "evaluate", "journal"),
    ("learner", "telemetry", "checkpoints"),
    ("plots", "teachers", "resuming"),
    ("provenance",),
    ("trainer", "evaluation", "data", "report", "launcher", "doctor"),
    ("seeds",),
    ("cli",),
    ("__main__",),
)
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}


def imports_of(path: Path) -> set[str]:
    """First parts of the modules of engine that a file imports, wherever in the file, types aside."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "engine":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("engine."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("engine.")}
    return found - {"__version__"}


def modules() -> list[tuple[str, Path]]:
    files = [(path.stem, path) for path in (ROOT / "engine").glob("*.py") if path.stem != "__init__"]
    for room in ("kernels", "pipelines", "engine/models", "engine/recipes"):
        files += [(Path(room).name, path) for path in (ROOT / room).rglob("*.py")]
    return files


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: getattr(value, "name", value))
def test_modules_import_only_what_stands_before_them(module: str, path: Path) -> None:
    for imported in imports_of(path):
        assert RANK[imported] <= RANK[module], f"{module} imports {imported}"


@pytest.mark.parametrize("room", ["kernels", "pipelines"])
def test_rooms_at_the_top_import_little_of_engine(room: str) -> None:
    allowed = {"kernels": {"kernels"}, "pipelines": {"pipelines", "kernels", "config", "files", "names"}}[room]
    for path in (ROOT / room).rglob("*.py"):
        assert imports_of(path) <= allowed, path


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["methods"], ["recipes"], ["--version"]])
def test_help_does_not_wait_for_torch(command: list[str]) -> None:
    code = (
        "import sys\nfrom engine.cli import main\nsys.argv = ['engine'] + sys.argv[1:]\n"
        "try:\n    main()\nexcept SystemExit as leaving:\n    assert not leaving.code, leaving.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True)
