"""The arrow of imports, by wing and inside each wing: a module may import only what stands before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import engine

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up: a wing, what belongs into it, and its modules, of which each may import those of its own
# group and of the groups before it, and everything of the wings before. "" is engine/ itself.
WINGS: tuple[tuple[str, str, tuple[tuple[str, ...], ...]], ...] = (
    (
        "common",
        "what needs nothing else of the engine",
        (
            (
                "lookup",
                "numbers",
                "optional",
                "yaml_text",
                "stopping",
                "files",
                "wrapping",
                "console",
                "host_memory",
                "pictures",
            ),
            ("errors", "pictures", "standard_streams", "tensor_files"),
        ),
    ),
    (
        "",
        "what a run is, without torch",
        (("objectives",), ("config",), ("methods",)),
    ),
    ("kernels", "the ops of a step", ()),
    (
        "pipelines",
        "data",
        (
            ("base", "crops", "sampling", "splits"),
            ("reading.held_out", "reading.tree"),
            ("reading.decoding",),
            ("reading.folder",),
            ("reading.encoded", "reading.npz"),
            ("reading", "reading.beton", "reading.published"),
            ("datasets", "mixing", "prefetching", "tensor"),
            ("extra",),
            ("dali", "ffcv.repairs", "images.augmentation"),
            ("ffcv.loader",),
            ("ffcv", "ffcv.pipeline", "images", "images.pipeline"),
            ("ffcv.beton_writer",),
            ("selection",),
        ),
    ),
    (
        "models",
        "networks, and networks from files",
        (
            ("layers", "depth", "normalize", "class_names", "state_dicts", "safetensors_files"),
            ("architecture", "networks", "sync_batch_norm"),
            ("networks.resnet", "networks.preactresnet", "networks.wideresnet", "networks.mobilenetv2"),
            ("networks.imagenet_resnet", "networks.silu_wideresnet"),
            ("libraries", "robustbench"),
            ("__init__",),
            ("matching",),
            ("weights",),
            ("pretrained",),
        ),
    ),
    (
        "system",
        "devices, number formats, processes, streams",
        (
            ("precision", "streams", "layout", "graphs", "memory"),
            ("environment", "distributed"),
            ("data_parallel", "launcher"),
        ),
    ),
    (
        "attacks",
        "attacks on images",
        (
            ("parts", "pgd"),
            ("autoattack", "masking", "overfitting", "twin", "auto", "auto.losses", "auto.search", "auto.windows"),
            ("adversary", "checks", "evaluated", "fast", "auto.apgd", "auto.fab", "auto.pool", "auto.square"),
            ("auto.adaptive",),
            ("auto.standard",),
            ("kinds",),
            ("table",),
        ),
    ),
    (
        "deployment",
        "trained networks in use",
        (
            ("artefacts", "artefacts.facts", "artefacts.archives", "exporting", "exporting.formats"),
            ("artefacts.black_box",),
            ("opening", "exporting.programs", "exporting.plain_source", "exporting.quantization"),
            ("exporting.writers", "exporting.agreement"),
            ("exporting.model_card",),
            ("image_files", "views", "challenges"),
            ("predicting",),
            ("predicted_files",),
        ),
    ),
    (
        "training",
        "a training step and what surrounds it",
        (
            ("plan", "schedule", "factors"),
            ("weights", "weights.half_weights", "weights.averaging", "weights.awp", "step_networks"),
            ("weights.sgd",),
            ("weights.optimizer",),
            ("capture", "capture.step_numbers", "method_text"),
            ("performance", "performance.profiling", "performance.speed", "performance.forecast", "step"),
            ("capture.captured_step", "micro_batch", "telemetry"),
            ("learner",),
        ),
    ),
    (
        "evaluation",
        "accuracy under attacks",
        (
            ("dataset_items", "partial_results", "reports", "results"),
            ("statistics", "statistics.intervals", "statistics.paired"),
            (
                "files",
                "files.hits",
                "files.adversarial",
                "files.verdicts",
                "files.kept_images",
                "files.image_grid",
                "files.class_plots",
            ),
            ("arguments", "batches", "whole_set"),
            ("measure", "candidates", "robustbench"),
            ("files.candidate_plots", "files.pictures", "pseudo_labels"),
            ("evaluate_checkpoint",),
            ("files.verification", "files.epsilons", "files.artefact_check"),
        ),
    ),
    (
        "plugins",
        "what users bring: methods, models, data, attacks, loggers",
        (
            ("origins", "guests", "builtin_loggers", "builtin_loggers.numbers_of", "builtin_loggers.run_facts"),
            (
                "builtin_loggers.delivery",
                "builtin_loggers.to_mlflow",
                "builtin_loggers.to_trackio",
                "builtin_loggers.to_wandb",
            ),
            ("builtin_loggers.table",),
            ("imports", "loggers", "own_data"),
            ("register",),
            ("objects",),
        ),
    ),
    (
        "runs",
        "runs from beginning to end",
        (
            ("run_directory", "checkpoints", "metrics_writer", "resuming", "format_probe"),
            ("reporting", "reporting.axes", "reporting.tables", "reporting.card_facts", "session"),
            ("reporting.page", "reporting.plots"),
            ("reporting.reading",),
            ("reporting.lines", "reporting.run_section"),
            ("reporting.benchmarks", "reporting.comparison", "reporting.curves", "reporting.paper_rows"),
            ("reporting.html_report",),
            ("teachers",),
            ("provenance",),
            ("assemble",),
            ("trainer", "compare_teachers"),
            ("lifecycle",),
            ("seeds",),
        ),
    ),
    (
        "commands",
        "the command line",
        (
            ("completion", "tables"),
            ("options",),
            ("key_options",),
            ("train", "evaluate", "teachers", "data", "reports", "deployment", "doctor", "lists"),
            ("inspect",),
            ("cli",),
        ),
    ),
)
NAMES = tuple(name for name, _, _ in WINGS)
MOST_ENTRIES = 14
"""Entries of a folder of engine/, of which a newcomer should take in all."""


def wing_of(module: str) -> str:
    """Name of the wing of a module, e.g. "training" of "engine.training.step"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in NAMES else ""


