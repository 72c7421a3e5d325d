"""Predictions: the counts against closed forms, the roofline in both regimes, lanes, memory, and the command."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bench import predict
from bench.lib import pass_ops, roofline
from bench.lib.pass_ops import Execution, PassOps
from bench.lib.roofline import GPUS, Hardware, Op, Product
from engine import config, methods, models
from engine.system.precision import Precision
from engine.training.performance.speed import forward_flops

CPU = torch.device("cpu")
F32, AMP = Precision(CPU, torch.float32), Precision(CPU, torch.float32, torch.bfloat16)
EAGER, COMPILED = (Execution(True, None, True, compiled=compiled) for compiled in (False, True))
TORCH = EAGER._replace(fused_norm=False)  # ENGINE_KERNELS=auto,batch_norm=reference
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


@pytest.mark.parametrize(
    ("product", "processors", "efficiency"),
    [
        (Product(256, 128), 1, 1.0),
        (Product(256 * 8, 128), 4, 1.0),  # two whole waves
        (Product(256 * 9, 128), 9, 1.0),
        (Product(128 * 3, 128), 2, 0.75),  # 3 tiles in 2 waves of 2
        (Product(256 * 3, 128), 2, 1.0),  # the same, but 6 tiles of 128x128 are 3 whole waves
        (Product(256, 64), 1, 1.0),
        (Product(128, 96), 1, 96 / 128),
        (Product(128, 128, groups=3), 1, 1.0),
        (Product(128, 128, groups=2), 4, 0.5),  # two tiles on four processors
        (Product(128, 128, is_split=True), 4, 1.0),  # whose sums are divided
        (Product(64, 27, is_split=True), 4, 64 * 27 / (64 * 256)),  # its edges are not
    ],
)
def test_waves_of_tiles(product: Product, processors: int, efficiency: float) -> None:
    assert product.efficiency(processors) == pytest.approx(efficiency)


def test_a_convolution_pays_for_its_last_wave() -> None:
    """ResNet-18's last stage on 128 images: 64 tiles, for which 132 processors need a whole wave."""
    op = Op("aten::convolution", 1e9, 0.0, torch.bfloat16, Product(128 * 4 * 4, 512))
    h100 = GPUS["h100"]
    assert h100.seconds(op, launched=False) == pytest.approx(1e9 / (989.4e12 * 0.6) * 132 / 64)
    assert h100.seconds(op._replace(product=None), launched=False) == pytest.approx(1e9 / (989.4e12 * 0.6))
    assert UNIT.seconds(op, launched=False) == pytest.approx(1e8)  # of processors nothing is known


@pytest.mark.parametrize(
    ("sizes", "lists", "launches"),
    [
        ([1], 3, 1),
        ([1] * 48, 3, 1),
        ([1] * 49, 3, 2),
        ([1] * 64, 2, 1),
        ([1] * 65, 2, 2),
        ([320 * 65_536], 3, 1),
        ([320 * 65_536 + 1], 3, 2),
        ([320 * 65_536, 1], 3, 2),
    ],
)
def test_launches_of_the_optimizer(sizes: list[int], lists: int, launches: int) -> None:
    assert roofline.launches_of_lists(sizes, lists=lists) == launches


# ---------------------------------------------------------------- what a pass runs


@pytest.mark.parametrize("precision", [F32, AMP], ids=["float32", "amp"])
@pytest.mark.parametrize("bn", ["train", "eval"])
def test_operations_of_the_passes(precision: Precision, bn: str, bf16: None) -> None:
    found = pass_ops.passes("resnet8", 4, precision, EAGER, bn=bn)
    forward, first = forward_flops(models.build("resnet8", 10), (3, 32, 32))
    assert flops(found.forward) == 4 * forward
    assert flops(found.attacked) == 4 * 2 * forward  # no gradient of a weight
    assert flops(found.trained) == 4 * (3 * forward - first)
    assert found.parameters == sum(value.numel() for value in models.build("resnet8", 10).parameters())


def test_bytes_of_an_op() -> None:
    """The first ReLU of ResNet-8, in place, on 4 images: 16 channels of 32x32 values, read and written."""
    for precision, size in ((F32, 4), (AMP, 2)):
        relus = [
            op
            for op in pass_ops.passes("resnet8", 4, precision, TORCH, bn="train").trained
            if op.name == "aten::relu_"
        ]
        assert relus[0].bytes == 2 * 4 * 16 * 32 * 32 * size
        assert relus[0].flops == 0


