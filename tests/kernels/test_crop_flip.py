"""`crop_flip` against pad, slice and flip of one sample at a time, and its draws against their distributions.

Each implementation that runs here is held to them in turn, in the dtypes it knows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from engine.kernels.crop_flip import crop_flip
from engine.kernels.philox import Stream, random_words


def random_images(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def reference(image_HWC: Tensor, words: list[int], padding: int, flip: bool) -> Tensor:
    """The view of one sample as CHW in float64; rounded to float32, it is the float32 quotient."""
    height, width, _ = image_HWC.shape
    padded = F.pad(image_HWC.permute(2, 0, 1), (padding,) * 4)
    row, column = (word * (2 * padding + 1) // 2**32 for word in words[:2])
    view = padded[:, row : row + height, column : column + width]
    if flip and words[2] >= 2**31:
        view = view.flip(2)
    return view.double() / 255


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 5),
    st.booleans(),
    st.integers(0, 2**63 - 1),
    st.integers(0, 200),
    st.lists(st.integers(0, 29), min_size=1, max_size=12),
)
def test_each_sample_is_padded_sliced_and_flipped(
    dtype: torch.dtype,
    height: int,
    width: int,
    padding: int,
    flip: bool,
    seed: int,
    epoch: int,
    samples: list[int],
) -> None:
    images, labels = random_images(30, height, width), torch.arange(30) * 10
    sample_B = torch.tensor(samples)
    x, labels_B = crop_flip(
        images, labels, sample_B, seed=seed, epoch=epoch, padding=padding, flip=flip, dtype=dtype
    )
    words = random_words(seed, Stream.AUGMENT, epoch, sample_B, 3).tolist()
    expected = [reference(images[sample], row, padding, flip) for sample, row in zip(samples, words, strict=True)]
    assert torch.equal(x, torch.stack(expected).to(dtype))
    assert labels_B.tolist() == [10 * sample for sample in samples]


@pytest.mark.usefixtures("implementation")
def test_without_augmentation_the_images_are_unchanged() -> None:
    images, labels = random_images(5, 8, 6), torch.arange(5)
    x, labels_B = crop_flip(images, labels, torch.tensor([3, 0]), seed=1, epoch=2, augment=False)
    assert torch.equal(x, images[[3, 0]].permute(0, 3, 1, 2) / 255)
    assert labels_B.tolist() == [3, 0]


@pytest.mark.parametrize("augment", [True, False])
def test_the_batch_is_channels_last_in_the_dtype_asked_for(augment: bool, dtype: torch.dtype) -> None:
    images = random_images(5, 8, 6)
    x, _ = crop_flip(images, torch.arange(5), torch.arange(5), seed=0, epoch=0, augment=augment, dtype=dtype)
    assert x.shape == (5, 3, 8, 6)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.dtype == dtype


@pytest.mark.usefixtures("implementation")
def test_every_pixel_value_is_its_quotient_by_255() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3).contiguous()
    x, _ = crop_flip(images, torch.tensor([0]), torch.tensor([0]), seed=0, epoch=0, augment=False)
    expected = torch.tensor([value / 255 for value in range(256)], dtype=torch.float32)
    assert torch.equal(x[0, 0].flatten(), expected)


@pytest.mark.usefixtures("implementation")
def test_the_images_in_memory_are_not_touched() -> None:
    images = random_images(4, 8, 8)
    before = images.clone()
    crop_flip(images, torch.arange(4), torch.arange(4), seed=0, epoch=0)
    assert torch.equal(images, before)


@pytest.mark.usefixtures("implementation")
def test_a_view_does_not_depend_on_its_batch_and_changes_with_epoch_and_seed() -> None:
    images, labels = random_images(64, 16, 16), torch.arange(64)
    whole, _ = crop_flip(images, labels, torch.arange(64), seed=5, epoch=7)
    some = torch.tensor([63, 2, 2, 40])
    part, _ = crop_flip(images, labels, some, seed=5, epoch=7)
    assert torch.equal(part, whole[some])
    for seed, epoch in ((5, 8), (6, 7)):
        other, _ = crop_flip(images, labels, torch.arange(64), seed=seed, epoch=epoch)
        same = (other == whole).flatten(1).all(1).float().mean()
        assert same < 0.1  # of 9 * 9 * 2 views


@pytest.mark.usefixtures("implementation")
def test_offsets_are_uniform_and_flips_are_fair() -> None:
    """Each pixel of an image of 1 + row * width + column tells from where a view was cut."""
    count, size, padding = 20_000, 9, 2
    image = torch.arange(1, size * size + 1, dtype=torch.uint8).reshape(1, size, size, 1).expand(1, size, size, 3)
    images, labels = image.expand(count, size, size, 3).contiguous(), torch.zeros(count, dtype=torch.int64)
    x, _ = crop_flip(images, labels, torch.arange(count), seed=11, epoch=0, padding=padding)
    middle = (x[:, 0, size // 2, size // 2] * 255).round().long() - 1
    beside = (x[:, 0, size // 2, size // 2 + 1] * 255).round().long() - 1
    row, column = middle // size - (size // 2 - padding), middle % size - (size // 2 - padding)
    flipped = beside < middle
    cells = (row * 5 + column) * 2 + flipped
    assert cells.min() >= 0
    assert stats.chisquare(cells.bincount(minlength=50).numpy()).pvalue > 1e-3
    unflipped, _ = crop_flip(images, labels, torch.arange(count), seed=11, epoch=0, padding=padding, flip=False)
    assert bool((unflipped[:, 0, 4, 5] > unflipped[:, 0, 4, 4]).all())


@pytest.mark.usefixtures("implementation")
def test_an_index_finds_the_image_and_the_sample_draws_its_view() -> None:
    images, labels = random_images(64, 16, 16), torch.arange(64) * 10
    sample_B, index_B = torch.tensor([63, 2, 2, 40]), torch.tensor([0, 1, 3, 2])
    expected = crop_flip(images, labels, sample_B, seed=5, epoch=7)
    moved = images.new_zeros(4, 16, 16, 3).index_copy_(0, index_B, images[sample_B])
    moved_labels = labels.new_zeros(4).index_copy_(0, index_B, labels[sample_B])
    for indexed in (
        crop_flip(moved, moved_labels, sample_B, seed=5, epoch=7, index_B=index_B),
        crop_flip(moved, moved_labels, sample_B + 2**40, seed=5, epoch=7, index_B=index_B),
        crop_flip(images, labels, sample_B, seed=5, epoch=7, index_B=sample_B),
    ):
        assert all(map(torch.equal, indexed, expected))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("wrong", [-1, 5, 2**40, -(2**40)])
@pytest.mark.parametrize("name", ["sample_B", "index_B"])
def test_an_image_that_is_not_there_is_refused(name: str, wrong: int, augment: bool) -> None:
    images, labels = random_images(5, 8, 8), torch.arange(5)
    samples: dict[str, Any] = {"sample_B": torch.tensor([0, 1, 2])} | {name: torch.tensor([0, wrong, 4])}
    with pytest.raises(IndexError, match=rf"\A{name}: there is no image {wrong} among 5\Z"):
        crop_flip(images, labels, **samples, seed=0, epoch=0, augment=augment)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"images_NHWC": random_images(5, 8, 6).float()}, ["images_NHWC", "uint8", "float32"]),
        ({"images_NHWC": random_images(5, 8, 6)[..., 0]}, ["images_NHWC", "(N, H, W, C)", "(5, 8, 6)"]),
        ({"labels_N": torch.arange(4)}, ["labels_N", "(5,)", "(4,)"]),
        ({"labels_N": torch.arange(5.0)}, ["labels_N", "int64", "float32"]),
        ({"sample_B": torch.arange(2, dtype=torch.int32)}, ["sample_B", "int64", "int32"]),
        ({"sample_B": torch.arange(2)[:, None]}, ["sample_B", "(B,)", "(2, 1)"]),
        ({"index_B": torch.arange(2, dtype=torch.int32)}, ["index_B", "int64 (2,)", "int32"]),
        ({"index_B": torch.arange(3)}, ["index_B", "(2,)", "(3,)"]),
        ({"index_B": torch.arange(2)[:, None]}, ["index_B", "(2,)", "(2, 1)"]),
        ({"index_B": torch.arange(2, device="meta")}, ["index_B", "meta", "images_NHWC", "cpu"]),
        ({"padding": -1}, ["padding", "0 or more", "-1"]),
        ({"out": (torch.zeros(2, 3, 8, 6), torch.zeros(2, dtype=torch.int64))}, ["out[0]", "channels_last"]),
        ({"out": (torch.zeros(2, 8, 6, 3).permute(0, 3, 1, 2), torch.zeros(2))}, ["out[1]", "int64", "float32"]),
        (
            {"out": (torch.zeros(3, 8, 6, 3).permute(0, 3, 1, 2), torch.zeros(3, dtype=torch.int64))},
            ["out[0]", "(2, 3, 8, 6)", "(3, 3, 8, 6)"],
        ),
    ],
)
@pytest.mark.usefixtures("implementation")
def test_a_wrong_argument_is_named_in_one_line(changes: dict[str, Any], names: list[str]) -> None:
    right: dict[str, Any] = {
        "images_NHWC": random_images(5, 8, 6),
        "labels_N": torch.arange(5),
        "sample_B": torch.arange(2),
        "seed": 0,
        "epoch": 0,
    }
    crop_flip(**right)
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        crop_flip(**right | changes)
    assert [name for name in names if name not in str(error.value)] == []
