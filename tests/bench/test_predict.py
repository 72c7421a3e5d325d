"""Predictions: the counts against closed forms, the roofline in both regimes, lanes, memory, and the command."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bench import predict
from bench.lib import roofline
from bench.lib.roofline import GPUS, Hardware, Op, PassOps
from engine import config, methods, models
from engine.system.precision import Precision
from engine.training.performance.speed import forward_flops

CPU = torch.device("cpu")
F32, AMP = Precision(CPU, torch.float32), Precision(CPU, torch.float32, torch.bfloat16)
UNIT = Hardware("unit", {torch.float32: 10.0, torch.bfloat16: 20.0}, 2.0, 0.5, 0.1, 0.5, 0.25)


def flops(ops: list[Op]) -> float:
    return sum(op.flops for op in ops)


# ---------------------------------------------------------------- what an op costs


@pytest.mark.parametrize(
    ("op", "launched", "seconds"),
    [
        (Op("conv", 100.0, 1.0, torch.float32), False, 20.0),  # by 10 * 0.5 a second
        (Op("conv", 100.0, 1.0, torch.bfloat16), False, 10.0),
        (Op("conv", 100.0, 40.0, torch.float32), False, 80.0),  # by 2 * 0.25 bytes a second
        (Op("relu", 0.0, 0.1, torch.float32), False, 0.2),
        (Op("relu", 0.0, 0.01, torch.float32), False, 0.1),  # a node takes no less
        (Op("relu", 0.0, 0.1, torch.float32), True, 0.5),  # the host is slower
        (Op("relu", 0.0, 0.4, torch.float32), True, 0.8),
    ],
)
def test_the_roofline(op: Op, launched: bool, seconds: float) -> None:
    assert UNIT.seconds(op, launched=launched) == pytest.approx(seconds)
    assert roofline.seconds([op, op], UNIT, launched=launched) == pytest.approx(2 * seconds)


def test_the_share_of_convolutions() -> None:
    ops = [Op("aten::convolution", 100.0, 1.0, torch.float32), Op("aten::relu_", 0.0, 2.5, torch.float32)]
    assert roofline.share_of_convolutions(ops, UNIT) == pytest.approx(20 / 25)


def test_the_data_sheets_make_sense() -> None:
    for hardware in GPUS.values():
        assert hardware.flops[torch.bfloat16] == pytest.approx(2 * hardware.flops[torch.float32])  # TF32
        assert 1e11 < hardware.bandwidth < 1e13
    assert (
        GPUS["h100"].flops[torch.bfloat16] > GPUS["a100"].flops[torch.bfloat16] > GPUS["l4"].flops[torch.bfloat16]
    )


# ---------------------------------------------------------------- what a pass runs


@pytest.mark.parametrize("precision", [F32, AMP], ids=["float32", "amp"])
@pytest.mark.parametrize("bn", ["train", "eval"])
def test_operations_of_the_passes(precision: Precision, bn: str, bf16: None) -> None:
    found = roofline.passes("resnet8", 4, precision, bn=bn)
    forward, first = forward_flops(models.build("resnet8", 10), (3, 32, 32))
    assert flops(found.forward) == 4 * forward
    assert flops(found.attacked) == 4 * 2 * forward  # no gradient of a weight
    assert flops(found.trained) == 4 * (3 * forward - first)
    assert found.parameters == sum(value.numel() for value in models.build("resnet8", 10).parameters())


def test_bytes_of_an_op() -> None:
    """The first ReLU of ResNet-8, in place, on 4 images: 16 channels of 32x32 values, read and written."""
    for precision, size in ((F32, 4), (AMP, 2)):
        relus = [
            op for op in roofline.passes("resnet8", 4, precision, bn="train").trained if op.name == "aten::relu_"
        ]
        assert relus[0].bytes == 2 * 4 * 16 * 32 * 32 * size
        assert relus[0].flops == 0


def test_batch_norm_by_batch_statistics_reads_twice() -> None:
    """The first of ResNet-8 on 4 images: x twice and y; then x and dy twice and dx; beside them vectors."""
    trained = roofline.passes("resnet8", 4, F32, bn="train").trained
    forward = next(op for op in trained if op.name == "aten::native_batch_norm")
    backward = [op for op in trained if op.name == "aten::native_batch_norm_backward"][-1]
    large = 4 * 16 * 32 * 32 * 4
    assert 3 * large <= forward.bytes < 3 * large + 16 * 100
    assert 5 * large <= backward.bytes < 5 * large + 16 * 100


def test_folded_passes_have_no_batch_norm() -> None:
    train, folded = (roofline.passes("resnet8", 4, F32, bn=bn) for bn in ("train", "eval"))
    assert sum("batch_norm" in op.name for op in train.attacked) == 2 * 9
    for ops in (folded.attacked, folded.forward):
        assert not any("batch_norm" in op.name for op in ops)


def test_what_a_pass_keeps_for_its_backward() -> None:
    """Half as much in half precision, but for the images and the first layer's output."""
    full, half = (roofline.passes("resnet8", 4, precision, bn="train") for precision in (F32, AMP))
    assert half.kept_trained < 0.65 * full.kept_trained
    outputs = 16 * 32**2 * 3 + 32 * 16**2 * 3 + 64 * 8**2 * 3  # of the convolutions, and as many of the ReLUs
    assert full.kept_attacked > 4 * 4 * outputs


