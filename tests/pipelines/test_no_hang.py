"""Files that would be waited for, or claim to be huge, are refused in one line; nothing is read in vain."""

from __future__ import annotations

import heapq
import io
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from engine.pipelines import datasets, splits
from engine.pipelines.reading import decoding, tree
from engine.pipelines.splits import Request


def image(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 99, 199)).save(buffer, "PNG")
    return buffer.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that says it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(3):
                (tmp_path / part / name / f"{number}.png").write_bytes(image(number))
    return tmp_path


def refused(place: Path, *words: str) -> None:
    with pytest.raises(ValueError, match=r"\Adata: [^\n]+\Z") as error:
        datasets.load("folder", str(place))
    for word in words:
        assert word in str(error.value)
    assert " at 0x" not in str(error.value)


def test_a_fifo_in_a_class_folder(place: Path) -> None:
    os.mkfifo(place / "train" / "a" / "9.png")
    refused(place, "train/a/9.png", "FIFO")
    skipping = Request(on_bad_image="skip")
    assert datasets.find("folder", str(place), skipping).train.skipped == (str(place / "train" / "a" / "9.png"),)


def test_a_fifo_or_a_device_as_data_set(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.zip")
    os.mkfifo(tmp_path / "data.beton")
    for path in (tmp_path / "data.zip", tmp_path / "data.beton", Path("/dev/zero")):
        refused(path, str(path), "FIFO")


@pytest.mark.parametrize(
    "content", [b"", b"no image", claiming(9_000, 9_999), claiming(2**31 - 1, 2**31 - 1), image()[:40]]
)
def test_images_that_are_none(content: bytes, place: Path) -> None:
    (place / "test" / "b" / "9.png").write_bytes(content)
    refused(place, "test/b/9.png is not a readable image (")


def test_a_folder_as_image_is_refused(place: Path) -> None:
    (place / "train" / "a" / "9.png").mkdir()
    refused(place, "train/a/9.png: ", "no folder")


def test_an_archive_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "_MOST_BYTES_OF_IMAGE", 10_000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for part in ("train", "test"):
            for name in "ab":
                archive.writestr(f"{part}/{name}/1.png", image())
        archive.writestr("train/a/2.png", bytes(10_001))
    refused(tmp_path / "bomb.zip", "bomb.zip:train/a/2.png", "10,001 bytes")


def test_a_class_folder_without_permission(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the system's answer is put in its place."""
    scan = os.scandir

    def refuse(path: Path) -> Any:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused(place, "train/b", "Permission denied")


def test_an_evaluation_reads_no_training_images(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = datasets.load("folder", str(place))
    read: list[str] = []
    pixels = decoding.pixels

    def noted(place: tree.Tree, name: str, **options: Any) -> decoding.Pixels:
        read.append(place.where(name))
        return pixels(place, name, **options)

    monkeypatch.setattr("engine.pipelines.reading.encoded.pixels", noted)
    found = datasets.find("folder", str(place), Request(only_test=True))
    assert read
    assert not any("/train/" in name for name in read)
    assert isinstance(found.test, splits.Split)
    assert torch.equal(found.test.images, whole.test.images)
    assert (len(found.train), found.class_names) == (0, whole.class_names)


def test_an_evaluation_needs_no_training_images(place: Path) -> None:
    for path in sorted((place / "train").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (place / "train").rmdir()
    assert len(datasets.find("folder", str(place), Request(only_test=True)).test) == 6


# ---------------------------------------------------------------- many classes


def naive_apportion(total: int, shares: dict[int, float], most: dict[int, int]) -> dict[int, int]:
    """One image after the other, each time looking at every class: what `_apportion` must equal."""
    counts = {label: min(max(int(share), 1), most[label]) for label, share in shares.items()}

    def remainder(label: int) -> float:
        return shares[label] - counts[label]

    while sum(counts.values()) < total:
        counts[max((label for label in counts if counts[label] < most[label]), key=remainder)] += 1
    while sum(counts.values()) > total:
        counts[min((label for label in counts if counts[label] > 1), key=remainder)] -= 1
    return counts


@pytest.mark.parametrize("seed", range(40))
def test_counts_are_those_of_the_naive_way(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(
        1, 30, (int(torch.randint(1, 40, (), generator=generator)),), generator=generator
    ).tolist()
    most = dict(enumerate(sizes))
    for share in (0.05, 0.3, 0.5, 0.97):
        total = max(len(sizes), round(share * sum(sizes)))
        for shares in (
            {label: share * size for label, size in most.items()},
            dict.fromkeys(most, total / len(sizes)),
        ):
            assert splits._apportion(total, shares, most) == naive_apportion(total, shares, most)


def test_ten_thousand_classes_cost_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in changes of the heap, in place of seconds."""
    pops = 0
    pop = heapq.heappop

    def counted(heap: Any) -> Any:
        nonlocal pops
        pops += 1
        return pop(heap)

    monkeypatch.setattr("heapq.heappop", counted)
    labels = torch.arange(10_000).repeat(5)
    index = splits.limited(labels, 25_000, 0, "limit_train")
    assert len(index) == 25_000
    assert set(labels[index].bincount().tolist()) == {2, 3}
    assert pops == 5_000
