"""The documentation is true: examples run, commands parse, links lead somewhere, tables are complete."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml

import engine
from engine import config, methods, models
from engine.attacks import overfitting, table
from engine.commands.cli import commands
from engine.commands.data import Info
from engine.commands.inspect import Found
from engine.common.lookup import check_known
from engine.deployment.predicted_files import PredictedFiles, PredictionConfig
from engine.evaluation import measure
from engine.evaluation.candidates import MEASURES
from engine.evaluation.evaluate_checkpoint import EvaluationConfig, Report
from engine.evaluation.files.epsilons import Curves, Radius
from engine.kernels.contract import MAX_CLASSES
from engine.pipelines import datasets
from engine.runs.compare_teachers import TeachersConfig
from engine.runs.lifecycle import RunResult
from tests import method_tables, module_tables, recipe_tables, result_tables

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
# tests/test_tutorial.py walks the tutorial, its commands too
WITH_EXAMPLES = [page for page in PAGES if page.name != "tutorial.md"]
SCRIPTS = sorted(ROOT.glob("examples/*.sh"))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; line is that of its first line."""

    page: Path
    line: int
    language: str
    text: str


def read(page: Path) -> str:
    """Text of a page; nothing where it is missing, which one test of its own says."""
    return page.read_text(encoding="utf-8") if page.exists() else ""


def blocks(page: Path, *languages: str) -> list[Block]:
    text = read(page)
    found = [Block(page, text.count("\n", 0, m.start(2)) + 1, m[1], m[2]) for m in _FENCE.finditer(text)]
    return [block for block in found if block.language in languages]


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Place and words of every command in a block of a shell."""
    for page in PAGES:
        for block in blocks(page, "sh", "bash", "console"):
            for number, line in enumerate(block.text.replace("\\\n", "  ").splitlines()):
                if block.language == "console" and not line.startswith("$ "):
                    continue  # output
                lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
                lexer.whitespace_split = True
                words: list[str] = []
                for word in [*lexer, ";"]:
                    if set(word) <= set(";&|<>()"):
                        yield f"{page.name}:{block.line + number}", words
                        words = []
                    elif words or not re.match(r"\w+=", word):  # not a variable set for the command
                        words.append(word)


def engine_commands() -> list[Any]:
    """Arguments of every `engine ...`, and of every `torchrun ... -m engine ...`, in pages and in examples."""
    found = [(place, words[1:]) for place, words in command_lines() if words and Path(words[0]).name == "engine"]
    for place, words in [*command_lines(), *((script.name, shell_words(script)) for script in SCRIPTS)]:
        if "torchrun" in words:
            found.append((place, words[words.index("engine") + 1 :]))
    return [pytest.param(arguments, id=place) for place, arguments in found]


def shell_words(script: Path) -> list[str]:
    """Words of the command of a script that starts torchrun."""
    lines = script.read_text().replace("\\\n", " ").splitlines()
    (command,) = [line for line in lines if "torchrun " in line and not line.startswith("#")]
    return shlex.split(command.removesuffix(" &"))


def rows(page: str, heading: str = "") -> list[list[str]]:
    """Cells of every table of a page, or of the section below a heading, without the tables' own headings."""
    text = read(ROOT / "docs" / page)
    if heading:
        text = re.split(r"^## ", text.partition(f"\n## {heading}\n")[2], flags=re.MULTILINE)[0]
        assert text, heading
    lines = text.splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for above, line in zip(["", *lines], lines, strict=False)
        if line.startswith("|") and above.startswith("|") and not line.startswith("|---")
    ]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


