"""Augmentation: against torchvision's classes fed with the same draws, and a function of the sample alone."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from engine.config import ColourJitterConfig
from engine.kernels.philox import Stream, random_words
from engine.pipelines.crops import random_crops
from engine.pipelines.images import ImagePipeline
from engine.pipelines.images.augmentation import OPERATIONS, Augmentation, Change
from engine.pipelines.sampling import Sampling, Shard
from engine.pipelines.splits import Split
from tests.pipelines.loaders import ARRAYS, COUNT, FILES
from tests.pipelines.photographs import Pixels, in_memory, smooth

SEED, EPOCH = 3, 2
PICTURE = Image.fromarray(smooth(5, 40, 56))
ALL = ("random-resized-crop", "trivial-augment", "colour-jitter")


def drawn(names: tuple[str, ...], count: int, **strengths: float) -> list[Change]:
    """The change of each of so many samples."""
    augmentation = Augmentation(names, ColourJitterConfig(**strengths))
    changes = augmentation.draw(SEED, EPOCH, torch.arange(count))
    assert all(len(each) == len(names) for each in changes)
    return [each[0] for each in changes]


def same(got: Image.Image, expected: Image.Image) -> bool:
    return got.mode == expected.mode == "RGB" and np.array_equal(np.asarray(got), np.asarray(expected))


# ---------------------------------------------------------------- TrivialAugment


def test_operations_and_magnitudes_are_those_of_torchvision() -> None:
    table = v2.TrivialAugmentWide._AUGMENTATION_SPACE
    assert list(OPERATIONS) == list(table)
    for name, (magnitudes, signed) in table.items():
        expected = magnitudes(31, 40, 56)
        assert OPERATIONS[name].magnitudes == ((0.0,) if expected is None else tuple(expected.tolist())), name
        assert OPERATIONS[name].signed == signed, name


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_makes_the_pixels_of_torchvision(name: str) -> None:
    reference = v2.TrivialAugmentWide()
    operation = OPERATIONS[name]
    for magnitude in operation.magnitudes[::5] + operation.magnitudes[-1:]:
        for value in (magnitude, -magnitude) if operation.signed else (magnitude,):
            expected = reference._apply_image_or_video_transform(
                PICTURE, name, value, interpolation=reference.interpolation, fill=reference._fill
            )
            assert same(operation.apply(PICTURE, value), expected), value


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Values that torchvision draws in place of random ones, in order."""
    values: list[Any] = []
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor(values.pop(0)))
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor(values.pop(0)))
    monkeypatch.setattr(torch, "randperm", lambda *_: torch.tensor(values.pop(0)))
    monkeypatch.setattr(v2.ColorJitter, "_generate_value", staticmethod(lambda low, high: values.pop(0)))
    yield values
    assert values == []


def test_trivial_augment_is_torchvision_s_of_the_same_draws(fed: list[Any]) -> None:
    reference = v2.TrivialAugmentWide()
    names, words = list(OPERATIONS), random_words(SEED, Stream.TRIVIAL_AUGMENT, EPOCH, torch.arange(150), 3)
    seen = set()
    for change, (which, magnitude, sign) in zip(drawn(("trivial-augment",), 150), words.tolist(), strict=True):
        number = math.floor(which / 2**32 * 14)
        fed.append(number)
        if len(OPERATIONS[names[number]].magnitudes) > 1:
            fed.append(math.floor(magnitude / 2**32 * 31))
        if OPERATIONS[names[number]].signed:
            fed.append(0.25 if sign >= 2**31 else 0.75)  # of those up to a half torchvision takes the negative
        assert same(change(PICTURE), reference(PICTURE)), names[number]
        seen.add(number)
    assert seen == set(range(14))


def test_operations_and_signs_are_drawn_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, float]] = []

    def record(name: str, image: Image.Image, value: float) -> Image.Image:
        calls.append((name, value))
        return image

    recording = {name: row._replace(apply=partial(record, name)) for name, row in OPERATIONS.items()}
    monkeypatch.setattr("engine.pipelines.images.augmentation.OPERATIONS", recording)
    for change in drawn(("trivial-augment",), 2800):
        change(PICTURE)
    counts = [sum(name == each for each, _ in calls) for name in OPERATIONS]
    assert stats.chisquare(counts).pvalue > 0.01
    signs = [value > 0 for name, value in calls if OPERATIONS[name].signed and value]
    assert stats.binomtest(sum(signs), len(signs)).pvalue > 0.01
    angles = sorted(abs(value) for name, value in calls if name == "Rotate")
    assert stats.kstest([angle / 135 for angle in angles], stats.uniform(-1 / 60, 31 / 30).cdf).pvalue > 0.01


# ---------------------------------------------------------------- colour jitter


STRENGTHS = {"brightness": 0.4, "contrast": 0.3, "saturation": 1.5, "hue": 0.1}


