"""Trials of a speedrun's recipes: on held-out images alone, of keys that the rules allow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from bench import speedrun
from bench.lib.output import csv_rows
from bench.lib.output.csv_rows import MeasuredRow, TrialRow
from bench.lib.speedrun import rules, running, trials
from bench.lib.speedrun.rules import SpeedRecipe
from bench.speedrun import Attempt
from engine import config
from engine.pipelines import datasets
from engine.pipelines.splits import Request
from engine.runs.run_directory import RunDir
from engine.training.learner import Learner
from tests.bench.readme import documented

RECIPE = "method: at\nmodel: resnet8\nbatch_size: 24\nattack: {num_steps: 1}\n"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of trials of a small recipe; runs are made below the test's folder."""
    monkeypatch.setattr(speedrun, "WORK", tmp_path / "work")
    monkeypatch.setattr(rules, "RECIPES", tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    path = tmp_path / "given" / "some.yaml"
    path.parent.mkdir()
    path.write_text("base: small\nvariants:\n  two: {attack: {num_steps: 2}}\n  rate: {lr: 0.01}\n")
    return path


def test_every_column_is_documented() -> None:
    common = len(dataclasses.fields(MeasuredRow))
    assert (
        documented("speedrun/TRACK/trials-NAME.csv")
        == [field.name for field in dataclasses.fields(TrialRow)][common:]
    )


def test_the_trials_of_the_project_keep_the_rules() -> None:
    for path in (rules.RECIPES / "trials").glob("*.yaml"):
        base, *variants = trials.read(path)
        assert not base.changed
        assert variants
        for each in variants:
            complete = Attempt(each.recipe, "cpu", (0,), quick=False, place=torch.device("cpu")).complete()
            assert complete != base.recipe.on(rules.TRACKS["cpu"], "cpu")
            assert trials.held_out(complete).validation == trials.HELD_OUT


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("base: nothing\nvariants: {a: {lr: 1}}", "recipe: 'nothing' is not known"),
        ("base: small\nvariants: {}", "is no file of trials: variants"),
        ("base: small", "is no file of trials: variants"),
        ("base: small\nvariants: {base: {lr: 1}}", "no name of a variant"),
        ("base: small\nvariants: {../a: {lr: 1}}", "is no file of trials: variants"),
        ("base: small\nvariants: {a: {lr: 1}}\nmore: 1", "is no file of trials: more"),
        ("base: small\nvariants: {a: {validation: 0.5}}", "recipe a: validation: it is settled by the rules"),
        ("base: small\nvariants: {a: {lrr: 1}}", "recipe a: unknown key 'lrr'"),
        ("base: small\nvariants: [", "is not valid YAML"),
    ],
)
def test_what_is_no_file_of_trials_is_refused_before_a_training(content: str, told: str, file: Path) -> None:
    file.write_text(content)
    found = CliRunner().invoke(speedrun.main, ["--trials", str(file), "--quick"])
    assert found.exit_code == 2, found.output
    assert told in found.output
    assert not (file.parents[1] / "work").exists()


