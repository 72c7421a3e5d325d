"""The uniform random start on a CUDA device: the bits of a CPU, and how it behaves there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels import random_start
from tests.gpu.stage import by_implementation, captured, needs_two_devices, no_wait, on_a_busy_stream

pytestmark = [by_implementation("random_start"), pytest.mark.usefixtures("implementation")]

SHAPES = [(5, 3, 32, 32), (2, 1, 5, 7), (1, 4, 1, 3), (0, 3, 4, 4), (256, 3, 64, 64)]


def images(shape: tuple[int, ...], layout: torch.memory_format, device: str) -> Tensor:
    return torch.zeros(shape, device=device).contiguous(memory_format=layout)


def start(x_nat: Tensor, sample: Tensor, seed: int = 2**64 - 1, counter: int = 2**32 - 1) -> Tensor:
    return random_start(
        x_nat, sample, kind="uniform", threat_model="Linf", epsilon=8 / 255, seed=seed, counter=counter
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("seed", "counter"), [(0, 0), (2**64 - 1, 2**32 - 1), (2**32, 1)])
def test_the_numbers_are_those_of_a_cpu(
    device: str, layout: torch.memory_format, shape: tuple[int, ...], seed: int, counter: int
) -> None:
    sample = (2**32 - 1 - 3 * torch.arange(shape[0])).remainder(2**32)
    noise = start(images(shape, layout, device), sample.to(device), seed, counter)
    expected = start(images(shape, layout, "cpu"), sample, seed, counter)
    assert noise.stride() == expected.stride()
    assert torch.equal(noise.cpu(), expected)


def test_the_host_does_not_wait(device: str) -> None:
    x_nat, sample = images(SHAPES[0], torch.channels_last, device), torch.arange(5, device=device)
    expected = start(x_nat, sample)
    with no_wait():
        noise = start(x_nat, sample)
    assert torch.equal(noise, expected)


def test_a_captured_graph_gives_the_starts_of_new_samples(device: str) -> None:
    x_nat, sample = images(SHAPES[0], torch.channels_last, device), torch.arange(5, device=device)
    graph, noise = captured(lambda: start(x_nat, sample))
    for _ in range(2):
        sample += 100
        graph.replay()
        assert torch.equal(noise, start(x_nat, sample))


def test_it_runs_on_the_current_stream(device: str) -> None:
    x_nat, right = images(SHAPES[0], torch.channels_last, device), torch.arange(5, device=device)
    expected, sample = start(x_nat, right), torch.zeros_like(right)
    start(x_nat, sample)

    def work() -> Tensor:
        sample.copy_(right)
        return start(x_nat, sample)

    assert torch.equal(on_a_busy_stream(work), expected)


@needs_two_devices
def test_it_runs_where_its_tensors_are() -> None:
    assert torch.cuda.current_device() == 0
    x_nat = images(SHAPES[0], torch.channels_last, "cuda:1")
    noise = start(x_nat, torch.arange(5, device="cuda:1"))
    assert noise.device == x_nat.device
    assert torch.equal(noise.cpu(), start(x_nat.cpu(), torch.arange(5)))