# ---------------------------------------------------------------- pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_exists_and_its_links_lead_somewhere(page: Path) -> None:
    assert page.exists()
    text = read(page)
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(_FENCE.findall(text)), "a block is not closed"
    prose = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", read(target)), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, link


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.name)
def test_the_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": page.stem}
    with torch.random.fork_rng([]):
        for block in blocks(page, "python"):
            lines_before = "\n" * (block.line - 1)  # so that a traceback names the page's line
            exec(compile(lines_before + block.text, str(page), "exec"), namespace)  # noqa: S102  # the page's own


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_examples_are_configurations(page: Path) -> None:
    for block in blocks(page, "yaml"):
        assert isinstance(config.load(yaml.safe_load(block.text)), config.RunConfig), block


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("arguments", engine_commands())
def test_the_command_line_is_right(arguments: list[str], cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the computation is done: flags, files, keys, values, and names of all kinds."""

    def train(complete: config.RunConfig, reporter: object, **keys: Any) -> RunResult:
        methods.get(complete.method, semantics=complete.semantics, loss=complete.loss)
        models.check(complete.model)
        datasets.check(complete.dataset)
        measure.check_names((complete.eval.attack, *complete.eval.final))
        return RunResult(ROOT / "docs", {})

    def resume(path: Path, reporter: object, **keys: Any) -> RunResult:
        return RunResult(ROOT / "docs", {})

    def run(checkpoint: Path, wanted: EvaluationConfig, reporter: object, **keys: Any) -> Report:
        measure.check_names(str(name) for name in wanted.attacks)
        models.check(wanted.model or "resnet8")
        datasets.check(wanted.dataset or "digits")
        return Report("", {}, None)

    def at_radii(
        checkpoint: Path, wanted: EvaluationConfig, radii: list[Radius], *given: Any, **keys: Any
    ) -> Curves:
        return Curves("Linf", {radius: run(checkpoint, wanted, None) for radius in radii})

    def rank(paths: list[Path], wanted: TeachersConfig, *arguments: Any) -> None:
        datasets.check(wanted.dataset or "digits")
        models.check(wanted.model)
        check_known("--sort-by", wanted.sort_by, MEASURES)

    def answer(path: Path, places: list[str], wanted: PredictionConfig, reporter: object) -> PredictedFiles:
        measure.check_names([wanted.attack] if wanted.attack else [])
        return PredictedFiles({}, ())

    def write(dataset: str, *arguments: Any, **keys: Any) -> None:
        datasets.check(dataset)

    monkeypatch.setattr("engine.commands.data.write", write)
    monkeypatch.setattr("engine.runs.reporting.html_report.write", lambda paths, out, tables: None)
    monkeypatch.setattr("engine.commands.reports.compare.run", lambda networks, seed, json_path: None)
    monkeypatch.setattr("engine.commands.data.info", lambda path: Info((), (), ()))
    monkeypatch.setattr("engine.commands.inspect.look", lambda path, told: Found("", {}))
    monkeypatch.setattr("engine.commands.inspect.save", lambda path, told, out: None)
    monkeypatch.setattr("engine.system.launcher.count", lambda gpus, processes, device: 0)
    monkeypatch.setattr("engine.runs.run_directory.RunDir.existing", lambda path: (None, config.load({})))
    monkeypatch.setattr("engine.runs.seeds.train", lambda *arguments, **keys: None)
    monkeypatch.setattr("engine.runs.lifecycle.train", train)
    monkeypatch.setattr("engine.runs.lifecycle.resume", resume)
    monkeypatch.setattr("engine.commands.tables.print_summary", lambda *given: None)
    monkeypatch.setattr("engine.evaluation.evaluate_checkpoint.run", run)
    monkeypatch.setattr("engine.evaluation.files.epsilons.evaluated", at_radii)
    monkeypatch.setattr("engine.evaluation.files.verification.verify", lambda path, choices, reporter: [])
    monkeypatch.setattr("engine.deployment.image_files.paths_in", lambda stream, null: [])
    monkeypatch.setattr("engine.deployment.predicted_files.run", answer)
    monkeypatch.setattr("engine.commands.deployment.predict._write", lambda out, content, force: None)
    monkeypatch.setattr("engine.commands.deployment.export.exported", lambda path, choices, options: True)
    monkeypatch.setattr("engine.runs.compare_teachers.run", rank)
    monkeypatch.setattr("engine.commands.teachers.print_comparison", lambda reporter, report: None)
    monkeypatch.chdir(ROOT)
    outcome = cli(*arguments)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_scripts_are_scripts(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert os.access(script, os.X_OK)


def parameters_of(command: click.Command) -> list[click.Parameter]:
    """Parameters of a command, the options of keys included."""
    return command.get_params(click.Context(command))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_assignments_within_a_sentence_exist(page: Path) -> None:
    for span in code(_FENCE.sub("", read(page))):
        words = shlex.split(span) if span.startswith(("engine ", "--set ")) else []
        if words[:1] == ["engine"] and words[1].rstrip(",").isalpha():
            command = commands.commands[words[1].rstrip(",")]
            known = {
                option
                for parameter in parameters_of(command)
                for option in (*parameter.opts, *parameter.secondary_opts)
            }
            assert {word for word in words if word.startswith("-")} <= known | {"--help", "-h"}, span
        if "--set" in words and "KEY=VALUE" not in words:
            config.load(config.parse_assignment(words[words.index("--set") + 1]))


def test_targets_of_make_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {word for _, words in command_lines() if words[:1] == ["make"] for word in words[1:]}
    assert named
    assert named <= {*targets}


def test_the_pages_have_commands_and_examples() -> None:
    """Guards the tests above: a pattern that finds nothing would pass them all."""
    assert len(engine_commands()) >= 8
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 10


# ---------------------------------------------------------------- configuration.md


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return result


def documented_keys() -> dict[str, list[str]]:
    keys = {code(row[0])[0]: row[1:] for row in rows("configuration.md") if len(row) == 4}
    assert len(keys) == sum(len(row) == 4 for row in rows("configuration.md")), "a key stands twice"
    return keys


def test_the_configuration_table_lists_every_key_with_its_default() -> None:
    documented = documented_keys()
    assert documented.keys() == flat(config.RunConfig().tree()).keys()
    trees = [config.parse_assignment(f"{key}={code(row[1])[0]}") for key, row in documented.items()]
    assert config.RunConfig(**config.merge(*trees)) == config.RunConfig()


def test_the_configuration_table_lists_every_flag() -> None:
    documented = {key: code(row[0])[0] for key, row in documented_keys().items() if row[0]}
    parameters = parameters_of(commands.commands["train"])
    assert documented == {str(p.name): p.opts[0] for p in parameters if p.name in config.KEYS}


def test_the_configuration_table_names_every_choice() -> None:
    documented = documented_keys()

    def choices(section: type[config.Section], prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
        for key, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, config.Section):
                yield from choices(field.annotation, f"{prefix}{key}.")
            elif typing.get_origin(field.annotation) is typing.Literal:
                yield prefix + key, typing.get_args(field.annotation)

    tables = (
        ("method", tuple(methods.METHODS)),
        ("model", tuple(models.TABLE)),
        ("dataset", tuple(datasets.DATASETS)),
    )
    for key, names in (*choices(config.RunConfig), *tables):
        assert {str(name).lower() if isinstance(name, bool) else name for name in names} <= set(
            code(documented[key][2])
        ), key


# ---------------------------------------------------------------- evaluation.md


def test_the_attacks_are_listed_with_all_their_numbers() -> None:
    documented = {code(row[0])[0]: tuple(row[1:]) for row in rows("evaluation.md", "Attacks")}
    named = {name: row for name, row in documented.items() if name not in table.PATTERNS}
    assert {name: row[0] for name, row in named.items()} == {
        name: row.title for name, row in table.ATTACKS.items()
    }
    for name, row in table.ATTACKS.items():
        assert named[name][1:] == (row.numbers(10, (8 / 255, "Linf")), f"from {row.least_classes}", row.source)
    assert {name: row[1] for name, row in documented.items() if name not in named} == table.PATTERNS


def test_the_report_has_the_keys_that_are_listed(tiny: Any, tmp_path: Path, cli: Any) -> None:
    outcome = cli(
        "eval", str(tiny.teacher), "--dataset", "folder", "--data", str(tiny.folder), "--limit", "3",
        "--attacks", "natural,fgsm", "--out", str(tmp_path),
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    (path,) = tmp_path.glob("teachers*-at.pt-*.eval.json")
    report = json.loads(path.read_text())
    listed = {name: row[1] for row in rows("evaluation.md", "The report") for name in code(row[0])}
    assert (report["format"], [result["attack"] for result in report["results"]]) == (2, ["natural", "fgsm"])
    for result in report["results"]:
        # Of AutoAttack alone, where it is asked for, and of exported files alone.
        assert result.keys() == listed.keys() - {"adversarial", "exported"}
        for key in ("checkpoint", "data"):
            assert result[key].keys() == set(code(listed[key]))


# ---------------------------------------------------------------- run-directory.md


def test_the_run_directory_is_listed_key_by_key(
    tiny: Any, tmp_path: Path, bf16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(heading: str) -> set[str]:
        return {name for row in rows("run-directory.md", heading) for name in code(row[0])}

    found: set[str] = set()
    for method in ("trades", "iad1", "iad2"):
        run = tmp_path / method
        keys: dict[str, Any] = {"loss": {"warmup": 0}, "averaging": {"kind": "ema"}}
        keys |= {"init": str(tiny.teacher), "snapshot_every": 5}
        keys |= {"attack": {"epsilon_warmup": 2, "steps_warmup": 2}}
        engine.train(tiny.config(method=method, amp=True, out=str(run), **keys), profile=2)
        written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found |= {key for row in written for key in row}
    assert found == listed("metrics.jsonl")
    assert listed("Reliability of the teacher") == {*written[-1]["probe_cases"]} | {
        key for key in found if key.startswith("probe_") and not key.startswith("probe_amp_")
    } - {"probe_alpha"}

    one_step = tiny.config(method="fgsm-rs", loss={"warmup": 0}, attack={"num_steps": 1}, epochs=1)
    guarded = tmp_path / "guarded"
    with monkeypatch.context() as patch:
        patch.setattr(
            overfitting, "complaint", lambda row, before: "as told" if row.get("attack_steps") == 1 else ""
        )
        engine.train(one_step, overfitting_guard="rollback", out=str(guarded))
    written = [json.loads(line) for line in (guarded / "metrics.jsonl").read_text().splitlines()]
    assert {key for row in written for key in row} - found == listed("Overfitting of one-step training")

    intro = read(ROOT / "docs" / "run-directory.md").partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", intro, re.MULTILINE)
    files = {name.rstrip("/") for cell in cells for name in code(cell)}
    assert {path.name for folder in (run, guarded) for path in folder.iterdir()} | {
        "teacher",
        "teacher_st",
        "test_split.json",
        "logs",
        "log.txt",
        "summary-N.json",
        "loggers.json",
        "wandb",
    } == files

    for name in ("summary.json", "provenance.json"):
        content = json.loads((run / name).read_text())
        assert content.keys() == listed(name)
        for row in rows("run-directory.md", name):
            for key in code(row[0]):
                if key in ("hardware", "precision", "seeds", "data"):
                    assert set(code(row[1])) == content[key].keys(), key

    last, best = (torch.load(run / name, weights_only=True) for name in ("last.pt", "best.pt"))
    described = {name: row[1] for row in rows("run-directory.md", "Checkpoints") for name in code(row[0])}
    assert described.keys() == last.keys()
    assert {key for key, text in described.items() if "`last.pt` only" not in text} == best.keys()
    for key in ("model", "progress", "telemetry"):
        assert set(code(described[key])) - {"last.pt"} == last[key].keys(), key


# ---------------------------------------------------------------- reliability.md


def test_the_tests_of_each_promise_exist_and_have_that_many_cases() -> None:
    promises = rows("reliability.md")
    assert len(promises) >= 12
    for promise, tested_by, cases in promises:
        texts: list[str] = []
        for name in code(tested_by):
            if name.endswith(".py"):
                texts.append((ROOT / "tests" / name).read_text(encoding="utf-8"))
            else:
                assert f"\ndef {name}(" in texts[-1], (promise, name)
        assert texts, promise
        for name, number in re.findall(r"`(\w+) = (\d+)`", cases):
            assert any(constants(text).get(name) == int(number) for text in texts), (promise, name)


def constants(text: str) -> dict[str, object]:
    """Names at the top of a module that are given a number there, or several at once."""
    found: dict[str, object] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign):
            (target,) = node.targets
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            for name, value in zip(names, values, strict=False):
                if isinstance(name, ast.Name) and isinstance(value, ast.Constant):
                    found[name.id] = value.value
    return found


# ---------------------------------------------------------------- the others


def test_the_tables_of_modules_are_those_of_the_wings_and_the_docstrings() -> None:
    page = module_tables.PAGE.read_text(encoding="utf-8")
    assert page == module_tables.written(page), "run python -m tests.module_tables"


def test_recipes_have_the_tables_of_the_files() -> None:
    page = recipe_tables.PAGE.read_text(encoding="utf-8")
    assert {found[2] for found in recipe_tables.BLOCK.finditer(page)} == set(recipe_tables.TABLES)
    assert page == recipe_tables.written(page), "run python -m tests.recipe_tables"


@pytest.mark.parametrize("path", result_tables.PAGES, ids=lambda path: path.name)
def test_the_tables_of_results_are_those_of_the_files(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert result_tables.BLOCK.search(page)
    assert page == result_tables.written(page), "run python -m tests.result_tables"


@pytest.mark.parametrize("path", method_tables.PAGES, ids=lambda path: path.name)
def test_the_tables_of_methods_are_those_of_the_code(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert method_tables.BLOCK.search(page)
    assert page == method_tables.written(page), "run python -m tests.method_tables"


def test_the_diff_of_a_method_is_what_stands_in_the_files() -> None:
    section = read(ROOT / "CONTRIBUTING.md").partition("## Adding a method\n")[2].partition("\n## ")[0]
    (diff,) = re.findall(r"```diff\n--- (.*?)```", section, re.DOTALL)
    parts = [part.splitlines() for part in diff.split("\n--- ")]
    assert len(parts) >= 5
    for file, *lines in parts:
        known = (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if line[1:] not in known] == [], file


def test_the_tree_of_the_readme_names_every_folder() -> None:
    (tree,) = [block.text for block in blocks(ROOT / "README.md", "") if "kernels/" in block.text]
    listed = set()
    for line in tree.splitlines():
        names = re.split(r" {2,}", line.strip())[0].split()
        listed |= {f"engine/{name}" if line.startswith(" ") else name for name in names}
    assert [name for name in listed if not (ROOT / name).exists()] == []
    engine_folder = [path for path in (ROOT / "engine").iterdir() if not path.name.startswith("_")]
    inside = {f"engine/{path.name}/" for path in engine_folder if path.is_dir() and not path.is_symlink()}
    inside |= {f"engine/{path.name}" for path in engine_folder if path.suffix == ".py"}
    top = {"engine/", "kernels/", "pipelines/", "bench/", "tests/", "docs/", "examples/"}
    assert listed == inside | top


def test_the_page_of_the_kernels_tells_how_many_classes_they_take() -> None:
    assert f"more than {MAX_CLASSES:,} classes on a GPU" in read(ROOT / "docs" / "kernels.md")


def test_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == engine.__version__
    assert f"## [{engine.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    (paper,) = citation["references"]
    assert (paper["title"], paper["year"]) == ("Reliable Adversarial Distillation with Unreliable Teachers", 2022)
    assert len(paper["authors"]) == 9


# ---------------------------------------------------------------- names of files and of code

FOLDERS = ("engine", "kernels", "pipelines", "bench", "tests", "docs", "examples", ".github")
FILES = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
EXAMPLES = {"model.py", "yaml.py", "tests/kernels/test_NAME.py"}
"""Spans that look like files of the project, and stand for others."""


def spans(pattern: str) -> list[Any]:
    """Spans of code in a page's prose that a pattern matches, each once for a page."""
    pages = [*PAGES, ROOT / "bench" / "README.md"]
    found = {
        (page, span) for page in pages for span in code(_FENCE.sub("", read(page))) if re.match(pattern, span)
    }
    assert found
    return [pytest.param(span, id=f"{page.parent.name}/{page.name}:{span[:40]}") for page, span in sorted(found)]


def resolved(dotted: str) -> Any:
    """The module of that name, or what stands in one. Raises AttributeError or ImportError where there is none."""
    parts = dotted.split(".")
    found: Any = importlib.import_module(parts[0])
    for position, part in enumerate(parts[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(".".join(parts[:position]))
    return found


@pytest.mark.parametrize("span", spans(rf"({'|'.join(map(re.escape, FOLDERS))})/|[\w/]+\.py$"))
def test_a_file_that_is_named_exists(span: str) -> None:
    if span not in EXAMPLES:
        name = span.rstrip("/")
        assert (ROOT / name).exists() or sum(file.endswith(f"/{name}") for file in FILES) == 1


@pytest.mark.parametrize("span", spans(r"(engine|bench)(\.\w+)+"))
def test_a_name_of_the_code_exists_and_takes_the_arguments_that_are_told(span: str) -> None:
    match = re.match(r"([\w.]+)(\(.*\))?", span, re.DOTALL)
    assert match
    found = resolved(match[1])
    if match[2]:
        known = inspect.signature(found).parameters
        told = arguments(match[2])
        assert told <= known.keys() or any(known[name].kind is inspect.Parameter.VAR_KEYWORD for name in known)


def arguments(text: str) -> set[str]:
    """Names of the arguments in parentheses, of a definition or of a call."""
    try:
        (function,) = ast.parse(f"def f{text}: ...").body
    except SyntaxError:
        (call,) = ast.parse(f"f{text}").body
        assert isinstance(call, ast.Expr)
        assert isinstance(call.value, ast.Call)
        return {str(keyword.arg) for keyword in call.value.keywords}
    assert isinstance(function, ast.FunctionDef)
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return {argument.arg for argument in every if argument is not None}


def test_earlier_names_of_modules_are_listed() -> None:
    (row,) = [line for line in read(ROOT / "docs" / "api.md").split("\n\n") if "earlier" in line]
    names = [name for name in code(row) if name.startswith("engine.") and name != "engine.EARLIER_NAMES"]
    assert sorted(names) == sorted(engine.EARLIER_NAMES)


# ---------------------------------------------------------------- the site


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Pages, navigation, links, anchors, and the pages of docstrings."""
    pytest.importorskip("mkdocstrings_handlers.python")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    built = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path))
    build(built)
    for wing in (path.parent.name for path in (ROOT / "engine").glob("*/__init__.py")):
        assert (tmp_path / "api" / wing / "index.html").is_file()
    page = (tmp_path / "api" / "attacks" / "index.html").read_text(encoding="utf-8")
    assert 'id="engine.attacks.pgd.pgd"' in page
