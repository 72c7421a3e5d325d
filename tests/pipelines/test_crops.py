"""Crops: against torchvision's distribution and a second, scalar implementation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from engine.kernels.philox import Stream, random_words
from engine.pipelines.crops import Crops, centre_crops, random_crops

COUNT = 3000
SIZE = st.integers(1, 2**12)


def crops(height: int, width: int, count: int = COUNT, seed: int = 5, epoch: int = 2) -> Crops:
    """One crop each of so many samples whose images are of one size."""
    sample_B = torch.arange(count)
    return random_crops(seed, epoch, sample_B, torch.full((count,), height), torch.full((count,), width))


def scalar(seed: int, epoch: int, sample: int, height: int, width: int) -> tuple[int, ...]:
    """RandomResizedCrop as its authors describe it, one image at a time, with Python's own numbers."""
    words = random_words(seed, Stream.AUGMENT, epoch, torch.tensor([sample]), 41)[0].tolist()
    flip = int(words[40] >= 2**31)
    for t in range(10):
        area, ratio, top, left = (word / 2**32 for word in words[4 * t : 4 * t + 4])
        pixels = height * width * (0.08 + 0.92 * area)
        aspect = math.exp(math.log(3 / 4) + ratio * (math.log(4 / 3) - math.log(3 / 4)))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w, flip
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w, flip


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.lists(st.tuples(st.integers(0, 2**32 - 1), SIZE, SIZE), max_size=5),
)
def test_crops_equal_those_of_the_scalar_implementation(
    seed: int, epoch: int, images: list[tuple[int, int, int]]
) -> None:
    sample_B, heights_B, widths_B = torch.tensor(images, dtype=torch.int64).reshape(-1, 3).unbind(1)
    drawn = random_crops(seed, epoch, sample_B, heights_B, widths_B)
    assert all(part.dtype == torch.int64 for part in drawn)
    got = torch.stack(drawn, dim=1).tolist()
    assert got == [list(scalar(seed, epoch, *image)) for image in images]


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 500), (500, 1), (2, 3), (37, 400), (333, 500), (2**31 - 1, 2**31 - 1)]
)
def test_crops_lie_in_their_images(size: tuple[int, int]) -> None:
    height, width = size
    for top, left, h, w in (crops(height, width)[:4], centre_crops(*map(torch.tensor, size))[:4]):
        assert h.min() >= 1
        assert w.min() >= 1
        assert top.min() >= 0
        assert left.min() >= 0
        assert (top + h).max() <= height
        assert (left + w).max() <= width


@pytest.mark.parametrize("size", [(300, 400), (224, 224), (480, 200)])
def test_crops_are_distributed_as_torchvision_s(size: tuple[int, int]) -> None:
    from torchvision.transforms import RandomResizedCrop

    height, width = size
    image = torch.empty(3, height, width)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        reference = torch.tensor(
            [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(COUNT)]
        )

    def features(top: Tensor, left: Tensor, h: Tensor, w: Tensor) -> dict[str, Tensor]:
        return {
            "area": h * w / (height * width),
            "ratio": w / h,
            "top": top / (height - h).clamp(1),
            "left": left / (width - w).clamp(1),
            "middle row": top + h / 2,
            "middle column": left + w / 2,
        }

    expected = features(*reference.unbind(1))
    for name, got in features(*crops(height, width)[:4]).items():
        assert stats.ks_2samp(got.numpy(), expected[name].numpy()).pvalue > 0.01, name


def test_area_and_ratio_are_uniform_where_every_try_fits() -> None:
    drawn = crops(10**6, 10**6)
    area, log_ratio = drawn.height * drawn.width / 1e12, (drawn.width / drawn.height).log()
    whole = area < 0.75  # with a ratio up to 4/3 these fit at the first try
    assert stats.kstest(area[whole].numpy(), stats.uniform(0.08, 0.67).cdf).pvalue > 0.01
    bound = math.log(4 / 3)
    assert stats.kstest(log_ratio[whole].numpy(), stats.uniform(-bound, 2 * bound).cdf).pvalue > 0.01
    assert stats.kstest((drawn.top / (10**6 - drawn.height)).numpy(), stats.uniform.cdf).pvalue > 0.01


def test_half_of_the_crops_are_mirrored_whatever_they_show() -> None:
    drawn = crops(300, 400)
    assert set(drawn.flip.tolist()) == {0, 1}
    assert abs(drawn.flip.double().mean() - 0.5) < 3 * 0.5 / COUNT**0.5
    areas = (drawn.height * drawn.width).double()
    assert stats.ks_2samp(areas[drawn.flip == 0].numpy(), areas[drawn.flip == 1].numpy()).pvalue > 0.01


def test_a_crop_does_not_depend_on_its_batch() -> None:
    together = torch.stack(crops(300, 400, 100), dim=1)
    alone = [crops(300, 400, 1)]
    for sample in (1, 37, 99):
        alone.append(random_crops(5, 2, *(torch.tensor([number]) for number in (sample, 300, 400))))
    assert torch.equal(together[[0, 1, 37, 99]], torch.cat([torch.stack(each, dim=1) for each in alone]))


def test_seed_epoch_and_sample_each_make_another_crop() -> None:
    drawn = [torch.stack(crops(300, 400, 2, seed, epoch)).T for seed in (0, 1, 2**40) for epoch in (0, 1)]
    assert len({tuple(row.tolist()) for pair in drawn for row in pair}) == 12


@pytest.mark.parametrize("size", [(256, 256), (375, 500), (500, 333), (1, 9), (3, 2)])
def test_centre_crops_show_what_resizing_and_cutting_out_the_centre_does(size: tuple[int, int]) -> None:
    """An image of coordinates, resized until its shorter side is 256, of which 224 remain."""
    height, width = size
    top, left, h, w, flip = (int(part) for part in centre_crops(*map(torch.tensor, size)))
    assert (h == w, flip) == (True, 0)
    scale = 256 / min(height, width)
    expected = ((height * scale - 224) / 2, (width * scale - 224) / 2, 224)
    for got, want in zip((top, left, h), expected, strict=True):
        assert abs(got * scale - want) <= scale  # a pixel of the original
