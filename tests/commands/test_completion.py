"""The shell completes flags, names, keys, values and paths; the help names each flag in its group."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.shell_completion import ZshComplete

from engine import config, methods, models
from engine.commands.cli import commands
from engine.commands.completion import KNOWN_NAMES, WholeWords
from engine.config import recipes
from engine.pipelines.datasets import DATASETS


def completed(*words: str) -> list[str]:
    """Completions of `engine WORDS<TAB>`."""
    completion = ZshComplete(commands, {}, "engine", "_ENGINE_COMPLETE")
    return [item.value for item in completion.get_completions(list(words[:-1]), words[-1])]


def in_bash(*words: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The same in bash, which gives the words as it breaks them."""
    monkeypatch.setenv("COMP_WORDS", "\n".join(("engine", *words)))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    return WholeWords(commands, {}, "engine", "_ENGINE_COMPLETE").complete().splitlines()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], ["train"]),
        (["train", "--meth"], ["--method"]),
        (["train", "--method", "i"], ["iad1", "iad1-down", "iad2"]),
        (["train", "--method", ""], list(methods.METHODS)),
        (["train", "--model", ""], list(models.TABLE)),
        (["train", "--dataset", ""], list(DATASETS)),
        (["train", "--attack-bn", ""], ["train", "eval", "batch"]),
        (["train", "--lanes", "o"], ["on", "off"]),
        (["train", "--micro-batch", ""], ["auto"]),
        (["train", "--optimizer", "a"], ["apex", "adamw"]),
        (["train", "--device", "c"], ["cpu", "cuda"]),
        (["train", "--set", "attack.k"], ["attack.kappa="]),
        (["train", "--set", "attack.bn="], [f"attack.bn={name}" for name in ("", "train", "eval", "batch")]),
        (["train", "--set", "amp=t"], ["amp=true"]),
        (["train", "--set", "teacher.method="], ["teacher.method=", *(f"teacher.method={name}" for name in (
            "st", "at", "trades"))]),
        (["train", "--set", "forwards.idle=f"], ["forwards.idle=false"]),
        (["train", "--config", "recipe:table9-iad1-gamma"], [f"recipe:table9-iad1-gamma{end}" for end in (
            "0.5", "1", "2", "4", "-dynamic")]),
        (["train", "--resume", "au"], ["auto"]),
        (["eval", "m.pt", "--normalize", "c"], ["cifar10", "cifar100"]),
        (["data", "write", "--format", ""], ["raw", "jpeg"]),
        (["pre"], ["predict"]),
        (["predict", "m.pt", "a.png", "--format", ""], ["table", "csv", "json"]),
        (["predict", "m.pt", "a.png", "--attack", "pgd20"], ["pgd20", "pgd20-dlr"]),
    ],
)  # fmt: skip
def test_words_are_completed(words: list[str], expected: list[str]) -> None:
    assert completed(*words) == expected


def test_keys_and_recipes_are_completed() -> None:
    assert completed("train", "--set", "") == [f"{name}=" for name in config.KEYS]
    assert completed("train", "--set", "attack.") == [f"{name}=" for name in config.KEYS if name[:7] == "attack."]
    assert completed("train", "--config", "recipe:") == [f"recipe:{name}" for name in recipes.names()]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["train", "--config", ""], "file"),
        (["train", "--teacher-st", "runs/"], "file"),
        (["train", "--data", "x"], "file"),
        (["train", "--out", "ru"], "dir"),
        (["train", "--resume", ""], "dir"),
        (["eval", "ru"], "file"),
        (["compare", "ru"], "file"),
        (["compare", "runs/a", "runs/b", "--json", ""], "file"),
    ],
)
def test_paths_are_left_to_the_shell(words: list[str], kind: str) -> None:
    completion = ZshComplete(commands, {}, "engine", "_ENGINE_COMPLETE")
    (item,) = completion.get_completions(words[:-1], words[-1])
    assert (item.type, item.value) == (kind, words[-1])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--method", "i"], ["plain,iad1", "plain,iad1-down", "plain,iad2"]),
        (["train", "--set", "attack.bn", "=", "tr"], ["plain,train"]),
        (["train", "--set", "attack.bn", "="], ["plain,", "plain,train", "plain,eval", "plain,batch"]),
        (["train", "--set", "attack.kap"], ["plain,attack.kappa="]),
        (["train", "--config", "recipe", ":", "table7-a"], ["plain,table7-akd2"]),
        (["train", "--config", "=", "recipe", ":", "table7-a"], ["plain,table7-akd2"]),
        (["train", "--method", "=", "iad2"], ["plain,iad2"]),
        (["train", "--set", "lr", "=", "1", "--optim"], ["plain,--optimizer"]),
    ],
)
def test_words_that_bash_breaks_are_completed(
    words: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_bash(*words, monkeypatch=monkeypatch) == expected


@pytest.mark.parametrize(("instruction", "expected"), [("zsh_source", "compdef"), ("bash_complete", "iad1-down")])
def test_the_engine_answers_the_shell(
    instruction: str, expected: str, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("_ENGINE_COMPLETE", instruction),
        ("COMP_WORDS", "engine\ntrain\n--method\ni"),
        ("COMP_CWORD", "3"),
    ):
        monkeypatch.setenv(name, value)
    outcome = cli()
    assert (outcome.code, outcome.err) == (0, "")
    assert expected in outcome.out


def test_every_flag_stands_in_a_group_of_the_help() -> None:
    train = commands.commands["train"]
    context = click.Context(train, info_name="train")
    lines = train.get_help(context).splitlines()
    titles = [line for line in lines if line.endswith(":") and line[:1].isalpha()]
    assert titles == [f"{group.capitalize()}:" for group in (*config.GROUPS, "other")]
    parameters = train.get_params(context)
    (ungrouped,) = [p for p in parameters if getattr(p, "group", "other") not in config.GROUPS]
    assert "--help" in ungrouped.opts
    for name, key in config.KEYS.items():
        if key.flag is not None:
            (parameter,) = [p for p in parameters if p.name == name]
            assert key.flag.partition("/")[0] in parameter.opts
            assert "`" not in str(parameter.get_help_record(context))
            assert "](" not in str(parameter.get_help_record(context))
    assert {str(p.name) for p in parameters} >= {name for name, key in config.KEYS.items() if key.flag}


def test_the_help_tells_the_defaults() -> None:
    train = commands.commands["train"]
    records = {
        p.name: str(p.get_help_record(click.Context(train))) for p in train.get_params(click.Context(train))
    }
    defaults = {
        "method": "[iad1]",
        "epochs": "[200]",
        "amp": "[no]",
        "limit_train": "[all]",
        "attack.bn": "[by the method]",
        "out": "[runs/METHOD-DATASET-MODEL-TIME]",
    }
    for name, default in defaults.items():
        assert default in records[name]
    assert "iad1-down" in records["method"]
    assert "engine models" in records["model"]


def test_names_come_from_tables() -> None:
    assert {key.values for key in config.KEYS.values()} - {None, "file", "dir", "path"} == set(KNOWN_NAMES)
