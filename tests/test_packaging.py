"""Wheel, sdist, their metadata, an installation outside the tree, and the files that a forge reads."""

from __future__ import annotations

import email
import re
import shutil
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import yaml

import engine
from tests.packages import ROOT, contents, make, run

CITATION: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
CONSTRAINTS = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
TOP = {"CHANGELOG.md", "CITATION.cff", "CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, with rubbish in it as it gathers in one that is worked in."""
    copy = tmp_path_factory.mktemp("source") / "engine"
    copy.mkdir()
    for name in (*TOP, "setup.py", "Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, copy)
    for name in ("bench", "docs", "engine", "examples", "kernels", "pipelines", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for rubbish in ("build/lib/engine/evaluate.py", ".gpu/data/images.bin", "runs/first/last.pt", "notes.py"):
        (copy / rubbish).parent.mkdir(parents=True, exist_ok=True)
        (copy / rubbish).write_text("rubbish = True\n")
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("wheel", source, tmp_path_factory.mktemp("wheel"), ENGINE_NATIVE="0")


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unpacked sdist."""
    out = tmp_path_factory.mktemp("sdist")
    with tarfile.open(make("sdist", source, out, ENGINE_NATIVE="0")) as archive:
        archive.extractall(out, filter="data")
    return out / f"iad_engine-{engine.__version__}"


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    return email.message_from_string(contents(wheel, "METADATA")[1])


def package_files() -> set[str]:
    """Files of an installation, kernels/ and pipelines/ in the places of the links that lead to them."""
    recipes = (path.relative_to(ROOT).as_posix() for path in ROOT.glob("engine/config/recipes/*.yaml"))
    found = {"engine/py.typed", *recipes}
    for folder in (ROOT / "engine", ROOT / "engine" / "kernels", ROOT / "engine" / "pipelines"):
        found |= {path.relative_to(ROOT).as_posix() for path in folder.rglob("*.py")}
    return found


# ---------------------------------------------------------------- wheel and sdist


def test_the_wheel_is_the_package_and_nothing_else(wheel: Path) -> None:
    names, entry_points = contents(wheel, "entry_points.txt")
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == package_files()
    assert {name.partition("/")[2] for name in about} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt",
    }  # fmt: skip
    assert entry_points.split() == ["[console_scripts]", "engine", "=", "engine.commands.cli:main"]


def test_the_sdist_is_what_a_build_needs_and_nothing_else(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    found = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    made = {name for name in found if name.startswith("iad_engine.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    native = {f"engine/kernels/csrc/{path.name}" for path in ROOT.glob("kernels/csrc/*")}
    assert found - made == package_files() | native | TOP | {"setup.py"}
    assert not [path for path in sdist.rglob("*") if path.is_symlink()]
    assert contents(make("wheel", sdist, tmp_path, ENGINE_NATIVE="0")) == contents(wheel)


def test_the_metadata_is_complete_and_agrees_with_the_citation(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("iad-engine", CITATION["version"])
    assert metadata["License-Expression"] == CITATION["license"]
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Author"] == ", ".join(author["name"] for author in CITATION["authors"])
    assert metadata["Keywords"].split(",") == CITATION["keywords"]
    assert metadata["Summary"].lower().endswith(CITATION["title"].removeprefix("engine: a "))
    assert metadata.get_all("Project-URL")
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_extra_that_is_named_exists(metadata: Message) -> None:
    extras = set(metadata.get_all("Provides-Extra", []))
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("engine/**/*.py")]
    texts = [MAKEFILE, *metadata.get_all("Requires-Dist", [])]
    texts += [page.read_text(encoding="utf-8") for page in pages]
    named = {
        extra
        for text in texts
        for given in re.findall(r"(?:'\.|engine)\[([\w,-]+)\]", text)
        for extra in given.split(",")
    }
    assert {"dev", "dali", "ffcv", "test", "docs"} <= named
    assert named <= extras


# ---------------------------------------------------------------- an installation


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment with the wheel in it; torch and the others are this one's."""
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    options = ("--quiet", "--no-index", "--no-deps", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "parent.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def test_an_installed_wheel_tells_its_version_and_needs_no_checkout(installed: Path, tmp_path: Path) -> None:
    program = """
import engine
from engine.attack import pgd
from engine.pipelines import tensor
print(engine.__file__, pgd.__code__.co_filename, tensor.__file__)
"""
    files = run(installed / "python", "-c", program, cwd=tmp_path).split()
    assert len(files) == 3
    assert all(Path(file).is_relative_to(installed.parent) for file in files), files
    assert run(installed / "engine", "--version", cwd=tmp_path) == f"engine {engine.__version__}\n"


def test_an_installed_wheel_trains(installed: Path, tmp_path: Path) -> None:
    arguments = (
        "--method", "at", "--dataset", "digits", "--model", "resnet8", "--device", "cpu", "--epochs", "1",
        "--batch-size", "10", "--limit-train", "30", "--limit-test", "10", "--set", "attack.num_steps=1",
        "--set", "eval.final=[]", "--set", "eval.probe_size=2", "--set", "log_every=1", "--out", "run",
    )  # fmt: skip
    run(installed / "engine", "train", *arguments, cwd=tmp_path)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"event": "step"') == 2


# ---------------------------------------------------------------- continuous integration


def versions_of_python() -> list[str]:
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def calls(workflow: Path) -> Iterator[str]:
    """Every command that a workflow runs, for each combination of its matrix that decides a target."""
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        commands = [step["run"] for step in job["steps"] if "run" in step]
        matrix = job.get("strategy", {}).get("matrix", {})
        for values in matrix.get("include", [{}]):
            for command in commands:
                yield re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda m: str(values.get(m[1], "")), command)  # noqa: B023


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_targets_of_make_and_nothing_else(workflow: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    variables = set(re.findall(r"^(\w+) \?=", MAKEFILE, re.MULTILINE))
    words = [command.split() for command in calls(workflow)]
    assert {word[0] for word in words} == {"make"}
    arguments = {argument for word in words for argument in word[1:]}
    assert {argument.partition("=")[0] for argument in arguments if "=" in argument} <= variables
    called = {argument for argument in arguments if "=" not in argument}
    assert called <= targets
    assert called >= {"lint", "test", "test-torch211", "test-slow", "docs"}


def test_files_that_the_makefile_names_exist() -> None:
    named = re.findall(r"(?<![\w./])(?:tests|examples|kernels)/[\w/]+(?:\.\w+)?", MAKEFILE)
    assert len(named) > 10
    assert [name for name in named if not name.startswith("kernels/_native") and not (ROOT / name).exists()] == []


def test_the_matrix_is_what_is_supported() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    project = (ROOT / "pyproject.toml").read_text()
    (oldest_python,) = re.findall(r'^requires-python = ">=(.+)"$', project, re.MULTILINE)
    (oldest_torch,) = re.findall(r'"torch>=(.+)"', project)
    assert matrix["python"] == versions_of_python()
    assert matrix["python"][0] == oldest_python
    assert matrix["torch"] == [oldest_torch, minor(CONSTRAINTS["torch"])]
    assert [entry["torch"] for entry in matrix["include"]] == matrix["torch"]
    assert f"torch=={oldest_torch}.0 " in MAKEFILE


def test_the_hooks_before_a_commit_are_those_of_make_lint() -> None:
    configuration = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    ruff, local = configuration["repos"]
    assert ruff["repo"] == "https://github.com/astral-sh/ruff-pre-commit"
    assert ruff["rev"] == f"v{CONSTRAINTS['ruff']}"
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]
    assert [hook["entry"] for hook in local["hooks"]] == [".venv/bin/mypy"]


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_an_issue_form_is_one(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= content.keys()
    asked = [field for field in content["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in asked} <= {"input", "textarea", "dropdown", "checkboxes"}
    assert all(field["attributes"]["label"] for field in asked)
    assert len({field["id"] for field in asked}) == len(asked)
    assert any(field.get("validations", {}).get("required") for field in asked)
    for named in re.findall(r"docs/[\w-]+\.md", form.read_text()):
        assert (ROOT / named).is_file(), named


def test_there_are_forms_for_faults_numbers_and_requests() -> None:
    assert [form.stem for form in FORMS] == ["bug", "method-request", "wrong-number"]
    assert (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").is_file()
