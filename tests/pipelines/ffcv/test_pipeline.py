"""FFCV's pipeline: its pixels, images that it cannot decode, and what it leaves of the process."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from engine.pipelines import ffcv
from engine.pipelines.crops import Crops, centre_crops, random_crops
from engine.pipelines.ffcv import FFCVPipeline, beton_writer
from engine.pipelines.ffcv.beton_writer import BetonFormat
from engine.pipelines.reading import beton
from engine.pipelines.reading.encoded import EncodedImages, encoded_splits
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Request
from tests.pipelines.loaders import ARRAYS, COUNT, FILES, SIZES, equal, in_beton, python_threads
from tests.pipelines.photographs import SHAPES, cut_and_resized, encode, in_memory, listings, smooth
from tests.pipelines.reading.test_beton import build

# Levels of 255, at most and in the mean, a little above what was measured. FFCV resizes by areas as OpenCV does.
# Of JPEG files it makes pixels by a faster and coarser transform: 8 levels and 1.6, and in the mean 0.8 darker.
# Pillow resizes by triangles: 7 levels and 0.4; of JPEG files 10 and 1.2.
RAW, JPEG = (1, 0.1), (10, 1.8)
BY_PILLOW = {"raw": (8, 0.5), "jpeg": (12, 1.4)}


def assert_near(got_BCHW: Tensor, expected_BCHW: Tensor, levels: tuple[float, float]) -> None:
    difference = (got_BCHW - expected_BCHW).abs() * 255
    most, mean = levels
    assert difference.max() < most + 0.01
    assert difference.mean() < mean


def by_areas(files: list[bytes], crops: Crops, size: int) -> Tensor:
    """Crops of images that Pillow decodes, resized by areas by OpenCV."""
    import cv2

    images = []
    for data, (top, left, height, width, flip) in zip(files, torch.stack(crops, dim=1).tolist(), strict=True):
        with Image.open(io.BytesIO(data)) as image:
            cut = np.asarray(image.convert("RGB"))[top : top + height, left : left + width]
        view = cv2.resize(np.ascontiguousarray(cut), (size, size), interpolation=cv2.INTER_AREA)
        images.append(np.array(view[:, ::-1] if flip else view))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255


@pytest.fixture(autouse=True)
def with_ffcv() -> None:
    try:
        ffcv.check_installed()
    except ValueError as error:
        pytest.skip(str(error))


def photographs(path: Path, files: list[bytes], size: int | None = 16, mode: str = "jpeg") -> EncodedImages:
    """The files in a .beton, JPEG as they are."""
    images = in_beton(path / "x.beton", in_memory(*files), BetonFormat(mode), size)
    assert isinstance(images, EncodedImages)
    return images


def pipeline(images: EncodedImages, batch_size: int = 8, order: str = "random", **options: Any) -> FFCVPipeline:
    given = {"augment": True, "flip": True, "device": "cpu", "workers": 1, **options}
    return FFCVPipeline(images, Sampling(len(images), batch_size, 3, order), **given)


# ---------------------------------------------------------------- the pixels


TINY = [(1, 1), (1, 90), (90, 1), (3, 2), (2, 700)]


@pytest.mark.parametrize("mode", ["jpeg", "raw"])
@pytest.mark.parametrize("size", [12, 40, 224])
def test_random_crops_look_as_others_cut_and_resize_them(size: int, mode: str, tmp_path: Path) -> None:
    files = [encode(smooth(number, *shape)) for number, shape in enumerate(SHAPES)]
    images = photographs(tmp_path, files, size, mode)
    crops = random_crops(3, 6, torch.arange(12), *torch.tensor(SHAPES).T)
    assert set(crops.flip.tolist()) == {0, 1}
    for flip in (True, False):
        (batch,) = pipeline(images, 12, "sequential", flip=flip).epoch(6)
        shown = crops if flip else crops._replace(flip=torch.zeros_like(crops.flip))
        assert_near(batch.x_nat, by_areas(files, shown, size), JPEG if mode == "jpeg" else RAW)
        assert_near(batch.x_nat, cut_and_resized(files, shown, size), BY_PILLOW[mode])


def test_images_of_any_size_are_enlarged(tmp_path: Path) -> None:
    files = [encode(smooth(number, *shape), "PNG") for number, shape in enumerate(TINY)]
    crops = random_crops(3, 1, torch.arange(5), *torch.tensor(TINY).T)
    (batch,) = pipeline(photographs(tmp_path, files, 20, "raw"), 5, "sequential").epoch(1)
    assert_near(batch.x_nat, by_areas(files, crops, 20), RAW)


def test_evaluation_shows_the_centre(tmp_path: Path) -> None:
    shapes = [(256, 256), (300, 420), (512, 400), (333, 250)]
    files = [encode(smooth(number, *shape)) for number, shape in enumerate(shapes)]
    crops = centre_crops(*torch.tensor(shapes).T)
    (batch,) = pipeline(photographs(tmp_path, files, 224), 4, "sequential", augment=False).epoch(0)
    assert_near(batch.x_nat, by_areas(files, crops, 224), JPEG)
    assert_near(batch.x_nat, cut_and_resized(files, crops, 224), BY_PILLOW["jpeg"])


def test_whole_jpeg_images_are_what_pillow_decodes_but_for_a_few_levels(tmp_path: Path) -> None:
    picture = Image.fromarray(smooth(1, 24, 24))
    files = [
        encode(picture, subsampling=0),
        encode(picture),
        encode(picture, progressive=True),
        encode(picture.convert("L")),
    ]
    (batch,) = pipeline(photographs(tmp_path, files, None), 4, "sequential", augment=False).epoch(0)
    decoded = torch.stack(
        [torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))) for data in files]
    )
    assert_near(batch.x_nat, decoded.permute(0, 3, 1, 2) / 255, (8, 2))


def test_real_photographs_look_as_others_resize_them(real_images: Path, tmp_path: Path) -> None:
    request = Request(limit_test=200, image_size=32)
    listed = listings(real_images, request)[1]
    beton_writer.write(tmp_path / "x.beton", [listed], BetonFormat("jpeg"))
    written = beton.read(tmp_path / "x.beton").listings()[""]
    images = encoded_splits(written, written, request)[0]
    (batch,) = pipeline(images, len(images), "sequential").epoch(0)
    files, heights, widths = zip(*map(images.read, range(len(images))), strict=True)
    crops = random_crops(3, 0, torch.arange(len(images)), torch.tensor(heights), torch.tensor(widths))
    assert_near(batch.x_nat, by_areas(list(files), crops, 32), JPEG)
    assert torch.equal(batch.labels, listed.labels)


# ---------------------------------------------------------------- images that FFCV cannot decode


def without_huffman_table(data: bytes) -> bytes:
    """A JPEG file whose head can be read and whose first pixel cannot."""
    start = data.index(b"\xff\xc4") + 4
    return data[:start] + bytes(30) + data[start + 30 :]


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda data: data[: len(data) // 2],
    "no Huffman table": without_huffman_table,
    "no JPEG": lambda data: b"<html>404</html>",
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
@pytest.mark.parametrize("order", ["random", "quasi-random"])
def test_a_broken_image_ends_the_epoch_with_its_name(
    broken: str, size: int | None, order: str, tmp_path: Path
) -> None:
    files = FILES if size else [encode(smooth(number, 40, 40)) for number in range(COUNT)]
    images = photographs(tmp_path, files, size)
    whole = list(pipeline(images, order=order).epoch(0))
    number = int(whole[3].sample[5])
    with_image(images, number, BROKEN[broken](files[number]))
    one = pipeline(images, order=order)
    for _ in range(2):  # the pipeline is none the worse for it
        batches = one.epoch(0)
        assert all(equal(next(batches), expected) for expected in whole[:3])
        with pytest.raises(
            ValueError,
            match=rf"^data: {re.escape(str(images.beton))}: image {number} is not a readable image \([^\n]*\)$",
        ):
            next(batches)
    assert all(map(equal, one.epoch(0, 4), whole[4:]))


def with_a_wrong_restart(picture: Image.Image) -> bytes:
    """A JPEG file in which a mark is not the one whose turn it is: decoders warn, and Pillow does not."""
    return encode(picture, restart_marker_blocks=1).replace(b"\xff\xd1", b"\xff\xd3", 1)


@pytest.mark.parametrize("size", [24, None])
@pytest.mark.parametrize(
    "odd",
    [
        lambda picture: encode(picture.convert("CMYK")),
        with_a_wrong_restart,
        lambda picture: encode(picture, "PNG"),
    ],
    ids=["CMYK", "wrong restart", "PNG"],
)
def test_what_ffcv_refuses_and_pillow_can_read_is_read_by_pillow(
    odd: Callable[[Image.Image], bytes], size: int | None, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)  # a long file
    images = photographs(tmp_path, [encode(noise), encode(smooth(4, 40, 40))], size)
    data = odd(Image.fromarray(smooth(3, 40, 40)))
    with_image(images, 0, data)
    (batch,) = pipeline(images, 2, "sequential", augment=size is not None).epoch(1)
    if size:
        crops = random_crops(3, 1, torch.arange(2), torch.tensor([40, 40]), torch.tensor([40, 40]))
        expected = cut_and_resized([data, encode(smooth(4, 40, 40))], crops, size)
        assert_near(batch.x_nat[:1], expected[:1], (1, 0.5))  # two passes of rounding
        assert_near(batch.x_nat, expected, BY_PILLOW["jpeg"])
    else:
        with Image.open(io.BytesIO(data)) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
        assert torch.equal(batch.x_nat[0], pixels.permute(2, 0, 1) / 255)


@pytest.mark.parametrize("mode", ["jpeg", "raw"])
@pytest.mark.parametrize("side", [12, 17])
def test_images_of_two_sizes_end_the_epoch_where_they_must_be_of_one(side: int, mode: str, tmp_path: Path) -> None:
    """Whatever would be written beyond an image's place in a batch, or would leave a part of that as it was."""
    files = [encode(smooth(number, 16, 16)) for number in range(12)]
    files[9] = encode(smooth(9, 16, side))
    images = photographs(tmp_path, files, None, mode)
    batches = pipeline(images, 4, "sequential").epoch(0)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(
        ValueError,
        match=rf"^data: \S+x\.beton: image 9 is {side}x16 pixels and must be 16x16 as the other images; ",
    ):
        next(batches)


