"""Images in files: what is handed to a decoder, and what becomes of files that cannot be read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.pipelines.reading.encoded import EncodedImages, encoded_splits
from engine.pipelines.splits import Request
from tests.pipelines.photographs import (
    CLASSES,
    UNREADABLE,
    encode,
    image_folder,
    in_memory,
    listings,
    smooth,
    write,
)


def encoded(root: Path, **wanted: Any) -> tuple[EncodedImages, EncodedImages]:
    request = Request(image_size=16, **wanted)
    return encoded_splits(*listings(root, request), request)


FILES = [encode(smooth(number, 20, 30)) for number in range(12)]
RGB = Image.fromarray(smooth(1, 20, 30))


def test_whole_rgb_and_grey_files_are_given_as_they_are() -> None:
    files = [encode(image, kind) for image in (RGB, RGB.convert("L")) for kind in ("JPEG", "PNG")]
    images = in_memory(*files)
    assert [images.read(sample) for sample in range(4)] == [(data, 20, 30) for data in files]


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (RGB.convert("CMYK"), "JPEG"),
        (RGB.quantize(16), "PNG"),
        (RGB.convert("1"), "PNG"),
        (RGB.convert("LA"), "PNG"),
        (RGB.convert("RGBA"), "PNG"),
        (RGB, "GIF"),
        (RGB, "WEBP"),
        (RGB, "BMP"),
    ],
)
def test_all_others_are_given_as_what_pillow_reads(image: Image.Image, kind: str) -> None:
    data, height, width = in_memory(encode(image, kind)).read(0)
    assert (height, width) == (20, 30)
    assert data.startswith(b"P6 30 20 255\n")
    with Image.open(io.BytesIO(data)) as got, Image.open(io.BytesIO(encode(image, kind))) as expected:
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected.convert("RGB")))


def test_a_file_with_a_tail_is_decoded_to_be_sure_of_it() -> None:
    data, height, width = in_memory(encode(RGB) + bytes(9)).read(0)
    assert (data[:2], height, width) == (b"P6", 20, 30)


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_file_is_named(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^data: X/1 is not a readable image \([^\n]+\)$"):
        in_memory(FILES[0], data).read(1)


def test_labels_are_numbers_of_sorted_classes(tmp_path: Path) -> None:
    images, held_out = encoded(write(tmp_path, image_folder(FILES)))
    assert images.class_names == held_out.class_names == CLASSES
    assert (len(images), len(held_out)) == (12, 5)
    for sample, label in enumerate(images.labels.tolist()):
        number = int(Path(images.names[sample]).stem)
        assert label == number % 5
        assert images.read(sample) == (FILES[number], 20, 30)
        assert images.where(sample) == str(tmp_path / f"train/{CLASSES[label]}/{number:02d}.jpg")


def test_parts_keep_images_and_labels_together(tmp_path: Path) -> None:
    images = in_memory(*FILES)
    part = images.take(torch.tensor([7, 2, 2]))
    assert (part.names, part.labels.tolist(), len(part)) == (("7", "2", "2"), [2, 2, 2], 3)
    limited, _ = encoded(write(tmp_path, image_folder(FILES)), limit_train=5)
    assert limited.labels.tolist() == [0, 1, 2, 3, 4]
    assert [name[0] for name in limited.names] == list(CLASSES)


def test_skipping_leaves_out_what_cannot_be_read(tmp_path: Path) -> None:
    content = image_folder(FILES)
    bad = {f"train/b/bad {number}.jpg": data for number, data in enumerate(UNREADABLE.values())}
    root = write(tmp_path, content | bad)
    seen: list[Any] = []
    images, untouched = encoded(root, progress=lambda *report: seen.append(report), on_bad_image="skip")
    again, _ = encoded(root, on_bad_image="skip")
    everything, _ = encoded(root)
    assert images.skipped == again.skipped == tuple(str(root / name) for name in sorted(bad))
    assert images.names == again.names
    assert [f"train/{name}" for name in images.names] == sorted(name for name in content if name[:2] == "tr")
    assert [CLASSES[label] for label in images.labels.tolist()] == [name[0] for name in images.names]
    assert (len(untouched), untouched.skipped) == (5, ())
    assert seen == [("train", 16, 16), ("test", 5, 5)]
    assert (len(everything), everything.skipped) == (16, ())


def test_a_class_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path, image_folder(FILES) | {"test/c/0.png": b"nothing"})
    with pytest.raises(ValueError, match=r"^data: no image of the class 'c' in \S*test can be read$"):
        encoded(root, on_bad_image="skip")


def test_an_unknown_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^on_bad_image: 'ignore' is not known; known: fail, skip$"):
        encoded(write(tmp_path, image_folder(FILES)), on_bad_image="ignore")
