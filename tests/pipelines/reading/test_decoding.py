"""Pixels of every kind of image file, against Pillow's own conversions and closed forms."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from engine.pipelines.reading.decoding import Pixels, is_image, is_named_as_image
from engine.pipelines.reading.encoded import EncodedImages
from engine.pipelines.reading.tree import Tree
from tests.pipelines.photographs import encode, in_memory, smooth

PICTURE = smooth(1, 20, 30)
RGB = Image.fromarray(PICTURE)
GREY_16 = np.linspace(0, 65535, 600).round().astype(np.uint16).reshape(20, 30)
SCALED = np.rint(GREY_16 / 257).astype(np.uint8)


def decoded(content: bytes) -> Pixels:
    return in_memory(content).decode(0)


def handed_over(content: bytes) -> Pixels:
    """The image by a decoder that knows no orientations, of what `read` gives."""
    data, height, width = in_memory(content).read(0)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.height, image.width) == (height, width)
        return np.asarray(image.convert("RGB"))


def with_orientation(number: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = number
    return encode(RGB, kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("number", range(1, 9))
def test_images_stand_upright_everywhere(number: int, kind: str) -> None:
    content = with_orientation(number, kind)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert (expected.shape == PICTURE.shape) == (number < 5)
    np.testing.assert_array_equal(decoded(content), expected)
    np.testing.assert_array_equal(handed_over(content), expected)
    views = in_memory(content, size=16)
    assert views.images[torch.tensor([0])].shape == (1, 16, 16, 3)


def test_a_beton_s_images_are_as_they_are_stored() -> None:
    """FFCV's loader knows no orientation."""
    content = with_orientation(6, "JPEG")
    images = in_memory(content)
    stored = EncodedImages(**{**vars(images), "beton": __file__})
    assert stored.read(0) == (content, 20, 30)
    assert stored.decode(0).shape == (20, 30, 3)
    assert images.decode(0).shape == (30, 20, 3)


def test_damaged_exif_does_not_damage_the_image() -> None:
    content = encode(RGB, exif=b"Exif\0\0no notes at all")
    np.testing.assert_array_equal(decoded(content).shape, PICTURE.shape)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_is_scaled(kind: str) -> None:
    content = encode(Image.fromarray(GREY_16), kind)
    for image_HWC in (decoded(content), handed_over(content)):
        np.testing.assert_array_equal(image_HWC, np.repeat(SCALED[:, :, None], 3, axis=2))


def tiff(pixels: Any, **tags: int) -> bytes:
    """A TIFF file written here: grey, one strip. tags: in place of those of 16 unsigned bits, black at 0."""
    known = {"BitsPerSample": 16, "PhotometricInterpretation": 1, "SampleFormat": 1} | tags
    order = ">" if pixels.dtype.byteorder == ">" else "<"
    data: bytes = pixels.tobytes()
    entries = {256: 30, 257: 20, 259: 1, 273: 8, 277: 1, 278: 20, 279: len(data)}
    entries |= {int(getattr(ExifTags.Base, name)): value for name, value in known.items()}
    head = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HI", 42, 8 + len(data))
    table = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    return head + data + struct.pack(f"{order}H", len(entries)) + table + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_of_either_order_of_bytes(order: str) -> None:
    content = tiff(GREY_16.astype(f"{order}u2"))
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == {"<": "I;16", ">": "I;16B"}[order]
    np.testing.assert_array_equal(decoded(content)[:, :, 0], SCALED)


def test_white_may_be_0() -> None:
    np.testing.assert_array_equal(decoded(tiff(GREY_16, PhotometricInterpretation=0))[:, :, 0], 255 - SCALED)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encode(Image.fromarray(PICTURE[:, :, 0].astype(np.float32) / 255), "TIFF"), "floating-point pixels"),
        (tiff(GREY_16.astype("<i2"), SampleFormat=2), "16 bits a channel, signed or not"),
        (encode(Image.fromarray(GREY_16.astype(np.int32)), "TIFF"), "32 bits a channel"),
    ],
    ids=["float", "signed", "32 bits"],
)
def test_pixels_of_no_known_scale_are_refused(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^data: X/0 is not a readable image \({reason}[^\n]*\)$"):
        decoded(content)


def test_colour_of_16_bits_is_decoded_here() -> None:
    """Pillow takes the upper byte; a decoder that is given the file might round."""
    import zlib

    rows = b"".join(b"\0" + (row.astype(">u2") * 257 - 1).astype(">u2").tobytes() for row in PICTURE)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30, 20, 16, 2, 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    assert in_memory(content).read(0)[0].startswith(b"P6")
    assert np.abs(decoded(content).astype(int) - PICTURE).max() <= 1


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_is_multiplied(kind: str) -> None:
    """R = (1 - C) (1 - K). Pillow writes JPEG of CMYK as Adobe does: inverted."""
    ink = np.stack([smooth(each, 20, 30)[:, :, 0] for each in range(4)], axis=-1)
    content = encode(Image.fromarray(ink, "CMYK"), kind)
    expected = (255.0 - ink[:, :, :3]) * (255.0 - ink[:, :, 3:]) / 255
    limit = 12 if kind == "JPEG" else 1  # JPEG loses some
    assert np.abs(decoded(content) - expected).max() <= limit
    np.testing.assert_array_equal(handed_over(content), decoded(content))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_dropped(mode: str) -> None:
    """As torchvision's ImageFolder does: colours under transparent pixels are seen."""
    alpha = np.zeros((20, 30, 1), np.uint8)
    if mode == "RGBA":
        content, expected = encode(Image.fromarray(np.concatenate([PICTURE, alpha], -1)), "PNG"), PICTURE
    elif mode == "LA":
        grey = PICTURE[:, :, :1]
        content = encode(Image.fromarray(np.concatenate([grey, alpha], -1), "LA"), "PNG")
        expected = np.repeat(grey, 3, axis=2)
    else:
        few = RGB.quantize(16)
        content = encode(few, "PNG", transparency=bytes(16))
        expected = np.asarray(few.convert("RGB"))
    np.testing.assert_array_equal(decoded(content), expected)


@pytest.mark.filterwarnings("error")
def test_one_bit_is_black_or_white() -> None:
    bits = PICTURE[:, :, 0] > 127
    np.testing.assert_array_equal(decoded(encode(Image.fromarray(bits), "PNG"))[:, :, 1], 255 * bits)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_several_frames_the_first_one_counts(kind: str) -> None:
    lossless = {"lossless": True} if kind == "WEBP" else {}
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == 3  # type: ignore[attr-defined]
    assert (decoded(content) == (250, 0, 0)).all()
    assert (handed_over(content) == (250, 0, 0)).all()


def test_files_are_known_by_name_or_by_content() -> None:
    contents = {"a": encode(RGB), "b.txt": b"words", "c": b"", "d.dat": encode(RGB, "PNG")[:200], "e.eps": b"%!PS"}
    tree = Tree(list(contents), "X/", contents.__getitem__)
    assert [name for name in contents if is_image(tree, name)] == ["a", "d.dat"]
    names = ["x.jpg", "x.JPEG", "x.heic", "x.tif", "x.txt", "x", "jpg", "x.jpg.txt", ".png"]
    assert [is_named_as_image(name) for name in names] == [True] * 4 + [False] * 5


def test_no_other_program_is_started_for_an_image() -> None:
    """Pillow calls Ghostscript for EPS, which is a program in itself."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with Image.open(io.BytesIO(eps)) as image:
        assert image.format == "EPS"
    with pytest.raises(ValueError, match="is not a readable image"):
        decoded(eps)