def test_batch_norm_by_batch_statistics_reads_twice() -> None:
    """The first of ResNet-8 on 4 images: x twice and y; then x and dy twice and dx; beside them vectors."""
    trained = pass_ops.passes("resnet8", 4, F32, TORCH, bn="train").trained
    forward = next(op for op in trained if op.name == "aten::native_batch_norm")
    backward = [op for op in trained if op.name == "aten::native_batch_norm_backward"][-1]
    large = 4 * 16 * 32 * 32 * 4
    assert 3 * large <= forward.bytes < 3 * large + 16 * 100
    assert 5 * large <= backward.bytes < 5 * large + 16 * 100


def test_folded_passes_have_no_batch_norm() -> None:
    train, folded = (pass_ops.passes("resnet8", 4, F32, EAGER, bn=bn) for bn in ("train", "eval"))
    assert sum("batch_norm" in op.name for op in train.attacked) == (2 + 2) * 9
    for ops in (folded.attacked, folded.forward):
        assert not any("batch_norm" in op.name for op in ops)


def test_what_a_pass_keeps_for_its_backward() -> None:
    """Half as much in half precision, but for the images and the first layer's output."""
    full, half = (pass_ops.passes("resnet8", 4, precision, TORCH, bn="train") for precision in (F32, AMP))
    assert half.kept_trained < 0.65 * full.kept_trained
    outputs = 16 * 32**2 * 3 + 32 * 16**2 * 3 + 64 * 8**2 * 3  # of the convolutions, and as many of the ReLUs
    assert full.kept_attacked > 4 * 4 * outputs


def moved(kernels: list[Op], name: str) -> list[float]:
    return [op.bytes for op in kernels if op.name == name]


@pytest.mark.parametrize(("precision", "itemsize"), [(F32, 4), (AMP, 2)], ids=["float32", "amp"])
@pytest.mark.parametrize("kind", ["attacked", "trained"])
def test_traffic_of_the_engine_s_batch_norm(precision: Precision, itemsize: int, kind: str) -> None:
    """The first block of ResNet-8 on 4 images, in maps: a layer with ReLU, and one with a residual, too."""
    kernels = getattr(pass_ops.passes("resnet8", 4, precision, EAGER, bn="train"), kind)
    large = 4 * 16 * 32 * 32 * itemsize
    vectors = 16 * 100
    sums, applied, back, gradient = (
        moved(kernels, f"engine::batch_norm{part}")
        for part in (".sums", ".apply", "_backward.sums", "_backward.gradient")
    )
    assert [len(found) for found in (sums, applied, back, gradient)] == [9] * 4
    for found, maps in (
        (sums[1], 1), (applied[1], 2), (back[-2], 2), (gradient[-2], 3),  # 3 maps forward and 5 backward
        (sums[2], 1), (applied[2], 3), (back[-3], 4), (gradient[-3], 3),  # 4 and 7
    ):  # fmt: skip
        assert maps * large <= found <= maps * large + vectors
    assert not moved(kernels, "aten::relu_")


def test_convolutions_are_products() -> None:
    """The second of ResNet-8, 16 to 16 channels of 3x3 on 4 images of 32x32, and its two gradients."""
    trained = pass_ops.passes("resnet8", 4, F32, EAGER, bn="train").trained
    x, weight = 4 * 16 * 32 * 32 * 4, 16 * 16 * 9 * 4
    operations = 2 * 4 * 32 * 32 * 16 * 16 * 9
    forward = [op for op in trained if op.name == "aten::convolution"][1]
    assert forward == Op("aten::convolution", operations, 2 * x + weight, torch.float32, Product(4096, 16))
    of_images = [op for op in trained if op.name == "aten::convolution_backward.x"][-1]
    assert of_images[1:] == (operations, 2 * x + weight, torch.float32, Product(4096, 16))
    of_weights = [op for op in trained if op.name == "aten::convolution_backward.weight"][-2]
    split = Product(16, 144, is_split=True)
    assert of_weights[1:] == (operations, 2 * x + weight, torch.float32, split)


def test_a_strided_gradient_has_the_size_of_the_images() -> None:
    """The first of the second stage: 16 channels of 32x32 to 32 of 16x16, on 4 images."""
    trained = pass_ops.passes("resnet8", 4, F32, EAGER, bn="train").trained
    found = [op.product for op in trained if op.name == "aten::convolution_backward.x"]
    assert Product(4 * 32 * 32, 16) in found
    assert Product(4 * 16 * 16, 32) in [op.product for op in trained if op.name == "aten::convolution"]