def test_trials_are_run_once_and_measured_on_held_out_images(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[running.Race] = []
    monkeypatch.setattr(running, "warm_up", warmed.append)
    out = file.parents[1] / "out"
    given = ["--trials", str(file), "--quick", "--seeds", "0,4", "--out", str(out)]
    done = CliRunner().invoke(speedrun.main, given)
    assert done.exit_code == 0, done.output
    assert len({race.place for race in warmed}) == len(warmed) == 3
    rows = csv_rows.read(out / "cpu" / "trials-some.csv", TrialRow)
    assert [(row.variant, row.seed) for row in rows] == [
        (name, seed) for name in ("base", "two", "rate") for seed in (0, 4)
    ]
    assert [row.keys for row in rows[::2]] == ["", '{"attack": {"num_steps": 2}}', '{"lr": 0.01}']
    # Two passes for each step of the attack, and three of the training.
    assert rows[2].flops == pytest.approx(rows[0].flops * 7 / 5, rel=0.01)
    data = datasets.find("digits", None, Request(limit_train=80))
    training, held = datasets.split_validation(data.train, trials.HELD_OUT, 0)
    assert isinstance(held.images, Tensor)
    assert (len(training), len(held)) == (70, 10)  # at least one of each class
    assert {row.data_sha256 for row in rows} == {data.sha256}
    for row in rows:
        (run,) = (file.parents[1] / "work").glob(f"trials/cpu/{row.variant}-*/seed-{row.seed}/student")
        network = running.last_weights(RunDir(run), data.class_names).eval()
        images_BCHW = held.images.permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            correct_B = network(images_BCHW).argmax(dim=1) == held.labels
        assert (row.natural, row.held_out) == (float(correct_B.double().mean()), 10)
        assert 0 <= row.pgd20 <= row.natural
        epochs = [each for each in RunDir(run).rows() if each["event"] == "epoch"]
        assert [round(each["images_per_second"] * each["seconds"]) for each in epochs] == [70, 70]

    def trained(*arguments: Any, **keys: Any) -> Any:
        raise AssertionError("nothing is left to train")

    refused = CliRunner().invoke(speedrun.main, given)
    assert (refused.exit_code, "exists: give --out" in refused.output) == (2, True), refused.output
    (out / "cpu" / "trials-some.csv").unlink()
    monkeypatch.setattr(Learner, "learn", trained)
    assert CliRunner().invoke(speedrun.main, given).exit_code == 0
    again = csv_rows.read(out / "cpu" / "trials-some.csv", TrialRow)
    assert [dataclasses.replace(row, date="", commit="") for row in again] == [
        dataclasses.replace(row, date="", commit="") for row in rows
    ]


def test_teachers_of_a_trial_have_not_seen_the_held_out_images(tmp_path: Path) -> None:
    recipe = SpeedRecipe("r", {"method": "ard", "model": "resnet8"})
    track = rules.TRACKS["cpu"].tiny()
    complete = trials.held_out(recipe.on(track, "cpu"))
    race = running.prepare(tmp_path, "r", track, complete, print)
    for run in (race.student(0), *race.teachers(0).values()):
        assert run.validation == trials.HELD_OUT
    record = running.prepare(tmp_path, "r", track, recipe.on(track, "cpu"), print)
    assert record.place != race.place
    assert (
        {run.validation for run in record.teachers(0).values()} == {config.load(rules.SETTLED).validation} == {0}
    )


def test_variants_are_compared_with_the_base_of_the_same_seeds() -> None:
    def row(variant: str, seed: int, natural: float, pgd20: float) -> TrialRow:
        facts = ("2026-11-30", "c", "cpu", "p", 2, 2, "3.11", "2.14", "3.8")
        return TrialRow(*facts, "t", variant, "", seed, 10.0 + seed, 1e12, "d", 100, natural, pgd20)

    rows = [
        row("base", 0, 0.5, 0.3), row("base", 1, 0.6, 0.2),
        row("more", 1, 0.7, 0.25), row("more", 2, 0.9, 0.9), row("other", 0, 0.5, 0.5), row("other", 1, 0.4, 0.3),
        row("alone", 7, 0.5, 0.5),
    ]  # fmt: skip
    base, more, other = trials.means(rows)
    assert (base.seeds, base.seconds, base.natural_minus_base, base.pgd20_minus_base) == (2, 10.5, 0, 0)
    assert (more.variant, more.seeds, more.natural, more.seconds) == ("more", 1, 0.7, 11.0)
    assert (more.natural_minus_base, more.pgd20_minus_base) == pytest.approx((0.1, 0.05))
    assert (other.natural_minus_base, other.pgd20_minus_base) == pytest.approx((-0.1, 0.15))
