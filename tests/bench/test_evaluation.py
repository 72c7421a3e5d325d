"""The benchmark of evaluations: its variants count and compare the same attacks, and a small run of it."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from click.testing import CliRunner

from bench import evaluation
from bench.lib import roofline
from bench.lib.output.csv_rows import EvaluationPredictedRow, EvaluationRow
from bench.lib.pass_ops import Execution
from bench.lib.steps import attacks_predicted, attacks_timed
from bench.lib.steps.attacks_predicted import CountedOps
from bench.lib.steps.attacks_timed import ENGINE, EXPERT, TEXTBOOK, Pass, Step, Subject, calls_on_gpu, variants_of
from engine.attacks.auto import standard
from engine.attacks.evaluated import prepared
from engine.models import build
from engine.system.precision import Precision
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
    assert [field.name for field in fields(EvaluationPredictedRow)] == documented("evaluation-predicted.csv")


def test_steps_on_a_gpu_are_predicted_from_their_kernels() -> None:
    """APGD runs the network forward and backward, FAB forward once more, Square forward alone."""
    forward, both = (attacks_predicted.published_pass(subject(), Pass(5, backward)) for backward in (False, True))
    of_network = sum(op.flops for op in forward)
    assert of_network > 0
    # The gradient of the images is as many products as the forward pass.
    assert sum(op.flops for op in both) == pytest.approx(2 * of_network, rel=0.01)
    twin = prepared(subject().network, Precision(CPU, torch.float32))
    for part, times in {"apgd-ce": 2, "apgd-t": 2, "fab-t": 3, "square": 1}.items():
        with mock.patch.object(Execution, "gpu", return_value=Execution.plain()):
            ops = attacks_predicted.engine_step(twin, Step(part, 5), subject())
        assert sum(op.flops for op in ops) == pytest.approx(times * of_network, rel=0.01)
        assert [op.name for op in ops].count("engine::fab_step") == (part == "fab-t")


def test_predicted_seconds_are_of_the_calls_that_were_counted() -> None:
    h100 = roofline.GPUS["h100"]
    ieee = h100.without_tf32()
    assert ieee.flops[torch.float32] == pytest.approx(66.9e12)
    classify = attacks_predicted.published_pass(subject(), Pass(4, False))
    twin = prepared(subject().network, Precision(CPU, torch.float32))
    square = attacks_predicted.engine_step(twin, Step("square", 16), subject())
    found = attacks_predicted.predicted(CountedOps([(3, classify)], [(7, square)], 30.0), h100)
    for gpu, of_package, of_engine in (
        (ieee, found.published_s, found.engine_s),
        (h100, found.published_tf32_s, found.engine_tf32_s),
    ):
        one = roofline.seconds(classify, gpu, launched=True) + 30 * gpu.launch
        assert of_package == pytest.approx(3 * one)
        assert of_engine == pytest.approx(7 * roofline.seconds(square, gpu, launched=False))
    assert found.engine_tf32_s < found.engine_s


def test_calls_of_autoattack_are_counted() -> None:
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    tiny = Subject(subject().network, subject().x_nat, subject().labels_N, 1e-6, 20)  # nothing falls
    published = attacks_timed.timed(TEXTBOOK, "aa", tiny)
    assert sum(call.images * count for call, count in published.calls.items()) == published.forward
    assert {call.images for call in published.calls} == {6}
    # 6 images fill 16 slots; of 9 target classes 54 images are attacked at once.
    expected = {("apgd-ce", 16): 6, ("apgd-t", 54): 6, ("fab-t", 54): 5, ("square", 16): 251}
    assert calls_on_gpu(tiny) == Counter({Step(*call): count for call, count in expected.items()})
    ops = attacks_predicted.counted_ops(tiny, published)
    assert sum(count for count, _ in ops.passes) == published.calls.total()
    assert sum(count for count, _ in ops.steps) == sum(expected.values())
    assert ops.others > 10


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