@pytest.mark.parametrize(("precision", "itemsize"), [(F32, 4), (AMP, 2)], ids=["float32", "amp"])
def test_the_stem_as_one_op(precision: Precision, itemsize: int, bf16: None) -> None:
    """3 to 16 channels on 4 images of 32x32: forward and gradient of the images one kernel each, in bytes."""
    images, map_, weight = 4 * 3 * 32 * 32 * 4, 4 * 16 * 32 * 32 * itemsize, 16 * 27 * 4
    operations = 2 * 4 * 32 * 32 * 16 * 27
    for stem, forward, backward in (
        (torch.float32, 1.0, 1.0),
        (torch.bfloat16, 6 * 32 / 27, 6 * 16 / 3),  # six products, of matrices that are padded
    ):
        found = pass_ops.passes("resnet8", 4, precision, EAGER._replace(stem=stem), bn="train")
        before = pass_ops.passes("resnet8", 4, precision, EAGER, bn="train")
        name = "engine::image_conv3x3"
        moved = images + weight + map_
        ops = [op for op in found.attacked if op.name.startswith(name)]
        assert [(op.name, op.bytes, op.dtype) for op in ops] == [
            (name, moved, stem),
            (f"{name}_backward", moved, stem),
        ]
        assert [op.flops for op in ops] == pytest.approx([forward * operations, backward * operations])
        assert [op.name for op in found.trained if op.name.startswith(name)] == [name]
        assert len(before.attacked) - len(found.attacked) == (2 if precision is AMP else 0)  # conversions


def test_compiled_biases_are_added_with_what_follows() -> None:
    """A folded pass of ResNet-8: of bias, addition and ReLU, a kernel each, one is left, which moves less."""
    eager, compiled = (
        pass_ops.passes("resnet8", 4, F32, execution, bn="eval").forward for execution in (EAGER, COMPILED)
    )
    large = 4 * 16 * 32 * 32 * 4
    assert moved(eager, "bias")[0] == pytest.approx(2 * large, abs=64)
    assert len(moved(eager, "bias")) == 9
    assert len(moved(eager, "aten::relu_")) == 6
    assert len(moved(eager, "aten::relu")) == 1  # after the stem, whose output stays
    joined = moved(compiled, "pointwise")
    assert joined[0] == pytest.approx(2 * large, abs=64)  # bias and ReLU
    assert joined[2] == pytest.approx(3 * large, abs=64)  # bias, addition and ReLU
    assert not moved(compiled, "aten::relu_")
    products = ("aten::convolution", "aten::addmm")
    assert [op for op in eager if op.name in products] == [op for op in compiled if op.name in products]


def test_the_op_chosen_by_the_environment_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, fused in (("auto", True), ("native", True), ("auto,batch_norm=reference", False)):
        monkeypatch.setenv("ENGINE_KERNELS", value)
        assert Execution.gpu(compiled=True).fused_norm is fused
        assert Execution.gpu(compiled=True).stem is torch.bfloat16
    monkeypatch.setenv("ENGINE_KERNELS", "auto,image_conv3x3=reference")
    assert Execution.gpu(compiled=True)[:2] == (True, None)
    monkeypatch.setenv("ENGINE_KERNELS", "reference")
    assert Execution.cpu()[:2] == (False, None)


# ---------------------------------------------------------------- a step


def passes(attacked: float = 1.0, trained: float = 3.0, forward: float = 0.5, **keys: Any) -> predict.GpuPasses:
    """Passes of one op each, of so many seconds on UNIT."""
    attack, train, run = (
        [Op("aten::convolution", 0.0, 0.5 * s, torch.float32)] for s in (attacked, trained, forward)
    )
    found = PassOps(attack, train, run, 10 * 2**20, 30 * 2**20, (0,), 0)._replace(**keys)
    return predict.GpuPasses(found, found)


NODE = UNIT.node
ONCE = 4 * NODE  # augmentation, start, telemetry and the update, of nothing
BESIDE = 6 * UNIT.launch


