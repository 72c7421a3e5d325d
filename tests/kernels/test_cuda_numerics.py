"""The CUDA C++ kernels, compiled for the CPU and run there thread by thread: what they compute, without a GPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from engine.kernels import native, reference
from tests.fake_cuda import build
from tests.kernels.cases import (
    CROP_CASES,
    PGD_CASES,
    CropCase,
    PgdCase,
    channels_last,
    check_crop_flip,
    check_pgd_update,
    contiguous,
    shifted,
)
from tests.kernels.holding import assert_no_worse_than_twice_eager

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INVALID_VALUE, ASSERTION = 1, 710
MAX_BLOCKS, THREADS = 2048, 256  # of an L-inf step


@dataclass
class Device:
    """Takes the calls that `kernels/native.py` makes. codes: what they returned."""

    library: ctypes.CDLL
    codes: list[int] = field(default_factory=list)

    def call(self, op: str, device: torch.device, *arguments: object) -> int:
        self.codes.append(getattr(self.library, f"engine_cuda_{op}")(*arguments, None))
        return 0

    def launches(self) -> int:
        return int(self.library.emulator_launches())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = build.emulated_kernels(tmp_path_factory.mktemp("emulator"))
    library.engine_cuda_pgd_update.argtypes = [*native._UPDATE, ctypes.c_void_p]
    library.engine_cuda_crop_flip.argtypes = [*native._CROP, ctypes.c_void_p]
    return library


@pytest.fixture
def device(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Device:
    """Put its CUDA kernels, on tensors of the CPU, in the place of the native library."""
    device = Device(library)
    monkeypatch.setattr(native, "missing", lambda device_type: "")
    monkeypatch.setattr(native, "_call", device.call)
    return device


@pytest.fixture(params=["first", "last"])
def order(library: ctypes.CDLL, request: pytest.FixtureRequest) -> Iterator[None]:
    """Order in which the threads run."""
    library.emulator_run_last_threads_first(request.param == "last")
    yield
    library.emulator_run_last_threads_first(False)


# ---------------------------------------------------------------- the table of every implementation

# Others are the reference's.
FUSED_PGD_CASES = [
    case
    for case in PGD_CASES
    if case.dtype == torch.float32 and case.layouts[0] in (contiguous, channels_last, shifted)
]
FUSED_CROP_CASES = [case for case in CROP_CASES if case.dtype == torch.float32]

# What is measured case by case is read again over all of them.
measure_pgd_update = functools.cache(check_pgd_update)


@pytest.mark.parametrize("case", FUSED_PGD_CASES, ids=str)
def test_pgd_update(device: Device, case: PgdCase) -> None:
    measure_pgd_update(case, "native")
    assert set(device.codes) == {0}


def test_pgd_update_is_no_worse_than_twice_eager(device: Device) -> None:
    assert_no_worse_than_twice_eager(
        error for case in FUSED_PGD_CASES for error in measure_pgd_update(case, "native").items()
    )


@pytest.mark.parametrize("case", FUSED_CROP_CASES, ids=str)
def test_crop_flip(device: Device, case: CropCase) -> None:
    check_crop_flip(case, "native")
    assert set(device.codes) == {0}


# ---------------------------------------------------------------- what is particular to a GPU


def random_step(shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_adv, grad and x_nat that lie `offset` elements off an aligned address; a tenth of grad is 0."""
    generator = torch.Generator().manual_seed(0)

    def place(values: Tensor) -> Tensor:
        buffer = torch.empty(values.numel() + offset, dtype=values.dtype)
        return buffer[offset:].view(shape).copy_(values)

    x_nat = torch.rand(shape, generator=generator)
    x_adv = (x_nat + (torch.rand(shape, generator=generator) - 0.5) / 16).clamp(0, 1)
    grad = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.9)
    return place(x_adv), place(grad.to(dtype)), place(x_nat)


@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 8), (2, 3, 32, 33), (2, 6912)], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_wide_and_narrow_accesses_cover_all_sizes_in_one_launch(
    device: Device, order: None, l2: bool, dtype: torch.dtype, shape: tuple[int, ...], offset: int
) -> None:
    x_adv, grad, x_nat = random_step(shape, dtype, offset)
    expected = x_adv.double() if l2 else x_adv.clone()
    totals, expected_totals = torch.tensor([5, 2**33]), torch.tensor([5, 2**33])
    reference.pgd_update(expected, grad, x_nat.to(expected.dtype), l2, 8 / 255, 2 / 255, expected_totals)
    before = device.launches()
    native.pgd_update(x_adv, grad, x_nat, l2, 8 / 255, 2 / 255, totals)
    assert device.codes == [0]
    assert device.launches() == before + 1
    assert totals.tolist() == expected_totals.tolist()
    torch.testing.assert_close(x_adv.to(expected.dtype), expected, rtol=0, atol=2e-7 if l2 else 0)


