"""The pipeline of a plain install: pixels of Pillow to the bit, and bad images."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.pipelines.crops import centre_crops, random_crops
from engine.pipelines.images import ImagePipeline
from engine.pipelines.reading.encoded import EncodedImages, encoded_splits
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Request, Split
from tests.pipelines.loaders import ARRAYS, COUNT, FILES, SIZES, equal, python_threads
from tests.pipelines.photographs import (
    SHAPES,
    UNREADABLE,
    cut_and_resized,
    encode,
    image_folder,
    in_memory,
    listings,
    smooth,
    write,
)

ENCODED = in_memory(*FILES)


def pipeline(
    data: Split | EncodedImages,
    batch_size: int = 8,
    *,
    augment: bool = True,
    order: str = "random",
    **options: Any,
) -> ImagePipeline:
    sampling = Sampling(len(data), batch_size, 3, order)
    return ImagePipeline(
        data, sampling, **{"augment": augment, "flip": True, "device": "cpu", "workers": 2, **options}
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [12, 40, 224])
def test_random_crops_are_cut_and_resized_by_pillow_to_the_bit(size: int, kind: str) -> None:
    files = [encode(smooth(number, *shape), kind) for number, shape in enumerate(SHAPES)]
    crops = random_crops(3, 6, torch.arange(12), *torch.tensor(SHAPES).T)
    assert set(crops.flip.tolist()) == {0, 1}
    (batch,) = pipeline(in_memory(*files, size=size), 12, order="sequential").epoch(6)
    assert torch.equal(batch.x_nat, cut_and_resized(files, crops, size))
    (batch,) = pipeline(in_memory(*files, size=size), 12, order="sequential", flip=False).epoch(6)
    unflipped = crops._replace(flip=torch.zeros_like(crops.flip))
    assert torch.equal(batch.x_nat, cut_and_resized(files, unflipped, size))


def test_without_augmentation_views_are_those_of_evaluation() -> None:
    (batch,) = pipeline(ENCODED, COUNT, order="sequential", augment=False).epoch(0)
    evaluated = ENCODED.images[torch.arange(COUNT)]
    assert torch.equal((batch.x_nat * 255).permute(0, 2, 3, 1), evaluated.float())
    assert torch.equal(batch.x_nat, cut_and_resized(FILES, centre_crops(*torch.tensor(SIZES).T), 16))


def test_images_are_read_as_evaluation_reads_them() -> None:
    image = Image.fromarray(smooth(1, 32, 24))
    turned = Image.Exif()
    turned[0x0112] = 6
    files = [
        encode(image.convert("L")),
        encode(image.convert("CMYK")),
        encode(image, exif=turned),
        encode(image.quantize(32), "PNG"),
        encode(image.convert("RGBA"), "PNG"),
        encode(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"),
        encode(image, "GIF"),
    ]
    data = in_memory(*files, size=20)
    (batch,) = pipeline(data, len(files), order="sequential", augment=False).epoch(0)
    assert torch.equal((batch.x_nat * 255).permute(0, 2, 3, 1), data.images[torch.arange(len(files))].float())


# ---------------------------------------------------------------- bad data


TABLES = FILES[9].index(b"\xff\xc4") + 4
UNDECODABLE = FILES[9][:TABLES] + bytes(30) + FILES[9][TABLES + 30 :]  # no Huffman table, which no header shows


@pytest.mark.parametrize("content", [*UNREADABLE.values(), UNDECODABLE], ids=[*UNREADABLE, "no table"])
def test_an_unreadable_image_ends_the_epoch_with_its_name(content: bytes) -> None:
    before = threading.enumerate()
    one = pipeline(in_memory(*FILES[:9], content, *FILES[10:]), 4)
    for _ in range(2):  # the pipeline is none the worse for it
        with pytest.raises(ValueError, match=r"^data: X/9 is not a readable image \([^\n]*\)$"):
            list(one.epoch(0))
    assert python_threads(before) == []


def test_batches_before_a_bad_image_are_given() -> None:
    files = list(FILES)
    files[int(Sampling(COUNT, 4, 3).samples(0)[-1])] = b"nothing"
    batches, expected = pipeline(in_memory(*files), 4).epoch(0), pipeline(ENCODED, 4).epoch(0)
    assert all(equal(next(batches), next(expected)) for _ in range(10))
    with pytest.raises(ValueError, match="is not a readable image"):
        next(batches)


def test_bad_images_are_skipped_where_asked_for(tmp_path: Path) -> None:
    root = write(tmp_path, {**image_folder(FILES), "train/b/01.jpg": b"nothing"})
    request = Request(image_size=16, on_bad_image="skip")
    train, _ = encoded_splits(*listings(root, request), request)
    assert train.skipped == (str(root / "train/b/01.jpg"),)
    assert sum(len(batch.sample) for batch in pipeline(train).epoch(0)) == COUNT - 1


def test_a_file_that_vanishes_ends_the_epoch_with_its_name(tmp_path: Path) -> None:
    root = write(tmp_path, image_folder(FILES))
    request = Request(image_size=16)
    train, _ = encoded_splits(*listings(root, request), request)
    missing = root / "train/b/01.jpg"
    missing.unlink()
    with pytest.raises(ValueError, match=rf"^data: {re.escape(str(missing))} is not a readable image \(.*No such"):
        list(pipeline(train).epoch(0))


def test_images_of_two_sizes_end_the_epoch_where_they_must_be_of_one() -> None:
    images = in_memory(*FILES[:3], size=SIZES[0][0], any_size=False)
    with pytest.raises(ValueError, match=r"^data: X/\d is \d+x\d+ pixels and must be 20x20 as the other images"):
        list(pipeline(images, 3).epoch(0))


# ---------------------------------------------------------------- threads


def test_all_workers_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers have two parts of each batch, which wait for each other."""
    meeting = threading.Barrier(2, timeout=5)
    fill = ImagePipeline._fill

    def meet(self: ImagePipeline, epoch: int, task: Any) -> None:
        meeting.wait()
        fill(self, epoch, task)

    monkeypatch.setattr(ImagePipeline, "_fill", meet)
    assert len(list(pipeline(ARRAYS.take(torch.arange(16)), 8).epoch(0))) == 2


def test_no_more_is_loaded_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[int] = []
    fill = ImagePipeline._fill

    def noted(self: ImagePipeline, epoch: int, task: Any) -> None:
        fill(self, epoch, task)
        filled.append(len(task[1]))

    monkeypatch.setattr(ImagePipeline, "_fill", noted)
    one = pipeline(ARRAYS, 4, batches_ahead=2)
    batches = one.epoch(0)
    next(batches)
    one.close()
    assert sum(filled) <= 3 * 4
    assert list(batches) == []