@pytest.mark.parametrize(
    ("method", "serial", "hidden"),
    [
        ("at", 10 * (1 + NODE) + 3, 0),
        ("ard", 10 * (1 + NODE) + 3 + 0.5 + 0.5, 0.5),  # T(x) hides behind the attack, S(x) does not
        ("iad1", 10 * (1 + NODE) + 2 * 3 + 2 * 0.5, 1.0),
        ("iad2", 10 * (1 + NODE) + 2 * 3 + 2 * 0.5, 1.0),
    ],
)
def test_the_critical_path(method: str, serial: float, hidden: float) -> None:
    step = predict.predict(config.load({"method": method}), methods.get(method), passes(), UNIT, F32)
    for found in (step.device_s, step.compiled_s):
        assert found == pytest.approx(serial + ONCE + BESIDE)
    assert step.lanes_s == pytest.approx(serial + ONCE + BESIDE - hidden)
    assert step.share_of_convolutions == pytest.approx((serial - 10 * NODE) / (serial + ONCE))


def test_a_teacher_that_is_slower_than_the_attack_decides() -> None:
    step = predict.predict(config.load({"method": "ard"}), methods.get("ard"), passes(forward=20.0), UNIT, F32)
    assert step.lanes_s == pytest.approx(20 + 3 + 20 + ONCE + BESIDE)


def test_launches_are_those_of_a_whole_step() -> None:
    """Ten attacked passes with the update of the images, two trained, two forward, and four kernels once."""
    step = predict.predict(config.load({"method": "iad1"}), methods.get("iad1"), passes(), UNIT, F32)
    assert step.launches == 10 * 2 + 2 + 2 + 4
    assert step.eager_s == pytest.approx(10 * (1 + 0.5) + 2 * 3 + 2 * 0.5 + 4 * 0.5)  # each kernel is launched


def test_a_compiled_step_has_the_compiled_passes() -> None:
    slow, fast = passes(attacked=2.0), passes()
    both = predict.GpuPasses(slow.op_by_op, fast.compiled)
    step = predict.predict(config.load({"method": "at"}), methods.get("at"), both, UNIT, F32)
    assert step.device_s - step.compiled_s == pytest.approx(10)


def test_what_is_done_once_moves() -> None:
    """128 images of 3x32x32 and 62 parameters of a million: bytes of each kernel."""
    found = passes(sizes=(10**6,) * 62, images=128 * 3072).compiled
    images = 128 * 3072
    once: dict[str, list[float]] = {}
    for op in predict.once(found, AMP):
        once.setdefault(op.name, []).append(op.bytes)
    assert once.pop("crop_flip") == [5 * images]  # bytes in, float32 out
    assert once.pop("random_start") == [8 * images]
    assert once.pop("batch_sums") == [0]
    assert once.pop("sgd") == [62e6 * (4 * 4 + 2 * 2)]  # gradients and copies in bfloat16
    assert not once
    in_float32 = [op.bytes for op in predict.once(found, F32) if op.name == "sgd"]
    assert len(in_float32) == 4  # 62 x 16 parts, 320 a launch
    assert sum(in_float32) == pytest.approx(62e6 * 5 * 4)
    assert [op.bytes for op in predict.update_of_images(found)] == [16 * images]


def test_peak_memory() -> None:
    mebi = 2**20
    run, row = config.load({"method": "iad1"}), methods.get("iad1")
    found = passes(sizes=(mebi,))
    # weights and momentum 8, gradients 4, two trained passes of 30; with AMP copies 2, the teacher 2, gradients 2
    assert predict.predict(run, row, found, UNIT, F32).peak_mib == pytest.approx(8 + 4 + 60 + 4)
    assert predict.predict(run, row, found, UNIT, AMP).peak_mib == pytest.approx(8 + 2 + 60 + 2 + 2)
    attack_decides = passes(sizes=(mebi,), kept_attacked=100 * mebi)
    assert predict.predict(run, row, attack_decides, UNIT, F32).peak_mib == pytest.approx(8 + 4 + 100)


# ---------------------------------------------------------------- the command


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(predict.main, [str(one) for one in arguments])


def test_a_prediction_says_that_it_is_one(tmp_path: Path) -> None:
    done = invoke("--gpu", "a100", "--model", "resnet8", "--batch-size", 4, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert done.output.startswith("PREDICTED for one A100 SXM 80 GB, not measured")
    assert "assumed: a full wave reaches 60 %" in done.output
    with (tmp_path / "predicted.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["ard", "iad1", "akd2", "iad2"]
    for row in rows.values():
        names = ("lanes", "compiled", "device", "eager")
        seconds = [float(row[f"{name}_epoch_s"]) for name in names]
        assert seconds == sorted(seconds)
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
