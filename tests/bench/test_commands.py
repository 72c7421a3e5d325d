"""The commands of bench/: listed, documented, and with the options that they share."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from bench import __main__ as listing
from bench.lib import command
from bench.lib.output.csv_rows import PredictedRow
from tests.bench.readme import README

NAMES = [name for name, _ in listing.commands()]


def test_every_command_is_listed_with_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    listing.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [["python", "-m", f"bench.{name}"] for name in NAMES]
    assert "kernels" in NAMES
    for name in NAMES:
        docstring = importlib.import_module(f"bench.{name}").__doc__ or ""
        assert f": `python -m bench.{name}" in docstring.splitlines()[0]


def test_the_readme_names_every_command() -> None:
    block = README.read_text().partition("```sh\n")[2].partition("```")[0]
    assert {*re.findall(r"^python -m bench\.(\w+)", block, re.MULTILINE)} == {*NAMES}


def test_every_command_of_the_readme_parses() -> None:
    """Options alone: nothing is run."""
    for name, rest in re.findall(r"^python -m bench\.(\w+)([^#\n]*)", README.read_text(), re.MULTILINE):
        main = importlib.import_module(f"bench.{name}").main
        if isinstance(main, click.Command):
            known = {flag for option in main.params for flag in option.opts}
            assert {*re.findall(r"--[\w-]+", rest)} <= known, f"{name}{rest}"


# ---------------------------------------------------------------- what they share


def invoke(*arguments: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code and output of a command with all of the options, and what it was given."""
    found: dict[str, Any] = {}

    @command.command
    @command.device_option()
    @command.model_option()
    @command.methods_option(("ard", "iad1"))
    @command.batch_size_option(32)
    @command.out_option()
    def main(**given: Any) -> None:
        found.update(given)

    ended = CliRunner().invoke(main, arguments)
    return ended.exit_code, ended.output, found


def test_options_that_are_shared_give_what_they_name(tmp_path: Path) -> None:
    usual = {"device": torch.device("cpu"), "model": "resnet18", "batch_size": 32, "out": None}
    assert invoke("--device", "cpu") == (0, "", usual | {"names": ("ard", "iad1")})
    _, _, found = invoke("--method", "at", "--method", "st", "--out", str(tmp_path))
    assert (found["names"], found["out"]) == (("at", "st"), tmp_path)


@pytest.mark.parametrize(("given", "told"), [
    (("--device", "cuda:99"), "cuda:99"), (("--model", "resnet9"), "resnet8"),
    (("--method", "iad3"), "did you mean"), (("--batch-size", "0"), "--batch-size"),
])  # fmt: skip
def test_what_is_unknown_ends_with_exit_code_2_and_a_line(given: tuple[str, str], told: str) -> None:
    code, output, _ = invoke(*given)
    assert code == 2
    assert told in output


def row(method: str) -> PredictedRow:
    return PredictedRow("2026-01-02", "abc", "2", "L4", method, "resnet8", 1, True, 1, 1, 1, 1, 1, 1, 1)


def test_results_lie_in_the_folder_and_are_named_in_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "out"
    with command.results(torch.device("cpu"), folder) as results:
        assert results.facts["device"] == "cpu"
        results.write("a.csv", [row("ard")])
        results.write("a.csv", [row("ard"), row("iad1")])
        results.write("b.csv", [row("at")])
        results.path("a.png").touch()
        assert capsys.readouterr().out == ""
    assert capsys.readouterr().out.replace("\n", "") == f"written: {folder}/a.csv, {folder}/b.csv and a.png"
    assert len((folder / "a.csv").read_text().splitlines()) == 3


def test_of_nothing_that_was_written_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with command.results(torch.device("cpu"), tmp_path):
        pass
    assert capsys.readouterr().out == ""
