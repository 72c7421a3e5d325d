"""`crop_flip` on a CUDA device: the table of inputs, and how it behaves there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.kernels import crop_flip
from tests.gpu.stage import (
    assert_the_device_refuses,
    by_implementation,
    captured,
    needs_two_devices,
    no_wait,
    on_a_busy_stream,
)
from tests.kernels import exact
from tests.kernels.cases import CROP_CASES, CropCase, check_crop_flip

pytestmark = by_implementation("crop_flip")

CASE = CropCase((32, 32), 3, 33, padding=4, flip=True, augment=True, seed=2**64 - 1, epoch=2**32 - 1, reuse=False)
INDEXED = replace(CASE, indexed=True)


def views(device: str, case: CropCase = CASE) -> tuple[Tensor, Tensor]:
    return crop_flip(**case.arguments(device))


@pytest.mark.parametrize("case", CROP_CASES, ids=str)
def test_table(implementation: str, device: str, case: CropCase) -> None:
    check_crop_flip(case, implementation, device)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("case", [CASE, INDEXED], ids=str)
def test_a_view_is_the_same_as_on_the_host(device: str, case: CropCase) -> None:
    x_BCHW, labels_B = views(device, case)
    expected, expected_labels = views("cpu", case)
    assert torch.equal(x_BCHW.cpu(), expected)
    assert torch.equal(labels_B.cpu(), expected_labels)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("case", [CASE, INDEXED], ids=str)
def test_the_host_does_not_wait(device: str, case: CropCase, augment: bool) -> None:
    arguments = case.arguments(device) | {"augment": augment}
    expected = crop_flip(**arguments)
    with no_wait():
        got = crop_flip(**arguments)
        crop_flip(**arguments, out=got)
    assert all(map(torch.equal, got, expected))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("case", "name"), [(CASE, "sample_B"), (INDEXED, "sample_B"), (INDEXED, "index_B")])
def test_a_captured_graph_gives_the_views_of_new_samples(device: str, case: CropCase, name: str) -> None:
    arguments = case.arguments(device)
    graph, outputs = captured(lambda: crop_flip(**arguments))
    for _ in range(2):
        arguments[name].add_(11).remainder_(40)
        graph.replay()
        assert all(map(torch.equal, outputs, crop_flip(**arguments)))


@pytest.mark.usefixtures("implementation")
def test_it_runs_on_the_current_stream(device: str) -> None:
    expected = views(device)
    arguments = CASE.arguments(device)
    right = arguments["sample_B"].clone()
    arguments["sample_B"].zero_()

    def work() -> tuple[Tensor, Tensor]:
        arguments["sample_B"].copy_(right)
        return crop_flip(**arguments)

    assert all(map(torch.equal, on_a_busy_stream(work), expected))


@needs_two_devices
def test_it_runs_where_its_tensors_are(implementation: str) -> None:
    assert torch.cuda.current_device() == 0
    check_crop_flip(CASE, implementation, "cuda:1")


@pytest.mark.parametrize("wrong", [4, -1, 2**32])
@pytest.mark.parametrize("name", ["sample_B", "index_B"])
def test_an_image_that_is_not_there_is_refused_on_the_device(implementation: str, name: str, wrong: int) -> None:
    assert_the_device_refuses(
        f"""
import torch
from engine.kernels import crop_flip
images = torch.zeros(4, 8, 8, 3, dtype=torch.uint8, device="cuda")
labels = torch.arange(4, device="cuda")
samples = {{"sample_B": labels[:2]}} | {{"{name}": torch.tensor([1, {wrong}], device="cuda")}}
crop_flip(images, labels, **samples, seed=0, epoch=0)
""",
        implementation,
    )


@pytest.mark.usefixtures("implementation")
def test_addresses_of_more_than_31_bits(device: str, memory: Callable[[float], None]) -> None:
    memory(3)
    count = 2**31 // (32 * 32 * 3) + 2
    images = torch.zeros(count, 32, 32, 3, dtype=torch.uint8, device=device)
    images[-1] = torch.randint(256, (32, 32, 3), dtype=torch.uint8)
    labels, sample_B = torch.arange(count, device=device), torch.tensor([count - 1], device=device)
    x_BCHW, labels_B = crop_flip(images, labels, sample_B, seed=3, epoch=5)
    view = exact.crop_flip(images[-1].cpu().numpy(), count - 1, seed=3, epoch=5, padding=4, flip=True)
    assert torch.equal((x_BCHW[0] * 255).round().byte().permute(1, 2, 0).cpu(), torch.from_numpy(view.copy()))
    assert labels_B.tolist() == [count - 1]
