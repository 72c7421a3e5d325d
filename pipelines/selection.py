"""Selection of a pipeline: the kind that serves, the reason, and its construction."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from engine.common.lookup import look_up
from engine.config import ColourJitterConfig
from engine.pipelines import dali, ffcv
from engine.pipelines.base import Pipeline
from engine.pipelines.crops import RANDOM_RESIZED_CROP
from engine.pipelines.datasets import AnySplit, cache_dir
from engine.pipelines.ffcv import beton_writer
from engine.pipelines.reading import beton
from engine.pipelines.reading.encoded import EncodedImages, Listing, encoded_splits
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Request, Split
from engine.pipelines.tensor import TensorPipeline

_GPU_SHARE = 4  # images may take a quarter of a GPU's free memory: the networks need the rest
Say = Callable[[str], None]


class Selection(NamedTuple):
    """A kind of pipeline, and the reason for it in words."""

    kind: str
    reason: str


@dataclass(frozen=True)
class LoaderOptions:
    """Options of a pipeline beside its data and its sampling; "tensor" has no workers and prefetches nothing.

    augmentation, colour_jitter: see `ImagePipeline`.
    """

    augment: bool
    flip: bool
    device: torch.device
    dtype: torch.dtype
    workers: int | None = None
    batches_ahead: int = 2
    augmentation: tuple[str, ...] = ()
    colour_jitter: ColourJitterConfig = field(default_factory=ColourJitterConfig)


def select(kind: str, data: AnySplit, device: torch.device, augmentation: tuple[str, ...] = ()) -> Selection:
    """The pipeline of that kind; with "auto" the first of `PIPELINE_KINDS` that can serve.

    Raises ValueError, saying what is needed, where the kind cannot serve these images with that augmentation.
    """
    if kind != "auto":
        _check_augmentation(kind, data, augmentation)
        if fault := look_up("pipeline", kind, _KINDS).fault(data):
            raise ValueError(f"pipeline: {fault}")
        return Selection(kind, "as asked for")
    faults: list[str] = []
    for each in PIPELINE_KINDS:
        fault = _fault(each, data, augmentation)
        if each == "tensor":
            fault = fault or _memory_fault(data, device)
        if not fault:
            break
        faults.append(fault)
    if each == "image" and faults[-1] == _dali_fault(data):
        faults[-1] += ", and would be faster"
    return Selection(each, "; ".join(faults) or "the images fit into the device's memory")


def build(kind: str, data: AnySplit, sampling: Sampling, options: LoaderOptions, say: Say) -> Pipeline:
    """The pipeline of a kind that `select` gave. Images in memory are written to the cache for ffcv, once.

    Raises ValueError for augmentation that the kind does not do.
    """
    _check_augmentation(kind, data, options.augmentation)
    return look_up("pipeline", kind, _KINDS).build(data, sampling, options, say)


def _fault(kind: str, data: AnySplit, augmentation: tuple[str, ...]) -> str:
    """The reason why a pipeline of the kind cannot serve, empty where it can."""
    return _augmentation_fault(kind, data, augmentation) or look_up("pipeline", kind, _KINDS).fault(data)


def _augmentation_fault(kind: str, data: AnySplit, augmentation: tuple[str, ...]) -> str:
    # Of images of any size every pipeline makes random crops.
    wanted = [name for name in augmentation if not (data.any_size and name == RANDOM_RESIZED_CROP)]
    if wanted and not look_up("pipeline", kind, _KINDS).augments:
        return f"{kind} does no {' and no '.join(wanted)}"
    return ""


def _check_augmentation(kind: str, data: AnySplit, augmentation: tuple[str, ...]) -> None:
    if fault := _augmentation_fault(kind, data, augmentation):
        raise ValueError(f"pipeline: {fault}, which image does")


def _tensor_fault(data: AnySplit) -> str:
    if isinstance(data, EncodedImages):
        if data.any_size:
            return "tensor holds images of one size, and image_size takes them of any size"
        return "tensor holds images in memory, and these would take more than half of what is free"
    return ""


def _memory_fault(data: AnySplit, device: torch.device) -> str:
    """Reason to leave images off a device that could hold them; empty where there is room."""
    if device.type == "cuda" and isinstance(data, Split):
        free, _ = torch.cuda.mem_get_info(device)
        if data.images.nbytes > free // _GPU_SHARE:
            size = data.images.nbytes / 1e9
            return f"tensor holds images in the GPU's memory, and {size:.1f} GB exceed a quarter of what is free"
    return ""


def _tensor(data: AnySplit, sampling: Sampling, options: LoaderOptions, say: Say) -> Pipeline:
    assert isinstance(data, Split), data
    return TensorPipeline(
        data,
        sampling,
        augment=options.augment,
        flip=options.flip,
        device=options.device,
        dtype=options.dtype,
    )


def _ffcv_fault(data: AnySplit) -> str:
    if isinstance(data, EncodedImages) and data.beton is None:
        place = data.tree.where()
        if not place:  # of a tree that `extra.join` made
            return "ffcv reads .beton files, and extra_data stand beside them"
        return f"ffcv reads .beton files and {place} is none; `engine data write` makes one"
    return _said_by(ffcv.check_installed)


def _ffcv(data: AnySplit, sampling: Sampling, options: LoaderOptions, say: Say) -> Pipeline:
    images = data if isinstance(data, EncodedImages) else _in_cache(data, say)
    return ffcv.FFCVPipeline(images, sampling, **_without_augmentation(options))


def _dali_fault(data: AnySplit) -> str:
    return _said_by(dali.check_installed)


def _dali(data: AnySplit, sampling: Sampling, options: LoaderOptions, say: Say) -> Pipeline:
    return dali.DALIPipeline(data, sampling, **_without_augmentation(options))


def _without_augmentation(options: LoaderOptions) -> dict[str, Any]:
    return {key: value for key, value in vars(options).items() if key not in ("augmentation", "colour_jitter")}


def _image_fault(data: AnySplit) -> str:
    return ""  # it serves all


def _image(data: AnySplit, sampling: Sampling, options: LoaderOptions, say: Say) -> Pipeline:
    from engine.pipelines.images import ImagePipeline  # imports torchvision, in a second that others need not wait

    return ImagePipeline(data, sampling, **vars(options))


class _Kind(NamedTuple):
    """fault: the reason why a pipeline of the kind cannot serve these images, empty where it can."""

    fault: Callable[[AnySplit], str]
    build: Callable[[AnySplit, Sampling, LoaderOptions, Say], Pipeline]
    augments: bool = False


_KINDS = {
    "tensor": _Kind(_tensor_fault, _tensor),
    "ffcv": _Kind(_ffcv_fault, _ffcv),
    "dali": _Kind(_dali_fault, _dali),
    "image": _Kind(_image_fault, _image, augments=True),
}
PIPELINE_KINDS = tuple(_KINDS)


def _said_by(check: Callable[[], None]) -> str:
    try:
        check()
    except ValueError as error:
        return str(error).removeprefix("pipeline: ")
    return ""


def _in_cache(data: Split, say: Say) -> EncodedImages:
    """The images as a .beton file in the cache, by their hash."""
    digest = hashlib.sha256("\0".join(data.class_names).encode())
    data.update(digest)
    path = cache_dir() / "betons" / f"{digest.hexdigest()[:16]}.beton"
    if not path.exists():
        say(f"Writing {len(data):,} images to {path} for ffcv, and keeping it for later runs")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beton_writer.write(path, [data])
        except OSError as error:
            raise ValueError(f"pipeline: ffcv needs room for {path}: {error.strerror}") from None
    images: Listing = beton.read(path).listings()[""]
    return encoded_splits(images, images, Request())[0]
