"""FFCV's pipeline: its pixels, images that it cannot decode, and what it leaves of the process."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.pipelines import beton, beton_writer, ffcv
from engine.pipelines.beton_writer import Format
from engine.pipelines.encoded import EncodedImages, Listing, encoded_splits
from engine.pipelines.ffcv import FFCVPipeline
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Request
from engine.pipelines.windows import centre_windows, random_windows
from tests.pipelines.loaders import ARRAYS, COUNT, FILES, equal, in_beton
from tests.pipelines.photographs import encode, in_memory, listings, smooth
from tests.pipelines.test_dali import cut_and_resized

# FFCV decodes by the fast transform and resizes by areas, Pillow by the exact one and by triangles.
MOST, MEAN = 14 / 255, 1.5 / 255


@pytest.fixture(autouse=True)
def with_ffcv() -> None:
    try:
        ffcv.check_installed()
    except ValueError as error:
        pytest.skip(str(error))


def photographs(path: Path, files: list[bytes], size: int | None = 16, mode: str = "jpeg") -> EncodedImages:
    """The files in a .beton, JPEG as they are."""
    images = in_beton(path / "x.beton", in_memory(*files), Format(mode), size)
    assert isinstance(images, EncodedImages)
    return images


def pipeline(images: EncodedImages, batch_size: int = 8, order: str = "random", **options: Any) -> FFCVPipeline:
    given = {"augment": True, "flip": True, "device": "cpu", "workers": 1, **options}
    return FFCVPipeline(images, Sampling(len(images), batch_size, 3, order), **given)


# ---------------------------------------------------------------- the pixels


@pytest.mark.parametrize("mode", ["jpeg", "raw"])
@pytest.mark.parametrize("size", [12, 40, 224])
def test_random_windows_look_as_pillow_cuts_and_resizes_them(size: int, mode: str, tmp_path: Path) -> None:
    shapes = [(40 + 13 * number % 300, 40 + 29 * number % 350) for number in range(12)]
    files = [encode(smooth(number, *shape)) for number, shape in enumerate(shapes)]
    images = photographs(tmp_path, files, size, mode)
    windows = random_windows(3, 6, torch.arange(12), *torch.tensor(shapes).T)
    assert set(windows.flip.tolist()) == {0, 1}
    for flip in (True, False):
        (batch,) = pipeline(images, 12, "sequential", flip=flip).epoch(6)
        shown = windows if flip else windows._replace(flip=torch.zeros_like(windows.flip))
        difference = (batch.x_nat - cut_and_resized(files, shown, size)).abs()
        assert difference.max() < MOST
        assert difference.mean() < MEAN


def test_evaluation_shows_the_centre(tmp_path: Path) -> None:
    shapes = [(256, 256), (300, 420), (512, 400), (333, 250)]
    files = [encode(smooth(number, *shape)) for number, shape in enumerate(shapes)]
    (batch,) = pipeline(photographs(tmp_path, files, 224), 4, "sequential", augment=False).epoch(0)
    expected = cut_and_resized(files, centre_windows(*torch.tensor(shapes).T), 224)
    assert (batch.x_nat - expected).abs().max() < MOST


def test_whole_jpeg_images_are_what_pillow_decodes_but_for_a_few_levels(tmp_path: Path) -> None:
    picture = Image.fromarray(smooth(1, 24, 32))
    files = [
        encode(picture, subsampling=0),
        encode(picture),
        encode(picture, progressive=True),
        encode(picture.convert("L")),
    ]
    (batch,) = pipeline(photographs(tmp_path, files, None), 4, "sequential", augment=False).epoch(0)
    for data, x in zip(files, batch.x_nat, strict=True):
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(image.convert("RGB")).astype(float)
        assert np.abs((x.permute(1, 2, 0) * 255).numpy() - expected).max() <= 8


def test_real_photographs_look_as_pillow_resizes_them(real_images: Path, tmp_path: Path) -> None:
    request = Request(limit_test=200, image_size=32)
    listed = listings(real_images, request)[1]
    beton_writer.write(tmp_path / "x.beton", [listed], Format("jpeg"))
    written = beton.read(tmp_path / "x.beton").listings()[""]
    images = encoded_splits(written, written, request)[0]
    (batch,) = pipeline(images, len(images), "sequential").epoch(0)
    files, heights, widths = zip(*map(images.read, range(len(images))), strict=True)
    windows = random_windows(3, 0, torch.arange(len(images)), torch.tensor(heights), torch.tensor(widths))
    assert (batch.x_nat - cut_and_resized(list(files), windows, 32)).abs().mean() < 2 / 255
    assert torch.equal(batch.labels, listed.labels)


# ---------------------------------------------------------------- images that FFCV cannot decode

TABLES = FILES[9].index(b"\xff\xc4") + 4
BROKEN = {
    "cut off": FILES[9][: len(FILES[9]) // 2],
    "no end": FILES[9][:-2],
    "no Huffman table": FILES[9][:TABLES] + bytes(30) + FILES[9][TABLES + 30 :],
}


def with_image(images: EncodedImages, number: int, content: bytes) -> None:
    """Put other bytes, no longer than those that were there, in the place of an image."""
    assert images.beton is not None
    file = beton.read(images.beton)
    start, size = int(file.images["at"][number]), int(file.sizes[number])
    assert len(content) <= size
    with images.beton.open("r+b") as target:
        target.seek(start)
        target.write(content.ljust(size, b"\0"))


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("size", [16, None])
def test_a_broken_image_ends_the_epoch_with_its_name(broken: str, size: int | None, tmp_path: Path) -> None:
    files = FILES if size else [encode(smooth(number, 40, 40)) for number in range(COUNT)]
    content = BROKEN[broken] if size else files[9][: len(files[9]) // 3]
    images = photographs(tmp_path, files, size)
    whole = list(pipeline(images).epoch(0))
    with_image(images, 9, content)
    one = pipeline(images, batches_ahead=1)
    place = [9 in batch.sample for batch in whole].index(True)
    for _ in range(2):  # the pipeline is none the worse for it
        batches = one.epoch(0)
        for expected in whole[: max(place - 3, 0)]:
            assert equal(next(batches), expected)
        with pytest.raises(
            ValueError,
            match=rf"^data: {re.escape(str(images.beton))}: image 9 is not a readable image \([^\n]*\)$",
        ):
            list(batches)
    assert all(map(equal, one.epoch(0, place + 1), whole[place + 1 :]))


def test_what_pillow_can_read_is_read_by_pillow(tmp_path: Path) -> None:
    """As a CMYK image, which the JPEG decoder of FFCV refuses."""
    picture = Image.fromarray(smooth(3, 40, 40))
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)  # a long file
    files = [encode(noise), encode(smooth(4, 40, 40))]
    images = photographs(tmp_path, files, 24)
    cmyk = encode(picture.convert("CMYK"))
    with_image(images, 0, cmyk)
    (batch,) = pipeline(images, 2, "sequential").epoch(1)
    windows = random_windows(3, 1, torch.arange(2), torch.tensor([40, 40]), torch.tensor([40, 40]))
    expected = cut_and_resized([cmyk, files[1]], windows, 24)
    assert (batch.x_nat[0] - expected[0]).abs().max() < 1.1 / 255
    assert (batch.x_nat - expected).abs().max() < MOST


# ---------------------------------------------------------------- what does not fit


def test_images_in_no_beton_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^pipeline: ffcv reads \.beton files and X is none; `engine data write` makes"
    ):
        pipeline(in_memory(*FILES))


def test_without_ffcv_one_line_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = photographs(tmp_path, FILES)
    monkeypatch.setitem(sys.modules, "engine.pipelines.ffcv_repairs", None)
    said = r"^pipeline: ffcv needs `make setup-ffcv`, or `pip install 'iad-engine\[ffcv\]'` [^\n]*\([^\n]*\)$"
    with pytest.raises(ValueError, match=said):
        pipeline(images)
    with pytest.raises(ValueError, match=said):
        beton_writer.write(tmp_path / "y.beton", [ARRAYS])


# ---------------------------------------------------------------- the process


def test_the_threads_of_torch_are_as_before(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        images = photographs(tmp_path, FILES)
        for workers in (1, 2, 64):  # more than there are processors
            one = pipeline(images, workers=workers)
            batches = one.epoch(0)
            next(batches)
            assert torch.get_num_threads() == 2
            list(batches)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


ONE_PROCESSOR = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from pathlib import Path
from engine.pipelines import beton
from engine.pipelines.encoded import encoded_splits
from engine.pipelines.ffcv import FFCVPipeline
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Request
listing = beton.read(Path(sys.argv[1])).listings()[""]
images = encoded_splits(listing, listing, Request(image_size=16))[0]
for order in ("random", "quasi-random"):
    sampling = Sampling(len(images), 8, order=order)
    pipeline = FFCVPipeline(images, sampling, augment=True, flip=True, device="cpu", workers=2)
    print(sum(len(batch.sample) for batch in pipeline.epoch(0)))
next(pipeline.epoch(1))  # and one that is left
"""


def test_a_process_with_one_processor_loads_and_ends(tmp_path: Path) -> None:
    images = photographs(tmp_path, FILES)
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESSOR, str(images.beton)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout.split()) == (0, [str(COUNT), str(COUNT)]), done.stderr


def test_samples_are_those_of_the_listing_not_of_the_file(tmp_path: Path) -> None:
    """An order of the images, as of a part that was held out, is kept."""
    images = photographs(tmp_path, FILES, 16).take(torch.tensor([30, 2, 11]))
    assert isinstance(images, Listing)
    (batch,) = pipeline(images, 3, "sequential", augment=False).epoch(0)
    expected = images.images[torch.arange(3)].permute(0, 3, 1, 2) / 255
    assert (batch.x_nat - expected).abs().max() < MOST
    assert batch.labels.tolist() == [0, 2, 1]