def test_a_grid_walks_over_more_than_one_wave(device: Device) -> None:
    x_adv, grad, x_nat = random_step((1, 2 * MAX_BLOCKS * THREADS + 3), torch.float16, offset=1)
    expected = x_adv.clone()
    reference.pgd_update(expected, grad, x_nat, False, 8 / 255, 2 / 255, None)
    native.pgd_update(x_adv, grad, x_nat, False, 8 / 255, 2 / 255, None)
    assert torch.equal(x_adv, expected)


@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("step_size", [0.125, 100.0])
def test_what_is_not_a_number_spreads_as_in_the_reference(device: Device, l2: bool, step_size: float) -> None:
    x_adv, grad, x_nat = random_step((6, 40), torch.float32, 0)
    grad[0] = 0
    grad[1, 7] = torch.nan
    grad[2, 3] = torch.inf
    grad[3] *= 1e38
    x_adv[4, 1] = torch.nan
    x_nat[5, 2] = torch.nan
    expected = x_adv.clone()
    reference.pgd_update(expected, grad, x_nat, l2, 0.5, step_size, None)
    native.pgd_update(x_adv, grad, x_nat, l2, 0.5, step_size, None)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=4e-7 if l2 else 0, equal_nan=True)
    assert x_adv.isnan().sum(1).tolist() == ([0, 40, 40, 0, 40, 40] if l2 else [0, 0, 0, 0, 1, 1])


@pytest.mark.parametrize("l2", [False, True])
def test_nothing_is_launched_for_nothing(device: Device, l2: bool) -> None:
    empty = torch.empty(0, 3, 8, 8)
    images, labels = torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    before = device.launches()
    native.pgd_update(empty, empty, empty, l2, 0.5, 0.1, None)
    native.crop_flip(empty, labels[:0], images, labels, labels[:0], 0, 0, 4, True, True)
    assert device.codes == [0, 0]
    assert device.launches() == before


def test_an_unknown_dtype_is_refused(library: ctypes.CDLL) -> None:
    images = torch.zeros(1, 8)
    tensors = [images.data_ptr()] * 3
    for code in (-1, 3):
        update = (*tensors[:2], code, tensors[2], 1, 8, False, 0.1, 0.1, None, None)
        assert library.engine_cuda_pgd_update(*update) == INVALID_VALUE


def test_every_grey_level_is_divided_as_ieee_divides(device: Device) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    zero, x = torch.zeros(1, dtype=torch.int64), torch.empty(1, 1, 16, 16)
    native.crop_flip(x, torch.empty_like(zero), images, zero, zero, 0, 0, 0, False, False)
    assert torch.equal(x.flatten(), (torch.arange(256, dtype=torch.float64) / 255).float())


@pytest.mark.parametrize("offset", [0, 1])
def test_views_of_several_blocks_at_any_address(device: Device, offset: int) -> None:
    """A row is no multiple of an access."""
    images = torch.randint(0, 256, (5, 70, 66, 3), dtype=torch.uint8)
    labels, sample_B = torch.arange(5) * 10, torch.tensor([3, 0, 3])
    buffers = [torch.full((3 * 70 * 66 * 3 + offset,), torch.nan)[offset:] for _ in range(2)]
    got, expected = (buffer.view(3, 70, 66, 3).permute(0, 3, 1, 2) for buffer in buffers)
    got_labels, expected_labels = torch.empty_like(sample_B), torch.empty_like(sample_B)
    native.crop_flip(got, got_labels, images, labels, sample_B, 2**64 - 3, 7, 80, True, True)
    reference.crop_flip(expected, expected_labels, images, labels, sample_B, 2**64 - 3, 7, 80, True, True)
    assert torch.equal(got, expected)
    assert torch.equal(got_labels, expected_labels)


@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
@pytest.mark.parametrize("indexed", [False, True])
def test_an_image_that_is_not_there_is_asserted_and_never_read(device: Device, wrong: int, indexed: bool) -> None:
    images, labels = torch.ones(8, 4, 4, 3, dtype=torch.uint8), torch.arange(8) * 10
    x, labels_B = torch.full((3, 3, 4, 4), torch.nan), torch.full((3,), -1)
    x = x.contiguous(memory_format=torch.channels_last)
    place_B = torch.tensor([1, wrong, 3])
    samples = (torch.zeros_like(place_B), place_B) if indexed else (place_B, None)
    native.crop_flip(x, labels_B, images[:4], labels[:4], samples[0], 0, 0, 1, True, True, samples[1])
    assert device.codes == [ASSERTION]
    assert x.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert labels_B.tolist() == [10, -1, 30]
