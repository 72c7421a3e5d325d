"""Every pipeline on a GPU gives what it gives on a CPU, where a GPU does not decode to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.pipelines.loaders import LOADERS, Loader, require

JPEG_BY_A_GPU = ("dali-crops",)  # and resized there
TOLERANCE = 8 / 255


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.name)
def test_batches_are_those_of_a_cpu(loader: Loader, tmp_path: Path) -> None:
    require(loader)
    data = loader.make_data(tmp_path)
    most = TOLERANCE if loader.name in JPEG_BY_A_GPU else 0
    held = list(loader(data, 4, device="cuda").epoch(1))  # more than a loader makes ahead
    torch.cuda.synchronize()
    for got, expected in zip(held, loader(data, 4).epoch(1), strict=True):
        assert got.x_nat.device.type == got.labels.device.type == got.sample.device.type == "cuda"
        assert got.x_nat.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(got.labels.cpu(), expected.labels)
        assert torch.equal(got.sample.cpu(), expected.sample)
        assert (got.x_nat.cpu() - expected.x_nat).abs().max() <= most
