"""The formulas of bytes against numbers worked out by hand; the three ways of a case do the same work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.lib.calls import op_cases
from bench.lib.calls.op_cases import OpCase
from engine.kernels import reference

CPU = torch.device("cpu")


@pytest.mark.parametrize(("case", "moved", "footprint"), [
    # six arrays of 1,280 floats; 128 labels, alphas and losses
    (op_cases.distill_loss(128, 10, 1.0, 1.0), 30_720 + 2_048, 32_768),
    (op_cases.distill_loss(128, 10, 1.0, 1.0, torch.bfloat16), 15_360 + 2_048, 17_408),
    # nine arrays; two factors of each sample, too
    (op_cases.distill_loss(128, 10, 1.0, 1.0, name="saad"), 46_080 + 3_072, 49_152),
    # 393,216 pixels, and an index of each image
    (op_cases.random_start(128, 32), 1_572_864 + 1_024, 1_572_864 + 1_024),
    # 393,216 pixels of three arrays, one of them written as well
    (op_cases.pgd_update(128, 32), 6_291_456, 4_718_592),
    (op_cases.pgd_update(128, 32, torch.bfloat16), 5_505_024, 3_932_160),
    # 768,000 pixels of three arrays, one of them written as well, and a difference of each image
    (op_cases.fab_step(250, 32, "L2"), 12_288_000 + 1_000, 9_216_000 + 1_000),
    # a byte and a float for each of 1,572,864 pixels; three integers for each image
    (op_cases.crop_flip(128, 64), 7_864_320 + 3_072, 7_867_392),
    # 131,072 values of a map: 3 maps forward and 5 backward; with a residual 4 and 7
    (op_cases.batch_norm(128, 16, 8), 8 * 524_288, 4 * 524_288),
    (op_cases.batch_norm(128, 16, 8, torch.bfloat16, residual=True), 11 * 262_144, 6 * 262_144),
    # four logits of 1,280 floats, a label and an alpha of each sample; 21 + 20 + 4 sums, read and written
    (op_cases.batch_sums(128, 10), 20_480 + 1_536 + 2 * 360, 20_480 + 1_536 + 360),
    # 131,072 values of a map, two maps in each direction, and 2,304 of the weight in each
    (op_cases.conv3x3(128, 16, 8), 4 * 524_288 + 2 * 9_216, 4 * 524_288 + 9_216),
    # 24,576 numbers of images, 432 of the weight, 131,072 of a map; a step has 3 x images, weight and map
    (op_cases.image_conv3x3(128, 16, 8), 98_304 + 1_728 + 524_288, 98_304 + 1_728 + 524_288),
    (op_cases.image_conv3x3(128, 16, 8, torch.bfloat16, step=True),
     4 * 98_304 + 2 * 1_728 + 2 * 262_144, 2 * 98_304 + 1_728 + 2 * 262_144),
    # 4 x 9 x (16 + 64 + 256 + 1,024) weights
    (op_cases.sgd_update(4), 48_960 * 20, 48_960 * 12),
])  # fmt: skip
def test_bytes(case: OpCase, moved: int, footprint: int) -> None:
    assert (case.bytes_moved, case.footprint) == (moved, footprint)


@pytest.mark.parametrize(("cache", "pixels", "batch"), [
    (0, 32, 8192), (2**25, 32, 8192), (2**25, 64, 2048), (3 * 2**24, 32, 8192), (3 * 2**24 + 1, 32, 16384),
])  # fmt: skip
def test_the_large_batch_is_the_first_power_of_two_beyond_the_cache(cache: int, pixels: int, batch: int) -> None:
    assert op_cases.batch_beyond(cache, pixels) == batch


def test_the_table_has_every_size() -> None:
    table = [(case.op, case.shape, case.setting, case.dtype) for case in op_cases.table(2**25, quick=False)]
    logits = ("128x10", "128x100", "1024x100", "1024x1000", "4096x1000")
    images = ("128x3x32x32", "8192x3x32x32", "128x3x64x64", "2048x3x64x64")
    assert len(set(table)) == len(table)
    assert {*table} == {
        *(("distill_loss", shape, f"tau {taus}", torch.float32) for shape in logits
          for taus in ("1, tau_self 1", "5, tau_self 2")),
        ("distill_loss", "1024x1000", "tau 1, tau_self 1", torch.bfloat16),
        *(("distill_loss", shape, "saad", torch.float32) for shape in ("128x100", "1024x1000")),
        *((op, shape, "Linf", torch.float32) for op in ("random_start", "pgd_update") for shape in images),
        ("pgd_update", "128x3x32x32", "Linf", torch.bfloat16),
        *(("fab_step", "250x3x32x32", norm, torch.float32) for norm in ("Linf", "L2")),
        *(("crop_flip", shape, "padding 4", torch.float32) for shape in images),
        *(("batch_norm", shape, after, dtype) for shape in ("128x16x8x8", "128x64x32x32", "128x512x4x4")
          for after in ("relu", "residual, relu") for dtype in (torch.float32, torch.bfloat16)),
        *(("batch_sums", shape, "3 terms", torch.float32) for shape in logits[:3]),
        *(("conv3x3", f"128x{size}", "of the images", torch.float32)
          for size in ("16x32x32", "32x16x16", "64x8x8", "64x32x32", "256x8x8", "512x4x4")),
        *(("image_conv3x3", shape, part, dtype) for shape in ("128x16x32x32", "128x64x32x32")
          for part in ("forward", "and a step") for dtype in (torch.float32, torch.bfloat16)),
        *(("sgd_update", shape, "momentum", torch.bfloat16) for shape in ("16x16", "16x64")),
    }  # fmt: skip


def test_the_copy_has_the_footprint_and_fills_it() -> None:
    copy: Any = op_cases.copy(1_000, CPU)
    target, (source,) = copy.func.__self__, copy.args
    assert target.nbytes + source.nbytes == 1_000
    target.zero_()
    copy()
    assert torch.equal(target, torch.ones(125))


@pytest.mark.parametrize("case", [
    op_cases.distill_loss(6, 5, 3.0, 2.0), op_cases.distill_loss(6, 5, 3.0, 2.0, name="saad"),
    op_cases.random_start(2, 8), op_cases.pgd_update(2, 8, torch.bfloat16), op_cases.crop_flip(3, 8),
    op_cases.fab_step(2, 8, "Linf"), op_cases.fab_step(2, 8, "L2"),
    op_cases.batch_norm(2, 8, 4), op_cases.batch_norm(2, 8, 4, residual=True),
    op_cases.batch_sums(3, 4), op_cases.conv3x3(2, 4, 5),
    op_cases.image_conv3x3(2, 4, 5), op_cases.image_conv3x3(2, 4, 5, step=True), op_cases.sgd_update(2),
], ids=lambda case: f"{case.op} {case.setting}")  # fmt: skip
def test_the_three_ways_are_the_same_work(case: OpCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """All end in the reference, with the same tensors and numbers; one of them through torch.compile."""
    monkeypatch.setenv("ENGINE_KERNELS", "reference")
    given: list[tuple[Any, ...]] = []
    compiled_calls: list[int] = []
    original: Callable[..., object] = getattr(reference, case.op)

    def spy(*arguments: Any) -> object:
        given.append(arguments)
        return original(*arguments)

    def compile_(function: Callable[..., object], **_: object) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            compiled_calls.append(len(given))
            return function(*arguments)

        return call

    monkeypatch.setattr(reference, case.op, spy)
    monkeypatch.setattr(torch, "compile", compile_)
    for call in case.calls(CPU):
        call()
    assert compiled_calls == [1]
    eager, compiled, public = map(flat, given)
    for other in (compiled, public):
        assert len(other) == len(eager)
        for mine, theirs in zip(eager, other, strict=True):
            assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs


def flat(given: Any) -> list[Any]:
    """Tensors and numbers of nested tuples."""
    return [leaf for part in given for leaf in flat(part)] if isinstance(given, tuple) else [given]


@pytest.mark.parametrize(("name", "gradients"), [("iad2", 2), ("saad", 3)])
def test_the_loss_is_timed_with_all_gradients(name: str, gradients: int) -> None:
    found: Any = op_cases.distill_loss(6, 5, 3.0, 2.0, name=name).calls(CPU).eager()
    assert len(found) == gradients
    for gradient_BC in found:
        assert gradient_BC.shape == (6, 5)
        assert bool((gradient_BC != 0).all())


def test_crop_flip_walks_through_the_data_set_and_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(reference, "crop_flip", lambda *arguments: seen.append(arguments[4]))
    monkeypatch.setattr(op_cases, "RESIDENT", 12)
    calls = op_cases.crop_flip(5, 8).calls(CPU)
    for _ in range(3):
        calls.eager()
    assert torch.cat(seen[:2]).unique().numel() == 10
    assert torch.equal(seen[2], seen[0])