@pytest.mark.parametrize("without", [None, *STRENGTHS])
def test_colour_jitter_is_torchvision_s_of_the_same_draws(without: str | None, fed: list[Any]) -> None:
    strengths = {name: 0.0 if name == without else strength for name, strength in STRENGTHS.items()}
    reference = v2.ColorJitter(**strengths)
    words = random_words(SEED, Stream.COLOUR_JITTER, EPOCH, torch.arange(30), 8)
    orders = set()
    for change, drawn_8 in zip(drawn(("colour-jitter",), 30, **strengths), words.tolist(), strict=True):
        order = sorted(range(4), key=drawn_8[4:].__getitem__)
        fed.append(order)
        for (name, strength), word in zip(strengths.items(), drawn_8, strict=False):
            low = -strength if name == "hue" else max(0.0, 1 - strength)
            high = strength if name == "hue" else 1 + strength
            if strength:
                fed.append(low + (high - low) * word / 2**32)
        assert same(change(PICTURE), reference(PICTURE))
        orders.add(tuple(order))
    assert len(orders) > 12


# ---------------------------------------------------------------- in a pipeline


def views(
    names: tuple[str, ...], data: Any = ARRAYS, batch_size: int = 8, **options: Any
) -> tuple[Tensor, Tensor, ImagePipeline]:
    """Views by their samples, and the samples in order."""
    keys = {key: options.pop(key) for key in ("shard",) if key in options}
    start = options.pop("start_step", 0)
    given = {"augment": True, "flip": True, "device": "cpu", "workers": 1, **options}
    one = ImagePipeline(data, Sampling(len(data), batch_size, SEED, **keys), augmentation=names, **given)
    batches = list(one.epoch(EPOCH, start))
    sample = torch.cat([batch.sample for batch in batches])
    return torch.cat([batch.x_nat for batch in batches]), sample, one


@pytest.mark.parametrize("data", [ARRAYS, in_memory(*FILES)], ids=["arrays", "files"])
def test_a_view_depends_on_its_sample_alone(data: Any) -> None:
    whole, order, _ = views(ALL, data, COUNT)
    for batch_size, workers in ((5, 1), (8, 2), (COUNT, 3)):
        got, sample, _ = views(ALL, data, batch_size, workers=workers)
        assert torch.equal(sample, order)
        assert torch.equal(got, whole)
    resumed, sample, _ = views(ALL, data, start_step=3)
    assert torch.equal(resumed, whole[24:])
    ranks = [views(ALL, data, 9, shard=Shard(rank, 3))[:2] for rank in range(3)]
    by_sample = {int(number): view for number, view in zip(order, whole, strict=True)}
    for got, sample in ranks:
        assert all(torch.equal(view, by_sample[int(number)]) for number, view in zip(sample, got, strict=True))
    plain, _, _ = views((), data, COUNT)
    assert ((plain != whole).flatten(1).any(1)).double().mean() > 0.9


def test_no_global_generator_is_used() -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()]

    before = states()
    views(ALL)
    assert states() == before


def crops_of_one_size(flip: bool) -> Tensor:
    """RandomResizedCrop by torchvision of the samples' crops, of the 8 x 8 images."""
    size = torch.full((COUNT,), 8)
    crops = torch.stack(random_crops(SEED, EPOCH, torch.arange(COUNT), size, size), dim=1).tolist()
    made = []
    for number, (top, left, height, width, mirrored) in enumerate(crops):
        image = Image.fromarray(smooth(number, 8, 8))
        view = F.resized_crop(image, top, left, height, width, [8, 8])
        made.append(F.pil_to_tensor(F.horizontal_flip(view) if mirrored and flip else view))
    return torch.stack(made)


@pytest.mark.parametrize("flip", [True, False])
def test_random_resized_crops_of_images_of_one_size(flip: bool) -> None:
    got, sample, _ = views(ALL[:1], flip=flip)
    assert torch.equal(got * 255, crops_of_one_size(flip)[sample].float())


def test_further_augmentation_follows_the_crop_in_order() -> None:
    got, sample, _ = views(ALL)
    changes = Augmentation(ALL[1:], ColourJitterConfig()).draw(SEED, EPOCH, torch.arange(COUNT))
    cropped = crops_of_one_size(flip=True).permute(0, 2, 3, 1).numpy()
    expected: list[Pixels] = []
    for number in sample.tolist():
        image = Image.fromarray(cropped[number])
        for change in changes[number]:
            image = change(image)
        expected.append(np.asarray(image))
    assert torch.equal((got * 255).permute(0, 2, 3, 1), torch.from_numpy(np.stack(expected)).float())


def test_trivial_augment_comes_before_the_padded_crop_of_images_of_one_size() -> None:
    changes = drawn(("trivial-augment",), COUNT)
    changed = [np.asarray(change(Image.fromarray(smooth(i, 8, 8)))) for i, change in enumerate(changes)]
    by_hand = Split(torch.from_numpy(np.stack(changed)), ARRAYS.labels, ARRAYS.class_names)
    assert torch.equal(views(("trivial-augment",))[0], views((), by_hand)[0])


def test_augmentation_without_augment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^augmentation: trivial-augment, and augment is false$"):
        views(("trivial-augment",), augment=False)


@pytest.mark.parametrize("names", [("trivial-augmnt",), ("colour-jitter", "random-resized-crop")])
def test_unknown_names_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"^augmentation: '[\w-]+' is not known; .*known: colour-jitter"):
        views(names)
