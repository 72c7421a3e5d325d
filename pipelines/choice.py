"""Which pipeline serves, why, and how it is made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from engine.common.lookup import look_up
from engine.pipelines import beton, beton_writer, dali, ffcv
from engine.pipelines.base import Pipeline
from engine.pipelines.datasets import AnySplit, cache_dir
from engine.pipelines.encoded import EncodedImages, Listing, encoded_splits
from engine.pipelines.memory import free_memory
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Request, Split
from engine.pipelines.tensor import TensorPipeline

KINDS = ("tensor", "ffcv", "dali")
_GPU_SHARE = 4  # images may take a quarter of a GPU's free memory: the networks need the rest


class Choice(NamedTuple):
    """A kind of pipeline, and the reason for it in words."""

    kind: str
    reason: str


def choose(kind: str, data: AnySplit, device: torch.device) -> Choice:
    """The pipeline of that kind; with "auto" the first of tensor, ffcv and dali that can serve.

    Raises ValueError, saying what is needed, where the kind cannot serve these images, or none can.
    """
    if kind != "auto":
        if fault := look_up("pipeline", kind, _FAULTS)(data, device):
            raise ValueError(f"pipeline: {fault}")
        return Choice(kind, "as asked for")
    faults: list[str] = []
    for each in KINDS:
        fault = look_up("pipeline", each, _FAULTS)(data, device)
        if each == "tensor":
            fault = fault or _crowding(data, device)
        if not fault:
            return Choice(each, "; ".join(faults) or "the images fit into the device's memory")
        faults.append(fault)
    raise ValueError(f"pipeline: none can serve: {'; '.join(faults)}")


def build(
    kind: str,
    data: AnySplit,
    sampling: Sampling,
    *,
    augment: bool,
    flip: bool,
    device: torch.device,
    dtype: torch.dtype,
    workers: int | None,
    batches_ahead: int,
    say: Callable[[str], None],
) -> Pipeline:
    """The pipeline of a kind that `choose` gave. Images in memory are written to the cache for ffcv, once."""
    views: dict[str, Any] = {"augment": augment, "flip": flip, "device": device, "dtype": dtype}
    loading: dict[str, Any] = {"workers": workers, "batches_ahead": batches_ahead}

    def tensor() -> Pipeline:
        assert isinstance(data, Split), data
        return TensorPipeline(data, sampling, **views)

    def of_ffcv() -> Pipeline:
        images = data if isinstance(data, EncodedImages) else _in_cache(data, say)
        return ffcv.FFCVPipeline(images, sampling, **views, **loading)

    builders: dict[str, Callable[[], Pipeline]] = {
        "tensor": tensor,
        "ffcv": of_ffcv,
        "dali": lambda: dali.DALIPipeline(data, sampling, **views, **loading),
    }
    return look_up("pipeline", kind, builders)()


def _tensor_fault(data: AnySplit, device: torch.device) -> str:
    if isinstance(data, EncodedImages):
        if data.windows:
            return "tensor holds images of one size, and image_size takes them of any size"
        return "tensor holds images in memory, and these would take more than half of what is free"
    return ""


def _crowding(data: AnySplit, device: torch.device) -> str:
    """Why images had better not be held on the device, though they can be."""
    if (
        device.type == "cuda"
        and isinstance(data, Split)
        and data.images.nbytes > free_memory(device) // _GPU_SHARE
    ):
        size = data.images.nbytes / 1e9
        return f"tensor holds images in the GPU's memory, and {size:.1f} GB exceed a quarter of what is free"
    return ""


def _ffcv_fault(data: AnySplit, device: torch.device) -> str:
    if isinstance(data, EncodedImages) and data.beton is None:
        place = data.tree.where()
        return f"ffcv reads .beton files and {place} is none; `engine data write` makes one"
    return _said_by(ffcv.check_installed)


def _dali_fault(data: AnySplit, device: torch.device) -> str:
    return _said_by(dali.check_installed)


_FAULTS: dict[str, Callable[[AnySplit, torch.device], str]] = {
    "tensor": _tensor_fault,
    "ffcv": _ffcv_fault,
    "dali": _dali_fault,
}


def _said_by(check: Callable[[], None]) -> str:
    try:
        check()
    except ValueError as error:
        return str(error).removeprefix("pipeline: ")
    return ""


def _in_cache(data: Split, say: Callable[[str], None]) -> EncodedImages:
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
