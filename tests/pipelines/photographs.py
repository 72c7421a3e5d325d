"""Pictures of known pixels, encoded, in memory and in folders."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from engine.pipelines.crops import Crops
from engine.pipelines.reading.encoded import EncodedImages, Listing, listing
from engine.pipelines.reading.folder import image_folder as image_folder_of
from engine.pipelines.reading.tree import Tree
from engine.pipelines.splits import Request

CLASSES = tuple("abcde")
Pixels = npt.NDArray[np.uint8]


def smooth(number: int, height: int, width: int) -> Pixels:
    """A picture of low frequencies that no other number has."""
    y, x = np.mgrid[0:height, 0:width]
    y, x = y / height, x / width
    waves = [np.sin(3 * x + 2 * y + number), np.cos(4 * y - x + 2 * number), np.sin(3 * x * y + number)]
    return (127.5 + 110 * np.stack(waves, axis=-1)).round().astype(np.uint8)


def encode(picture: Image.Image | Pixels, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
    return buffer.getvalue()


def in_memory(*files: bytes, size: int = 16, any_size: bool = True) -> EncodedImages:
    """Encoded images as of files 0, 1... of a folder X."""
    names = tuple(str(number) for number in range(len(files)))
    tree = Tree(list(names), "X/", lambda name: files[int(name)])
    labels = torch.arange(len(files)) % len(CLASSES)
    return EncodedImages(tree, names, labels, CLASSES, shape=(size, size), any_size=any_size)


def cut_and_resized(files: list[bytes], crops: Crops, size: int) -> Tensor:
    """The crops, as Pillow and torchvision cut and resize them."""
    from torchvision.transforms import functional as TF

    images = []
    for data, (top, left, height, width, flip) in zip(files, torch.stack(crops, dim=1).tolist(), strict=True):
        with Image.open(io.BytesIO(data)) as image:
            view = TF.resized_crop(image.convert("RGB"), top, left, height, width, [size, size], antialias=True)
        images.append(TF.to_tensor(TF.hflip(view) if flip else view))
    return torch.stack(images)


def listings(root: Path, request: Request) -> tuple[Listing, Listing]:
    """The images wanted of an image folder."""
    found = image_folder_of(root)
    return listing(found.train, "train", request), listing(found.test, "test", request)


def image_folder(files: list[bytes]) -> dict[str, bytes]:
    """Names and contents: those files, dealt to the classes for training, and one image of each for testing."""
    train = {f"train/{CLASSES[number % 5]}/{number:02d}.jpg": data for number, data in enumerate(files)}
    return train | {f"test/{name}/0.png": encode(smooth(0, 30, 30), "PNG") for name in CLASSES}


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


SHAPES = [(40 + 13 * number % 300, 40 + 29 * number % 350) for number in range(12)]
"""Heights and widths of photographs of various sizes."""
WHOLE = encode(smooth(0, 30, 40))
UNREADABLE = {
    "cut off": WHOLE[: len(WHOLE) // 2],
    "last bytes missing": WHOLE[:-2],
    "empty": b"",
    "no image": b"<html>404</html>",
}
