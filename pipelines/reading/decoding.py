"""Decoding of image files by Pillow: upright RGB of 8 bits, whatever the file holds."""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, TiffImagePlugin

from engine.pipelines.reading.tree import Tree

_MOST_PIXELS = 89_478_485  # of an image, from which on Pillow warns: a small file may claim any size

# What is read; of others (EPS, ...) some would start another program.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")

# Names of images, read or not: other files are images only if their content says so.
_IMAGE_NAMES = re.compile(
    r".+\.(jpe?g|jpe|jfif|a?png|gif|bmp|dib|webp|tiff?|p[bgpn]m|jp2|j2k|avif|tga|ico"
    r"|hei[cf]|jxl|dng|cr[23]|nef|arw|orf|rw2|raf)",
    re.IGNORECASE,
)

# What of a PNG file may hold an orientation, for which Pillow would decode the whole of it.
_PNG_NOTES = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are refused

Pixels = npt.NDArray[np.uint8]
"""An image: HWC, or several."""

_UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {  # by EXIF's orientation
    2: lambda image_HWC: image_HWC[:, ::-1],
    3: lambda image_HWC: image_HWC[::-1, ::-1],
    4: lambda image_HWC: image_HWC[::-1],
    5: lambda image_HWC: image_HWC.swapaxes(0, 1),
    6: lambda image_HWC: np.rot90(image_HWC, -1),
    7: lambda image_HWC: image_HWC[::-1, ::-1].swapaxes(0, 1),
    8: lambda image_HWC: np.rot90(image_HWC),
}


def is_named_as_image(name: str) -> bool:
    """True if a file has the extension of an image."""
    return _IMAGE_NAMES.fullmatch(name) is not None


def is_image(tree: Tree, name: str) -> bool:
    """True if a file is an image by its content, even if a damaged one."""
    try:
        Image.open(io.BytesIO(tree.read(name)), formats=_formats()).close()
    except Image.DecompressionBombError:
        return True
    except Exception:  # a damaged file makes Pillow raise nearly anything
        return False
    return True


def open_image(content: bytes) -> Image.Image:
    """The image in the bytes of a file, not decoded yet. Raises ValueError where it claims too many pixels."""
    image = Image.open(io.BytesIO(content), formats=_formats())
    if image.width * image.height > _MOST_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, and {_MOST_PIXELS:,} are the most")
    return image


def decodes_alike(image: Image.Image, content: bytes, *, upright: bool) -> bool:
    """True if every decoder makes the same of a file: RGB or grey of 8 bits, and stored upright if need be."""
    if image.mode not in ("RGB", "L"):
        return False
    if image.format == "PNG":
        if content[24] != 8:  # bits a channel
            return False
        if not any(note in content for note in _PNG_NOTES):
            return True
    return not upright or _orientation(image) not in _UPRIGHT


def pixels(tree: Tree, name: str, *, upright: bool = True) -> Pixels:
    """An image as RGB, HWC. Raises ValueError, naming the file, where it cannot be read.

    upright: turned as its EXIF orientation says. Alpha is dropped, and of several frames the first one is taken.
    """
    try:
        with open_image(tree.read(name)) as image:
            return rgb(image, upright=upright)
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = re.sub(" <_io.BytesIO object at [^>]*>", "", " ".join(text.split())) or type(error).__name__
        raise ValueError(f"data: {tree.where(name)} is not a readable image ({reason})") from None


def rgb(image: Image.Image, *, upright: bool = True) -> Pixels:
    """The pixels of an image, HWC, as `pixels` gives those of a file. Pillow raises what is wrong with it."""
    image.load()
    image_HWC = _rgb(image)
    turn = _UPRIGHT.get(_orientation(image)) if upright else None
    return np.ascontiguousarray(turn(image_HWC)) if turn else image_HWC


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow was built with."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation of an image, 1 where it has none."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged notes, of which Pillow may make anything, do not damage the image
        return 1


def _rgb(image: Image.Image) -> Pixels:
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose white is not known; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        return np.repeat(_grey_of_16_bits(image)[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of transparency that it drops from a palette
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # which else copies


def _grey_of_16_bits(image: Image.Image) -> Pixels:
    """round(v / 257), HW, of grey levels from 0 to 65,535."""
    grey_HW = np.asarray(image).astype(np.int64)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        bits, kind = tags.get(ExifTags.Base.BitsPerSample, (1,)), tags.get(ExifTags.Base.SampleFormat, (1,))
        if (bits, kind) != ((16,), (1,)):
            raise ValueError(f"{bits[0]} bits a channel, signed or not; unsigned ones of 8 or 16 bits are read")
        if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is 0, which Pillow leaves as it is
            grey_HW = 65535 - grey_HW
    return ((grey_HW + 128) // 257).astype(np.uint8)