# ---------------------------------------------------------------- what does not fit


def test_images_in_no_beton_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^pipeline: ffcv reads \.beton files and X is none; `engine data write` makes"
    ):
        pipeline(in_memory(*FILES))


def test_without_ffcv_one_line_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = photographs(tmp_path, FILES)
    monkeypatch.setitem(sys.modules, "engine.pipelines.ffcv.repairs", None)
    said = r"^pipeline: ffcv needs `make setup-ffcv`, or `pip install 'iad-engine\[ffcv\]'` [^\n]*\([^\n]*\)$"
    with pytest.raises(ValueError, match=said):
        pipeline(images)
    with pytest.raises(ValueError, match=said):
        beton_writer.write(tmp_path / "y.beton", [ARRAYS])


# ---------------------------------------------------------------- the order, and the file's pages


def test_pages_are_read_in_quasi_random_order_and_give_what_a_mapped_file_gives(tmp_path: Path) -> None:
    (tmp_path / "x.beton").write_bytes(build(40))
    file = beton.read(tmp_path / "x.beton")
    assert len({*(file.images["at"] // file.page_size).tolist()}) > 15
    listing = file.listings()["test"]
    images = encoded_splits(listing, listing, Request(image_size=8))[0]
    (mapped,) = pipeline(images, 36, "sequential").epoch(2)
    before = threading.enumerate()
    batches = pipeline(images, 5, "quasi-random").epoch(2)
    paged = [next(batches)]
    assert len(python_threads(before)) == 13  # twelve of them read pages
    paged += batches
    sample = torch.cat([batch.sample for batch in paged])
    assert sample.tolist() != list(range(36))
    assert torch.equal(torch.cat([batch.x_nat for batch in paged]), mapped.x_nat[sample])
    assert torch.equal(torch.cat([batch.labels for batch in paged]), listing.labels[sample])


def test_samples_are_those_of_the_listing_not_of_the_file(tmp_path: Path) -> None:
    """An order of the images, as of a part that was held out, is kept."""
    index = [30, 2, 11]
    images = photographs(tmp_path, FILES).take(torch.tensor(index))
    (batch,) = pipeline(images, 3, "sequential", augment=False).epoch(0)
    crops = centre_crops(*torch.tensor([SIZES[number] for number in index]).T)
    assert_near(batch.x_nat, by_areas([FILES[number] for number in index], crops, 16), JPEG)
    assert batch.labels.tolist() == [0, 2, 1]


# ---------------------------------------------------------------- the process


def test_the_threads_of_torch_are_as_before(tmp_path: Path) -> None:
    images = photographs(tmp_path, FILES)
    expected = list(pipeline(images).epoch(0))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for workers in (1, 2, 64):  # more than there are processors
            batches = pipeline(images, workers=workers).epoch(0)
            first = next(batches)
            assert torch.get_num_threads() == 3
            assert all(map(equal, [first, *batches], expected))
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


ONE_PROCESSOR = """
import os, sys, threading
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from pathlib import Path
from engine.pipelines.reading import beton
from engine.pipelines.reading.encoded import encoded_splits
from engine.pipelines.ffcv import FFCVPipeline
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Request
listing = beton.read(Path(sys.argv[1])).listings()[""]
images = encoded_splits(listing, listing, Request(image_size=16))[0]
left = []

def load():
    pipeline = FFCVPipeline(images, Sampling(len(images), 8), augment=True, flip=True, device="cpu", workers=2)
    print(sum(len(batch.sample) for batch in pipeline.epoch(0)))
    left.append(pipeline.epoch(1))
    print(len(next(left[0]).sample))

thread = threading.Thread(target=load)
thread.start()
thread.join()
"""


def test_a_process_with_one_processor_loads_and_ends(tmp_path: Path) -> None:
    """Two threads for loops, an epoch that was left, and FFCV imported in a thread do not keep it from ending."""
    images = photographs(tmp_path, FILES)
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESSOR, str(images.beton)],
        env=os.environ | {"NUMBA_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout.split()) == (0, [str(COUNT), "8"]), done.stderr