def rank_in_wing(module: str) -> int:
    """Number of its group in its wing. Raises AssertionError where it stands in none."""
    wing = wing_of(module)
    _, purpose, groups = WINGS[NAMES.index(wing)]
    parts = module.split(".")
    own = parts[2:] or ["__init__"] if wing else parts[1:2]
    for name in (".".join(own), own[0]):  # a folder's modules may stand in groups of their own
        for rank, group in enumerate(groups):
            if name in group:
                return rank
    place = f"engine/{wing}" if wing else "engine"
    raise AssertionError(
        f"{module} stands in no group of {place} ({purpose}): add it to WINGS in tests/test_architecture.py, or "
        f"move it where it belongs: {'; '.join(f'{name}: {what}' for name, what, _ in WINGS if name)}"
    )


def imports_of(path: Path) -> set[str]:
    """Modules of engine that a file imports, wherever in the file, types aside."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "engine":
            module = str(node.module)
            found |= {name if is_module(name := f"{module}.{alias.name}") else module for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("engine.")}
    return found - {"engine"}


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def modules() -> list[tuple[str, Path]]:
    """Every module of engine with its file; kernels/ and pipelines/ by the links that lead to them."""
    files = [path for path in (ROOT / "engine").rglob("*.py") if path.parent != ROOT / "engine"]
    files += [path for path in (ROOT / "engine").glob("*.py") if path.stem not in ("__init__", "__main__")]
    for room in ("kernels", "pipelines"):
        files += (ROOT / "engine" / room).glob("**/*.py")
    named = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files
    }
    return sorted(named.items())


def complaint(module: str, imported: str) -> str:
    """The fault of an import, and where the importing module belongs; empty where there is none."""
    mine, theirs = wing_of(module), wing_of(imported)
    if mine != theirs:
        if NAMES.index(theirs) < NAMES.index(mine):
            return ""
        where = f"engine/{theirs}"
        return (
            f"{module} imports {imported}, which stands above it: what needs {where} ({purpose_of(theirs)}) "
            f"belongs into {where} or a wing after it"
        )
    if not WINGS[NAMES.index(mine)][2] or rank_in_wing(imported) <= rank_in_wing(module):
        return ""
    return f"{module} imports {imported}, which comes after it in engine/{mine}: see WINGS"


def purpose_of(wing: str) -> str:
    return WINGS[NAMES.index(wing)][1]


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: "" if isinstance(value, Path) else value)
def test_modules_import_only_what_stands_before_them(module: str, path: Path) -> None:
    if path.name == "__init__.py" and module.count(".") == 1 and wing_of(module) not in ("models", "kernels"):
        assert not imports_of(path) or module in ("engine.config", "engine.config.recipes"), (
            f"{module}: the __init__ of a wing imports nothing"
        )
        return
    if WINGS[NAMES.index(wing_of(module))][2]:
        rank_in_wing(module)
    for imported in imports_of(path):
        assert not complaint(module, imported), complaint(module, imported)


@pytest.mark.parametrize(
    ("module", "imported", "told"),
    [
        ("engine.attacks.pgd", "engine.training.step", "belongs into engine/training or a wing after it"),
        ("engine.training.plan", "engine.training.learner", "comes after it in engine/training"),
        ("engine.common.files", "engine.config", "which stands above it"),
        (
            "engine.pipelines.reading.folder",
            "engine.pipelines.reading.beton",
            "comes after it in engine/pipelines",
        ),
    ],
)
def test_an_import_upwards_is_told_in_a_sentence(module: str, imported: str, told: str) -> None:
    assert told in complaint(module, imported)


def test_a_module_in_no_group_is_told_where_it_may_belong() -> None:
    with pytest.raises(
        AssertionError, match=r"stands in no group of engine/training .* runs: runs from beginning"
    ):
        rank_in_wing("engine.training.somewhere")


def test_every_module_that_is_named_is_there() -> None:
    for wing, _, groups in WINGS:
        for name in (name for group in groups for name in group):
            parts = ("engine", wing, name) if wing else ("engine", name)
            assert is_module(".".join(part for part in parts if part != "__init__")), (wing, name)


@pytest.mark.parametrize("folder", ["engine", *(f"engine/{name}" for name in NAMES if name)])
def test_a_folder_is_small_enough_to_be_taken_in(folder: str) -> None:
    hidden = ("__init__.py", "__main__.py", "__pycache__", "py.typed")
    here = [path for path in (ROOT / folder).iterdir() if not path.is_symlink()]  # links to rooms at the top
    entries = [path.name for path in here if path.name not in hidden and path.suffix != ".so"]
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


@pytest.mark.parametrize("room", ["kernels", "pipelines"])
def test_rooms_at_the_top_import_little_of_engine(room: str) -> None:
    allowed = {
        "kernels": ("engine.kernels",),
        "pipelines": ("engine.pipelines", "engine.kernels", "engine.config"),
    }
    common = ("files", "host_memory", "lookup", "numbers", "optional") if room == "pipelines" else ()
    for path in (ROOT / room).rglob("*.py"):
        for imported in imports_of(path):
            own = imported.removeprefix("engine.common.")
            assert imported.startswith(allowed[room]) or own in common, (path, imported)


@pytest.mark.parametrize("earlier", engine.EARLIER_NAMES)
def test_earlier_names_lead_to_the_same_module(earlier: str) -> None:
    now = engine.EARLIER_NAMES[earlier]
    assert is_module(now)
    assert not is_module(earlier), f"{earlier} is a file again: its earlier name hides nothing"
    code = (
        f"import importlib\nearlier = importlib.import_module({earlier!r})\n"
        f"now = importlib.import_module({now!r})\n"
        f"assert earlier is now and now.__spec__.name == now.__name__ == {now!r}\n"
        f"from engine import {earlier.partition('.')[2]} as third\nassert third is now\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "command", [["--help"], ["train", "--help"], ["predict", "--help"], ["methods"], ["recipes"], ["--version"]]
)
def test_help_does_not_wait_for_torch(command: list[str]) -> None:
    code = (
        "import sys\nfrom engine.commands.cli import main\nsys.argv = ['engine'] + sys.argv[1:]\n"
        "try:\n    main()\nexcept SystemExit as leaving:\n    assert not leaving.code, leaving.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True)
