"""The benchmark of evaluations: its variants count and compare the same attacks, and a small run of it."""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from click.testing import CliRunner

from bench import evaluation
from bench.lib.output.csv_rows import EvaluationRow
from bench.lib.steps import attacks_timed
from bench.lib.steps.attacks_timed import ENGINE, EXPERT, TEXTBOOK, Subject, variants_of
from engine.attacks.auto import standard
from engine.models import build
from tests.bench.readme import documented

CPU = torch.device("cpu")


def subject(**changes: Any) -> Subject:
    torch.manual_seed(0)
    network = build("resnet8", 10).eval().requires_grad_(False)
    x_nat = torch.rand(6, 3, 8, 8)
    return Subject(network, x_nat, network(x_nat).argmax(dim=1), 2 / 255, **changes)


def test_the_columns_are_documented() -> None:
    own = [field.name for field in fields(EvaluationRow)]
    assert own[-len(documented("evaluation.csv")) :] == documented("evaluation.csv")


@pytest.mark.parametrize("attack", ["pgd20", "cw"])
def test_passes_of_a_loop_are_counted_and_the_engine_counts_alike(attack: str) -> None:
    steps = {"pgd20": 20, "cw": 30}[attack]
    by_variant = {variant: attacks_timed.timed(variant, attack, subject()) for variant in variants_of(attack)}
    assert {variant: found.backward for variant, found in by_variant.items()} == dict.fromkeys(
        variants_of(attack), 6 * steps
    )
    assert by_variant[TEXTBOOK].forward == by_variant[EXPERT].forward == 6 * steps
    assert by_variant[ENGINE].forward == 6 * (steps + 1)  # and it classifies what it found
    assert all(found.seconds > 0 for found in by_variant.values())


def test_autoattack_is_shortened_in_the_package_and_in_the_engine() -> None:
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    tiny = subject(shorter=20)
    tiny = Subject(tiny.network, tiny.x_nat, tiny.labels_N, 1e-6, tiny.shorter)  # nothing falls
    published, engine = (attacks_timed.timed(variant, "aa", tiny) for variant in (TEXTBOOK, ENGINE))
    # Passes of an image that stands: APGD 5 steps and its start, of 1 + 9 targets; FAB 5 steps of 3; 250 queries.
    assert engine.forward == 6 * (1 + 10 * 6 + 9 * 10 + 251)
    assert engine.backward == 6 * (10 * 5 + 9 * 5)
    assert published.backward == 6 * (10 * 6 + 9 * 5)  # the gradient of the last iterate, too
    assert published.forward > engine.forward
    assert (published.stood_N & engine.stood_N).all()
    assert standard.STANDARD == (100, 100, 5000)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"variant: 'mine' is not known"):
        attacks_timed.timed("mine", "pgd20", subject())


def test_a_small_run(tmp_path: Path) -> None:
    with mock.patch.object(evaluation, "subject_of", return_value=("resnet8, noise", subject())):
        outcome = CliRunner().invoke(
            evaluation.main, ["anything", "--attack", "pgd20", "--device", "cpu", "--out", str(tmp_path)]
        )
    assert outcome.exit_code == 0, outcome.output
    rows = list(csv.DictReader((tmp_path / "evaluation.csv").open()))
    assert [row["variant"] for row in rows] == list(variants_of("pgd20"))
    assert float(rows[0]["speedup"]) == 1
    assert (tmp_path / "evaluation.png").stat().st_size > 1000