# ---------------------------------------------------------------- a step


def passes(attacked: float = 1.0, trained: float = 3.0, forward: float = 0.5) -> PassOps:
    """Passes of one op each, of so many seconds on UNIT."""
    attack, train, run = (
        [Op("aten::convolution", 0.0, 0.5 * s, torch.float32)] for s in (attacked, trained, forward)
    )
    return PassOps(attack, train, run, 10 * 2**20, 30 * 2**20, 0)


@pytest.mark.parametrize(
    ("method", "serial", "lanes"),
    [
        ("at", 10 * 1 + 3, 13),
        ("ard", 10 * 1 + 3 + 0.5 + 0.5, 13.5),  # T(x) hides behind the attack, S(x) does not
        ("iad1", 10 * 1 + 2 * 3 + 2 * 0.5, 16),
        ("iad2", 10 * 1 + 2 * 3 + 2 * 0.5, 16),
    ],
)
def test_the_critical_path(method: str, serial: float, lanes: float) -> None:
    run = config.load({"method": method})
    row = methods.get(method)
    step = predict.predict(run, row, passes(), UNIT, F32)
    update = UNIT.node  # of no parameters
    assert step.device_s == pytest.approx(serial + update)
    assert step.lanes_s == pytest.approx(lanes + update)
    assert step.share_of_convolutions == pytest.approx(serial / (serial + update))


def test_a_teacher_that_is_slower_than_the_attack_decides() -> None:
    step = predict.predict(config.load({"method": "ard"}), methods.get("ard"), passes(forward=20.0), UNIT, F32)
    assert step.lanes_s == pytest.approx(20 + 3 + 20 + UNIT.node)


def test_launches_are_those_of_all_passes() -> None:
    step = predict.predict(config.load({"method": "iad1"}), methods.get("iad1"), passes(), UNIT, F32)
    assert step.launches == 10 + 2 + 2 + 1
    assert step.eager_s == pytest.approx(10 * 1 + 2 * 3 + 2 * 0.5 + 0.5)  # the optimizer's launch


def test_peak_memory() -> None:
    mebi = 2**20
    found = passes()._replace(parameters=mebi)
    run, row = config.load({"method": "iad1"}), methods.get("iad1")
    # weights and momentum 8, gradients 4, two trained passes of 30; with AMP the twin 2, the teacher 2, copies 2
    assert predict.predict(run, row, found, UNIT, F32).peak_mib == pytest.approx(8 + 4 + 60 + 4)
    assert predict.predict(run, row, found, UNIT, AMP).peak_mib == pytest.approx(8 + 4 + 60 + 2 + 2 + 2)
    attack_decides = found._replace(kept_attacked=100 * mebi)
    assert predict.predict(run, row, attack_decides, UNIT, F32).peak_mib == pytest.approx(8 + 4 + 100)


# ---------------------------------------------------------------- the command


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(predict.main, [str(one) for one in arguments])


def test_a_prediction_says_that_it_is_one(tmp_path: Path) -> None:
    done = invoke("--gpu", "a100", "--model", "resnet8", "--batch-size", 4, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert done.output.startswith("PREDICTED for one A100 SXM 80 GB, not measured")
    assert "assumed: convolutions reach 60 %" in done.output
    with (tmp_path / "predicted.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["ard", "iad1", "akd2", "iad2"]
    for row in rows.values():
        assert float(row["lanes_epoch_s"]) <= float(row["device_epoch_s"]) <= float(row["eager_epoch_s"])
    assert "156.12" in done.output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--gpu", "h200"), "'h100'"),
        ((), "give either --gpu"),
        (("--gpu", "h100", "--validate"), "give either --gpu"),
        (("--gpu", "h100", "--method", "iad3"), "iad3"),
        (("--gpu", "h100", "--model", "resnet9"), "resnet8"),
    ],
)
def test_what_is_unknown_is_told(flags: tuple[str, ...], words: str) -> None:
    done = invoke(*flags)
    assert done.exit_code == 2
    assert words in done.output


def test_the_processor_is_predicted_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measured_cpu", lambda _: UNIT)
    done = invoke("--validate", "--model", "resnet8", "--batch-size", 2, "--no-amp")
    assert done.exit_code == 0, done.output
    assert all(name in done.output for name in ("attack", "training", "forward, folded"))
