"""Selection of a pipeline by "auto", and the message where one cannot serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.common import host_memory
from engine.config import ColourJitterConfig
from engine.pipelines import dali, datasets, extra, ffcv, selection
from engine.pipelines.datasets import AnySplit
from engine.pipelines.ffcv import beton_writer
from engine.pipelines.images import ImagePipeline
from engine.pipelines.reading import beton
from engine.pipelines.reading.encoded import encoded_splits
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Request, Split
from tests.pipelines.loaders import ARRAYS, FILES, equal
from tests.pipelines.photographs import encode, image_folder, in_memory, smooth, write

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def beton_images(path: Path, image_size: int | None) -> AnySplit:
    """Images as if of a .beton file, which is not read here."""
    images = in_memory(*FILES, size=image_size or 8, any_size=image_size is not None)
    return type(images)(**{**vars(images), "beton": path})


FOLDER = in_memory(*FILES)
BETON = beton_images(Path("X.beton"), 16)
TOO_LARGE = in_memory(*FILES, size=8, any_size=False)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Let those of ffcv and dali be installed that are named."""
    for module in (ffcv, dali):
        name = module.__name__.rpartition(".")[2]

        def check(name: str = name) -> None:
            if name not in request.param:
                raise ValueError(f"pipeline: {name} needs to be installed")

        monkeypatch.setattr(module, "check_installed", check)


BOTH, NONE = ("ffcv", "dali"), ()
CROPS, TRIVIAL = ("random-resized-crop",), ("random-resized-crop", "trivial-augment")


@pytest.mark.parametrize(
    ("installed", "data", "device", "free", "kind", "reason"),
    [
        (BOTH, ARRAYS, CPU, 0, "tensor", "the images fit"),
        (BOTH, ARRAYS, CUDA, 4 * ARRAYS.images.nbytes, "tensor", "the images fit"),
        (BOTH, ARRAYS, CUDA, 4 * ARRAYS.images.nbytes - 4, "ffcv", "exceed a quarter of what is free"),
        (("dali",), ARRAYS, CUDA, 0, "dali", "exceed a quarter of what is free; ffcv needs"),
        (BOTH, BETON, CPU, 0, "ffcv", "tensor holds images of one size"),
        (("dali",), BETON, CPU, 0, "dali", "ffcv needs to be installed"),
        (BOTH, FOLDER, CPU, 0, "dali", "ffcv reads .beton files and X is none; `engine data write` makes one"),
        (BOTH, TOO_LARGE, CPU, 0, "dali", "would take more than half of what is free"),
        (NONE, FOLDER, CPU, 0, "image", "ffcv reads .beton files and X is none"),
        (NONE, FOLDER, CPU, 0, "image", "; dali needs to be installed, and would be faster"),
        (
            NONE,
            BETON,
            CPU,
            0,
            "image",
            "ffcv needs to be installed; dali needs to be installed, and would be faster",
        ),
        (NONE, ARRAYS, CUDA, 0, "image", "exceed a quarter of what is free; ffcv needs"),
    ],
    indirect=["installed"],
)
def test_auto_takes_the_first_that_can_serve_and_says_why(
    installed: None,
    data: AnySplit,
    device: torch.device,
    free: int,
    kind: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 62))
    chosen = selection.select("auto", data, device)
    assert chosen.kind == kind
    assert reason in chosen.reason


@pytest.mark.parametrize("installed", [BOTH, NONE], indirect=True)
@pytest.mark.parametrize("data", [ARRAYS, BETON, FOLDER, TOO_LARGE])
def test_augmentation_that_others_do_not_is_for_image(installed: None, data: AnySplit) -> None:
    lacking = "trivial-augment" if data.any_size else "random-resized-crop and no trivial-augment"
    others = "; ".join(f"{kind} does no {lacking}" for kind in ("tensor", "ffcv", "dali"))
    assert selection.select("auto", data, CPU, TRIVIAL) == ("image", others)
    assert selection.select("image", data, CPU, TRIVIAL) == ("image", "as asked for")
    options = selection.LoaderOptions(True, True, CPU, torch.float32, augmentation=TRIVIAL)
    for kind in ("tensor", "ffcv", "dali"):
        words = rf"^pipeline: {kind} does no {lacking}, which image does$"
        with pytest.raises(ValueError, match=words):
            selection.select(kind, data, CPU, TRIVIAL)
        with pytest.raises(ValueError, match=words):
            selection.build(kind, data, Sampling(len(data), 8), options, print)


@pytest.mark.parametrize("installed", [BOTH], indirect=True)
def test_random_crops_of_images_of_any_size_are_made_by_every_pipeline(installed: None) -> None:
    assert selection.select("auto", BETON, CPU, CROPS).kind == "ffcv"
    assert selection.select("auto", FOLDER, CPU, CROPS).kind == "dali"
    assert selection.select("auto", ARRAYS, CPU, CROPS).kind == "image"


