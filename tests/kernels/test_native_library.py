"""The native library in this process: each instruction set, its threads, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import Term, crop_flip, dispatch, distill_loss, native, pgd_update
from tests.kernels.cases import (
    CROP_CASES,
    LOSS_CASES,
    PGD_CASES,
    check_crop_flip,
    check_distill_loss,
    check_pgd_update,
    table_loss,
)
from tests.kernels.fab_cases import FAB_CASES, check_fab_step
from tests.kernels.holding import assert_same_bits, threads
from tests.kernels.norms import NORM_CASES, check_batch_norm
from tests.kernels.stem_cases import STEM_CASES, check_image_conv3x3, check_image_conv3x3_update

SETS = ("AVX-512", "AVX2", "generic")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := native.missing("cpu"):
        pytest.skip(reason)
    monkeypatch.setenv("ENGINE_KERNELS", "native")


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set that the library has, also those that are not the best one of this processor."""
    library = native._library()
    best = library.engine_instruction_set()
    if library.engine_use_instruction_set(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    assert library.engine_use_instruction_set(best) == 0


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Clear the cached facts about the library, for the test and after it."""
    caches = (native.missing, native._library)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


# ---------------------------------------------------------------- every instruction set


def test_the_set_asked_for_serves_and_is_told(instruction_set: str) -> None:
    assert native.description("cpu").startswith(f"{instruction_set}, ")
    assert native._library().engine_use_instruction_set(b"MMX") != 0
    assert native.description("cpu").startswith(f"{instruction_set}, ")


def test_distill_loss_of_every_set(instruction_set: str) -> None:
    for case in [case for case in LOSS_CASES if case.batch * case.classes < 200_000][::3]:
        check_distill_loss(case, "native")


def test_pgd_update_of_every_set(instruction_set: str) -> None:
    for case in PGD_CASES[::2]:
        check_pgd_update(case, "native")


def test_fab_step_of_every_set(instruction_set: str) -> None:
    for case in FAB_CASES:
        check_fab_step(case, "native")


def test_crop_flip_of_every_set(instruction_set: str) -> None:
    for case in CROP_CASES:
        check_crop_flip(case, "native")


def test_batch_norm_of_every_set(instruction_set: str) -> None:
    for case in NORM_CASES:
        check_batch_norm(case, "native")


def test_image_conv3x3_of_every_set(instruction_set: str) -> None:
    for case in STEM_CASES:
        check_image_conv3x3(case, "native")
        check_image_conv3x3_update(case, "native")


def test_every_float16_and_every_exponent_of_bfloat16_has_its_sign(instruction_set: str) -> None:
    """The step of a pixel is the sign of its gradient, and nothing of it is lost in the conversion."""
    for dtype in (torch.float16, torch.bfloat16):
        grad = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(16, 2**12)
        x_nat, counts = torch.full((16, 2**12), 0.5), torch.zeros(2, dtype=torch.int64)
        x_adv = x_nat.clone()
        pgd_update(x_adv, grad, x_nat, threat_model="Linf", epsilon=0.25, step_size=0.125, counts=counts)
        assert torch.equal(x_adv, 0.5 + 0.125 * grad.double().nan_to_num(0).sign().float())
        assert counts.tolist() == [2, int((~grad.double().isfinite()).sum())]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_equal_the_same_numbers_in_float32(instruction_set: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    logits_BC = every[every.isfinite()][: 2**15].view(-1, 256)
    labels = torch.arange(len(logits_BC))
    terms = [Term("ce", "z")]
    half, single = (distill_loss({"z": logits}, labels % 256, terms) for logits in (logits_BC, logits_BC.float()))
    assert_same_bits(half._asdict(), single._asdict())


# ---------------------------------------------------------------- threads


def loss_call(batch: int, classes: int, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    names = ("s_adv", "s_nat", "t_at_nat", "t_at_adv", "t_st_adv")
    logits = {name: torch.randn(batch, classes, generator=generator) for name in names}
    labels = torch.randint(classes, (batch,), generator=generator)
    weights = [(0.1, 0.2), (0.3, 0.4), (1, -1), (0.5, 0.6), (0, 0.7), (0.8, 0)]
    student = {name: logits[name].requires_grad_() for name in ("s_adv", "s_nat")}
    return logits | student | {"labels": labels, "weights": weights, "tau": 2.0, "beta": 0.5}


def loss_outputs(call: dict[str, Any]) -> dict[str, Tensor]:
    result = table_loss(**call)
    grads = torch.autograd.grad(result.loss, (call["s_adv"], call["s_nat"]))
    return {name: value.detach() for name, value in result._asdict().items()} | dict(
        zip(("grad_adv", "grad_nat"), grads, strict=True)
    )


@pytest.mark.parametrize(("batch", "classes"), [(501, 10), (37, 1000)])
def test_the_bits_of_a_loss_do_not_depend_on_the_number_of_threads(batch: int, classes: int) -> None:
    call = loss_call(batch, classes)
    alone = loss_outputs(call)
    for count in (2, 3, 7):
        with threads(count):
            assert_same_bits(loss_outputs(call), alone)


@pytest.mark.parametrize("threat_model", ["Linf", "L2"])
def test_the_bits_and_counts_of_a_step_do_not_depend_on_the_number_of_threads(threat_model: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x_nat, grad = (torch.randn(64, 3, 33, 32, generator=generator) for _ in range(2))
    grad[grad.abs() < 0.1] = 0
    grad[3] = torch.nan
    outputs = []
    for count in (1, 2, 3, 7):
        x_adv, counts = x_nat.clone(), torch.zeros(2, dtype=torch.int64)
        with threads(count):
            pgd_update(x_adv, grad, x_nat, threat_model=threat_model, epsilon=1, step_size=0.5, counts=counts)
        outputs.append({"x_adv": x_adv, "counts": counts})
    assert outputs[0]["counts"].tolist() == [int((grad == 0).sum()), grad[3].numel()]
    for output in outputs[1:]:
        assert_same_bits(output, outputs[0])


def test_two_python_threads_do_not_disturb_each_other() -> None:
    calls = [loss_call(200, 100, seed) for seed in range(4)]
    expected = [loss_outputs(call) for call in calls]
    with threads(2), ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for got, wanted in zip(pool.map(loss_outputs, calls), expected, strict=True):
                assert_same_bits(got, wanted)


# ---------------------------------------------------------------- the rest of the process


def test_loading_the_library_sets_no_flush_to_zero() -> None:
    """Neither for the thread that loads it nor for torch's other ones, which start after it."""
    program = f"""
import ctypes, sys
ctypes.CDLL({str(native._FILE)!r})
assert sys.float_info.min / 2 > 0
import torch
torch.set_num_threads(2)
assert int((torch.full((2**20,), 1e-40) * 1).count_nonzero()) == 2**20
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_subnormal_gradients_are_not_zero_in_the_library() -> None:
    x_nat, counts = torch.full((16, 2**12), 0.5), torch.zeros(2, dtype=torch.int64)
    x_adv = x_nat.clone()
    with threads(2):
        grad = torch.full((16, 2**12), -1e-40)
        pgd_update(x_adv, grad, x_nat, threat_model="Linf", epsilon=0.25, step_size=0.125, counts=counts)
    assert torch.equal(x_adv, torch.full((16, 2**12), 0.375))
    assert counts.tolist() == [0, 0]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("wrong", [-1, 10, 2**40, -(2**40)])
def test_a_label_out_of_range_is_refused_before_it_is_used(wrong: int) -> None:
    call = loss_call(20, 10)
    call["labels"][7] = wrong
    low, high = int(call["labels"].min()), int(call["labels"].max())
    with pytest.raises(ValueError, match=rf"labels: expected 0 <= label < 10, got {low}\.\.{high}"):
        table_loss(**call)


@pytest.mark.parametrize("wrong", [-1, 5, 2**40, -(2**40)])
def test_a_sample_that_is_not_there_is_refused_before_it_is_read(wrong: int) -> None:
    images, labels = torch.zeros(5, 8, 8, 3, dtype=torch.uint8), torch.arange(5)
    with pytest.raises(IndexError, match=f"sample_B: there is no image {wrong} among 5"):
        crop_flip(images, labels, torch.tensor([0, wrong, 2]), seed=0, epoch=0)


def test_tensors_on_several_devices_are_refused() -> None:
    call = loss_call(4, 3)
    with pytest.raises(ValueError, match="labels is on meta, and s_nat on cpu"):
        table_loss(**call | {"labels": call["labels"].to("meta")})
    with pytest.raises(ValueError, match="t_at_nat is on meta"):
        table_loss(**call | {"t_at_nat": call["t_at_nat"].to("meta")})
    x = torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match="grad is on meta, and x_adv on cpu"):
        pgd_update(x, x.to("meta"), x, threat_model="Linf", epsilon=1, step_size=1)
    images, labels = torch.zeros(5, 8, 8, 3, dtype=torch.uint8), torch.arange(5)
    with pytest.raises(ValueError, match="sample_B is on meta, and images_NHWC on cpu"):
        crop_flip(images, labels, labels.to("meta"), seed=0, epoch=0)


# ---------------------------------------------------------------- a library that does not serve


def assert_the_reference_serves(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    assert native.missing("cpu") == reason
    with pytest.raises(ValueError, match="ENGINE_KERNELS=native: the native library"):
        dispatch.choose("pgd_update", CPU)
    monkeypatch.setenv("ENGINE_KERNELS", "auto")
    assert dispatch.choose("pgd_update", CPU) == "reference"
    assert dispatch.describe(CPU) == f"Kernels: reference; faster with native: {reason}"


@pytest.mark.usefixtures("forgetful")
def test_a_library_that_is_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_FILE", tmp_path / "_native.so")
    assert_the_reference_serves(monkeypatch, "the native library is not built (make native)")


@pytest.mark.usefixtures("forgetful")
def test_a_library_that_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_native.so"
    broken.write_text("not a library")
    monkeypatch.setattr(native, "_FILE", broken)
    assert_the_reference_serves(
        monkeypatch, f"the native library does not load: {broken}: file too short (make native)"
    )


@pytest.mark.usefixtures("forgetful")
def test_a_library_of_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_INTERFACE", -1)
    reason = f"the native library does not load: {native._FILE} was built from other sources (make native)"
    assert_the_reference_serves(monkeypatch, reason)
