"""The pipeline of DALI, on a CPU for real: its pixels, bad images, and that nothing is left of it.

Of a GPU the definition is checked, by serialising it; tests/gpu/ runs it.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from engine.pipelines.crops import centre_crops, random_crops
from engine.pipelines.dali import ArraySource, DALIPipeline, FileSource, Source, define
from engine.pipelines.reading.encoded import EncodedImages, encoded_splits
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Request, Split
from tests.pipelines.loaders import ARRAYS, COUNT, FILES, SIZES, equal, threads, threads_end
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

pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'iad-engine[dali]'")

ENCODED = in_memory(*FILES)
SMALL = Request(image_size=16)


def pipeline(
    data: Split | EncodedImages,
    batch_size: int = 8,
    *,
    augment: bool = True,
    order: str = "random",
    **options: Any,
) -> DALIPipeline:
    sampling = Sampling(len(data), batch_size, 3, order)
    given = {"augment": augment, "flip": True, "device": "cpu", "workers": 1, **options}
    return DALIPipeline(data, sampling, **given)


@pytest.fixture(autouse=True)
def threads_before() -> Iterator[int]:
    """Number of threads that a test begins with; it must end with no more."""
    before = len(threads())
    yield before
    assert threads_end(before), threads()


both = pytest.mark.parametrize("data", [ARRAYS, ENCODED], ids=["arrays", "encoded"])

# ---------------------------------------------------------------- the pixels

TOLERANCE = 3.5 / 255  # Pillow rounds between its two passes, and JPEG decoders differ by a level


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [12, 40, 224])
def test_random_crops_look_as_pillow_cuts_and_resizes_them(size: int, kind: str) -> None:
    files = [encode(smooth(number, *shape), kind) for number, shape in enumerate(SHAPES)]
    sample_B, heights_B, widths_B = torch.arange(12), *torch.tensor(SHAPES).T
    crops = random_crops(3, 6, sample_B, heights_B, widths_B)
    assert set(crops.flip.tolist()) == {0, 1}
    (batch,) = pipeline(in_memory(*files, size=size), 12, order="sequential").epoch(6)
    assert (batch.x_nat - cut_and_resized(files, crops, size)).abs().max() < TOLERANCE
    (batch,) = pipeline(in_memory(*files, size=size), 12, order="sequential", flip=False).epoch(6)
    unflipped = crops._replace(flip=torch.zeros_like(crops.flip))
    assert (batch.x_nat - cut_and_resized(files, unflipped, size)).abs().max() < TOLERANCE


def test_evaluation_shows_the_centre() -> None:
    from torchvision.transforms import functional as TF

    shapes = [(256, 256), (300, 420), (512, 400), (333, 250)]
    files = [encode(smooth(number, *shape)) for number, shape in enumerate(shapes)]
    evaluation = pipeline(in_memory(*files, size=224), 4, order="sequential", augment=False)
    (batch,) = evaluation.epoch(0)
    crops = centre_crops(*torch.tensor(shapes).T)
    assert (batch.x_nat - cut_and_resized(files, crops, 224)).abs().max() < TOLERANCE
    resized = [TF.resize(Image.open(io.BytesIO(data)), 256, antialias=True) for data in files]
    customary = torch.stack([TF.to_tensor(TF.center_crop(image, [224, 224])) for image in resized])
    assert (batch.x_nat - customary).abs().max() < 5 / 255  # crops are of whole pixels


def test_images_are_read_as_pillow_reads_them() -> None:
    """Evaluation shows the central 28x28 of 32x32 pixels, here without resizing them."""
    image = Image.fromarray(smooth(1, 32, 32))
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera's orientation
    exactly = {
        "grey jpeg": encode(image.convert("L")),
        "rgb jpeg": encode(image, subsampling=0),
        "cmyk": encode(image.convert("CMYK")),
        "turned": encode(image, subsampling=0, exif=turned),
        "progressive": encode(image, subsampling=0, progressive=True),
        "rgb png": encode(image, "PNG"),
        "grey png": encode(image.convert("L"), "PNG"),
        "palette": encode(image.quantize(32), "PNG"),
        "alpha": encode(image.convert("RGBA"), "PNG"),
        "black and white": encode(image.convert("1"), "PNG"),
        "gif": encode(image, "GIF"),
        "webp": encode(image, "WEBP"),
    }
    files = list(exactly.values())
    (batch,) = pipeline(in_memory(*files, size=28), len(files), order="sequential", augment=False).epoch(0)
    for name, data, x in zip(exactly, files, batch.x_nat, strict=True):
        with Image.open(io.BytesIO(data)) as opened_image:
            expected = np.asarray(ImageOps.exif_transpose(opened_image).convert("RGB"))[2:30, 2:30]
        np.testing.assert_array_equal((x.permute(1, 2, 0) * 255).numpy(), expected, name)


def test_images_of_any_size_are_enlarged() -> None:
    shapes = [(1, 1), (1, 90), (90, 1), (3, 2), (2, 700)]
    files = [encode(smooth(number, *shape), "PNG") for number, shape in enumerate(shapes)]
    crops = random_crops(3, 1, torch.arange(5), *torch.tensor(shapes).T)
    (batch,) = pipeline(in_memory(*files, size=20), 5, order="sequential").epoch(1)
    assert (batch.x_nat - cut_and_resized(files, crops, 20)).abs().max() < TOLERANCE


def test_real_photographs_look_as_pillow_resizes_them(real_images: Path) -> None:
    request = Request(limit_test=200, image_size=32)
    images = encoded_splits(*listings(real_images, request), request)[1]
    (batch,) = pipeline(images, len(images), order="sequential").epoch(0)
    files, heights, widths = zip(*map(images.read, range(len(images))), strict=True)
    crops = random_crops(3, 0, torch.arange(len(images)), torch.tensor(heights), torch.tensor(widths))
    assert (batch.x_nat - cut_and_resized(list(files), crops, 32)).abs().mean() < 1 / 255
    assert torch.equal(batch.labels, images.labels)


# ---------------------------------------------------------------- folders and archives


def test_folder_and_archive_give_the_same_batches(tmp_path: Path) -> None:
    root = write(tmp_path / "folder", image_folder(FILES))
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as file:
        for name, data in image_folder(FILES).items():
            file.writestr(name, data)
    train, zipped = (encoded_splits(*listings(place, SMALL), SMALL)[0] for place in (root, tmp_path / "whole.zip"))
    batches = list(pipeline(train).epoch(0))
    assert all(map(equal, pipeline(zipped).epoch(0), batches))
    assert sum(len(batch.sample) for batch in batches) == COUNT
    by_number = {int(Path(name).stem): sample for sample, name in enumerate(train.names)}
    (expected,) = pipeline(ENCODED, COUNT, order="sequential", augment=False).epoch(0)
    (got,) = pipeline(train, COUNT, order="sequential", augment=False).epoch(0)
    assert torch.equal(got.x_nat[[by_number[number] for number in range(COUNT)]], expected.x_nat)


# ---------------------------------------------------------------- bad data


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_image_ends_the_epoch_with_its_name(data: bytes) -> None:
    one = pipeline(in_memory(*FILES[:9], data, *FILES[10:]), 4)
    with pytest.raises(ValueError, match=r"^data: X/9 is not a readable image \([^\n]*\)$"):
        list(one.epoch(0))


TABLES = FILES[9].index(b"\xff\xc4") + 4
UNDECODABLE = FILES[9][:TABLES] + bytes(30) + FILES[9][TABLES + 30 :]  # no Huffman table, which no header shows


def test_an_image_that_only_dali_finds_bad_ends_the_epoch_with_its_name() -> None:
    images = in_memory(*FILES[:9], UNDECODABLE, *FILES[10:])
    assert images.read(9)[0] == UNDECODABLE
    one = pipeline(images, 4)
    for _ in range(2):  # the pipeline is none the worse for it
        with pytest.raises(ValueError, match=r"^data: X/9 cannot be decoded by DALI \([^\n]+\)$"):
            list(one.epoch(0))


def test_batches_before_a_bad_image_are_given() -> None:
    order = Sampling(COUNT, 4, 3).samples(0)
    files = list(FILES)
    files[int(order[-1])] = b"nothing"
    batches = pipeline(in_memory(*files), 4, batches_ahead=1).epoch(0)
    expected = pipeline(ENCODED, 4).epoch(0)
    assert all(equal(next(batches), next(expected)) for _ in range(8))
    with pytest.raises(ValueError, match="is not a readable image"):
        list(batches)


def test_a_file_that_vanishes_ends_the_epoch_with_its_name(tmp_path: Path) -> None:
    root = write(tmp_path, image_folder(FILES))
    missing = root / "train/b/01.jpg"
    request = Request(image_size=16, on_bad_image="skip")
    train, _ = encoded_splits(*listings(root, request), request)
    assert train.skipped == ()
    missing.unlink()
    with pytest.raises(ValueError, match=rf"^data: {re.escape(str(missing))} is not a readable image \(.*No such"):
        list(pipeline(train).epoch(0))


def test_images_of_two_sizes_end_the_epoch_where_they_must_be_of_one() -> None:
    images = in_memory(*FILES[:3], size=SIZES[0][0], any_size=False)
    with pytest.raises(ValueError, match=r"^data: X/\d is \d+x\d+ pixels and must be 20x20 as the other images"):
        list(pipeline(images, 3).epoch(0))


# ---------------------------------------------------------------- threads


@pytest.mark.parametrize("data", [b"nothing", UNDECODABLE], ids=["reading fails", "decoding fails"])
def test_a_failed_epoch_leaves_nothing_although_its_error_is_kept(data: bytes, threads_before: int) -> None:
    with pytest.raises(ValueError, match="X/9") as error:
        list(pipeline(in_memory(*FILES[:9], data)).epoch(0))
    assert threads_end(threads_before)
    assert "X/9" in str(error.value)


# ---------------------------------------------------------------- what does not fit


def test_too_old_a_dali_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvidia.dali.__version__", "2.1.1")
    with pytest.raises(
        ValueError, match=r"^pipeline: dali needs `pip install [^\n]*` \(version 2.1.1 is too old\)$"
    ):
        pipeline(ARRAYS)


# ---------------------------------------------------------------- on a GPU


def fields(message: bytes) -> list[tuple[int, Any]]:
    """Numbers and values of a protocol buffer's fields: int, or bytes."""
    found: list[tuple[int, Any]] = []
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        size = {0: 0, 1: 8, 5: 4}.get(kind)
        if kind == 0:
            found.append((number, varint()))
            continue
        size = varint() if size is None else size
        found.append((number, message[at : at + size]))
        at += size
    return found