@pytest.mark.parametrize(
    ("installed", "kind", "data", "words"),
    [
        (NONE, "ffcv", ARRAYS, "^pipeline: ffcv needs to be installed$"),
        (NONE, "dali", ARRAYS, "^pipeline: dali needs to be installed$"),
        (BOTH, "tensor", FOLDER, "^pipeline: tensor holds images of one size"),
        (BOTH, "ffcv", FOLDER, r"^pipeline: ffcv reads \.beton files and X is none"),
        (BOTH, "ffcv", extra.join(FOLDER, FOLDER), "^pipeline: ffcv .* and extra_data stand beside them$"),
    ],
    indirect=["installed"],
)
def test_what_was_asked_for_and_cannot_serve_is_refused(
    installed: None, kind: str, data: AnySplit, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        selection.select(kind, data, CPU)


@pytest.mark.parametrize("installed", [BOTH], indirect=True)
def test_what_was_asked_for_is_taken(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1 << 62))
    assert selection.select("tensor", ARRAYS, CUDA).kind == "tensor"
    kinds = ("tensor", "ffcv", "ffcv", "dali", "dali", "image", "image", "image")
    for kind, data in zip(kinds, (ARRAYS, BETON, ARRAYS, ARRAYS, BETON, ARRAYS, BETON, FOLDER), strict=True):
        assert selection.select(kind, data, CPU) == (kind, "as asked for")


@pytest.mark.parametrize(
    ("free", "resident", "in_memory_then"),
    [
        (2 * 17 * 2700, "if it fits", True),
        (2 * 17 * 2700 - 2, "if it fits", False),
        (0, "always", True),
        (10**9, "never", False),
    ],
)
def test_images_of_one_size_come_into_memory_where_they_fit(
    free: int, resident: str, in_memory_then: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 and 5 images of 30 x 30 pixels; half of what is free may be taken."""
    write(tmp_path, image_folder([encode(smooth(0, 30, 30))] * 12))
    monkeypatch.setattr(host_memory, "available", lambda: free)
    found = datasets.find("folder", str(tmp_path), Request(resident=resident))
    assert (len(found.train), len(found.test)) == (12, 5)
    assert isinstance(found.train, Split) == isinstance(found.test, Split) == in_memory_then


def build(kind: str, data: AnySplit, said: list[str], **keys: Any) -> Any:
    options = selection.LoaderOptions(augment=True, flip=True, device=CPU, dtype=torch.float32, workers=1, **keys)
    return selection.build(kind, data, Sampling(len(data), 8, 3), options, said.append)


def test_the_augmentation_that_was_chosen_is_built() -> None:
    jitter = ColourJitterConfig(brightness=0.9, hue=0)
    built = build("image", ARRAYS, [], augmentation=("colour-jitter",), colour_jitter=jitter)
    sampling = Sampling(len(ARRAYS), 8, 3)
    given: Any = {"augment": True, "flip": True, "device": CPU, "augmentation": ("colour-jitter",)}
    assert all(map(equal, built.epoch(1), ImagePipeline(ARRAYS, sampling, **given, colour_jitter=jitter).epoch(1)))
    assert not any(map(equal, built.epoch(1), ImagePipeline(ARRAYS, sampling, **given).epoch(1)))
    assert not any(map(equal, built.epoch(1), build("tensor", ARRAYS, []).epoch(1)))
    assert all(map(equal, build("image", ARRAYS, []).epoch(1), build("tensor", ARRAYS, []).epoch(1)))


def test_images_in_memory_are_written_for_ffcv_once(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        ffcv.check_installed()
    except ValueError as error:
        pytest.skip(str(error))
    said: list[str] = []
    expected = list(build("tensor", ARRAYS, said).epoch(1))
    assert all(map(equal, build("ffcv", ARRAYS, said).epoch(1), expected))
    (line,) = said
    (path,) = (datasets.cache_dir() / "betons").iterdir()
    assert f"Writing 43 images to {path} for ffcv" in line
    monkeypatch.setattr(beton_writer, "write", lambda *_: pytest.fail("written again"))
    assert all(map(equal, build("ffcv", ARRAYS, said).epoch(1), expected))
    assert len(said) == 1
    listing = beton.read(path).listings()[""]
    assert listing.class_names == ARRAYS.class_names
    images = encoded_splits(listing, listing, Request())[0]
    assert torch.equal(images.images[torch.arange(43)], ARRAYS.images)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        ffcv.check_installed()
    except ValueError as error:
        pytest.skip(str(error))
    (tmp_path / "file").touch()
    monkeypatch.setenv("ENGINE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"^pipeline: ffcv needs room for \S+\.beton: Not a directory$"):
        build("ffcv", ARRAYS, [])