def operators(source: Source, on_gpu: bool) -> list[tuple[str, str]]:
    """Operators and output, each with its device, of the definition as DALI checks and serialises it."""
    definition = define(source, [], batch_size=8, num_threads=1, prefetch=2, on_gpu=on_gpu, device_id=None)
    found = []
    for number, value in fields(definition.serialize()):
        if number == 5:
            parts = fields(value)
            arguments = {part[0][1]: part[2][1] for part in (fields(value) for key, value in parts if key == 4)}
            found.append((parts[0][1].decode(), arguments[b"device"].decode()))
        elif number == 7:
            found.append(("output", fields(value)[1][1].decode()))
    return found


@pytest.mark.parametrize(("on_gpu", "decoding", "device"), [(True, "mixed", "gpu"), (False, "cpu", "cpu")])
def test_a_gpu_decodes_and_resizes_by_the_same_definition(on_gpu: bool, decoding: str, device: str) -> None:
    found = operators(FileSource(ENCODED, lambda *_: pytest.fail("nothing is read")), on_gpu)
    assert [each for each in found if each[0] != "ExternalSource"] == [
        ("decoders__ImageSlice", decoding),
        ("Resize", device),
        ("Flip", device),
        ("output", device),
    ]
    assert found.count(("ExternalSource", "cpu")) == 4
    assert operators(ArraySource(ARRAYS.images), on_gpu) == [("ExternalSource", "cpu"), ("output", device)]
