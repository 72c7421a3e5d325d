"""Image folders in every layout, and every way in which one can be wrong. Images are PNG, so pixels are exact."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from engine.pipelines import datasets
from engine.pipelines.datasets import Dataset, Split
from tests.pipelines.photographs import write_zip

Content = dict[str, bytes]
Pixels = npt.NDArray[np.uint8]
LAYOUTS = [
    "folders",
    "val folder",
    "zips",
    "val zip",
    "zips without split",
    "folder and zip",
    "one zip",
    "zip in folder",
]


def pixels(seed: int, height: int = 5, width: int = 4) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(array: Pixels, mode: str = "RGB", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).convert(mode).save(buffer, kind)
    return buffer.getvalue()


# dog before cat, 10 before 9: the order read must be the sorted one.
NAMES = [
    f"{split}/{name}/{i}.png" for split in ("train", "test") for name in ("dog", "cat", "train") for i in (9, 10)
]
PIXELS = {name: pixels(i) for i, name in enumerate(NAMES)}


def content() -> Content:
    return {name: encoded(array) for name, array in PIXELS.items()}


def write_folder(path: Path, files: Content) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (path / name).mkdir(parents=True, exist_ok=True)
        else:
            (path / name).write_bytes(data)
    return path


def write(path: Path, layout: str, files: Content) -> Path:
    split = {part: {name: files[name] for name in files if name.startswith(part)} for part in ("train/", "test/")}
    if layout == "folders":
        return write_folder(path, files)
    if layout == "val folder":
        return write_folder(path, {re.sub("^test/", "val/", name): data for name, data in files.items()})
    if layout in ("zips", "zips without split", "val zip"):
        for part, contents in split.items():
            out = "val/" if layout == "val zip" and part == "test/" else part
            prefix = "" if layout == "zips without split" else out
            renamed = {prefix + name.removeprefix(part): data for name, data in contents.items()}
            write_zip(path / f"{out[:-1]}.zip", renamed)
        return path
    if layout == "folder and zip":
        write_zip(path / "test.zip", split["test/"])
        return write_folder(path, split["train/"])
    prefix = "mine/" if layout == "zip in folder" else ""
    return write_zip(path / "all.zip", {prefix + name: data for name, data in files.items()})


def check_split(split: Split, part: str, order: list[str]) -> None:
    assert split.class_names == ("cat", "dog", "train")
    assert split.labels.tolist() == [("cat", "dog", "train").index(name.split("/")[0]) for name in order]
    expected = np.stack([PIXELS[f"{part}/{name}"] for name in order])
    assert split.images.dtype == torch.uint8
    assert np.array_equal(split.images.numpy(), expected)


ORDER = ["cat/10.png", "cat/9.png", "dog/10.png", "dog/9.png", "train/10.png", "train/9.png"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images(tmp_path: Path, layout: str) -> None:
    path = write(tmp_path / "x", layout, content())
    dataset = datasets.load("folder", str(path))
    check_split(dataset.train, "train", ORDER)
    check_split(dataset.test, "test", ORDER)
    assert dataset.class_names == ("cat", "dog", "train")
    assert dataset.source == f"image folder {path}"


LITTER = {
    ".hidden": b"x",
    "train/.DS_Store": b"x",
    "train/cat/.DS_Store": b"x",
    "train/cat/Thumbs.db": b"x",
    "train/.cache/1.png": b"x",
    "train/readme.txt": b"beside the class folders",
}


@pytest.mark.parametrize("layout", ["folders", "zips", "one zip"])
def test_what_systems_leave_behind_is_ignored(tmp_path: Path, layout: str) -> None:
    path = write(tmp_path / "x", layout, content() | LITTER)
    check_split(datasets.load("folder", str(path)).train, "train", ORDER)


@pytest.mark.parametrize("beside", ["README.md", "__MACOSX/mine/1.png", ".git/config"])
def test_litter_beside_the_only_folder_of_an_archive_is_ignored(tmp_path: Path, beside: str) -> None:
    path = write_zip(tmp_path / "x.zip", {f"mine/{n}": d for n, d in content().items()} | {beside: b"x"})
    check_split(datasets.load("folder", str(path)).train, "train", ORDER)


def test_entries_for_folders_are_no_images(tmp_path: Path) -> None:
    folders = {"train/": b"", "train/cat/": b"", "test/": b"", "test/dog/": b""}
    path = write_zip(tmp_path / "x.zip", folders | content())
    check_split(datasets.load("folder", str(path)).train, "train", ORDER)


def test_classes_are_sorted_by_name_and_not_by_path(tmp_path: Path) -> None:
    files = {f"{split}/{name}/1.png": encoded(pixels(0)) for split in ("train", "test") for name in ("a-b", "a")}
    dataset = datasets.load("folder", str(write_folder(tmp_path, files)))
    assert dataset.class_names == ("a", "a-b")  # though "a-b/" comes before "a/"


def test_test_comes_before_val(tmp_path: Path) -> None:
    files = content()
    path = write_folder(
        tmp_path, files | {re.sub("^test/", "val/", n): b"not read" for n in files if "test/" in n}
    )
    check_split(datasets.load("folder", str(path)).test, "test", ORDER)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    data = encoded(pixels(0), mode, kind)
    path = write_folder(tmp_path, content() | {"train/cat/10.png": data})
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(datasets.load("folder", str(path)).train.images[0].numpy(), expected)


def many(count: int) -> Content:
    return {
        f"{split}/{name}/{i:04}.png": encoded(pixels(c * count + i, 2, 2))
        for split in ("train", "test")
        for c, name in enumerate(("a", "b"))
        for i in range(count)
    }


def test_many_images_keep_their_places_and_progress_counts_them(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", many(300))
    seen: list[tuple[str, int, int]] = []
    dataset = datasets.load("folder", str(path), progress=lambda *state: seen.append(state))
    expected = np.stack([pixels(i, 2, 2) for i in range(600)])
    assert np.array_equal(dataset.train.images.numpy(), expected)
    assert [state for state in seen if state[1] == state[2]] == [("train", 600, 600), ("test", 600, 600)]
    assert [done for part, done, _ in seen if part == "train"] == sorted({done for part, done, _ in seen})


def test_limits_decode_only_what_is_chosen(tmp_path: Path) -> None:
    files = many(20)
    path = write_zip(tmp_path / "x.zip", files)
    whole = datasets.load("folder", str(path))
    part = datasets.load("folder", str(path), limit_train=7, limit_test=2, seed=3)
    assert part.train.labels.bincount().tolist() == [4, 3]
    assert part.test.labels.tolist() == [0, 1]
    places = [int((whole.train.images == image).flatten(1).all(1).nonzero()[0]) for image in part.train.images]
    chosen = {f"train/a/{i:04}.png" for i in places if i < 20}
    assert len(chosen) == 4

    damaged = {n: d if n in chosen or "/a/" not in n or "test" in n else b"damaged" for n, d in files.items()}
    again = datasets.load(
        "folder", str(write_zip(tmp_path / "y.zip", damaged)), limit_train=7, limit_test=2, seed=3
    )
    assert torch.equal(again.train.images, part.train.images)
    with pytest.raises(ValueError, match="is not a readable image"):
        datasets.load("folder", str(tmp_path / "y.zip"))
    assert len(datasets.load("folder", str(path), limit_train=1).train) == 1


def without(files: Content, *prefixes: str) -> Content:
    return {name: data for name, data in files.items() if not name.startswith(prefixes)}


WRONG: dict[str, tuple[Content, str]] = {
    "no train": (without(content(), "train/"), r"all\.zip holds no train/$"),
    "class only in train": (without(content(), "test/cat"), r"same classes; only in .*all\.zip:train: cat$"),
    "class only in test": (
        without(content(), "train/cat", "test/dog"),
        r"same classes; only in .*all\.zip:train: dog; only in .*all\.zip:test: cat$",
    ),
    "one class": (
        without(content(), "train/cat", "train/train"),
        r"train holds only the class 'dog'; two classes",
    ),
    "no class": (
        without(content(), "train/") | {"train/1.png": b"x"},
        r"all\.zip:train holds no class folder; two classes",
    ),
    "empty class": (content() | {"test/eel/": b"", "train/eel/1.png": b""}, r"all\.zip:test/eel holds no image$"),
    "folder in class": (
        content() | {"train/cat/old/1.png": b"x"},
        r"train/cat/old: a class folder must hold images only, and no folder$",
    ),
    "text": (
        content() | {"train/cat/11.png": b"text"},
        r"all\.zip:train/cat/11\.png is not a readable image \(.+\)$",
    ),
    "empty file": (content() | {"train/cat/11.png": b""}, r"all\.zip:train/cat/11\.png is not a readable image"),
    "cut off": (
        content() | {"test/dog/9.png": encoded(pixels(0))[:60]},
        r"all\.zip:test/dog/9\.png is not a readable",
    ),
    "first is text": (
        content() | {"train/cat/0.png": b"text"},
        r"all\.zip:train/cat/0\.png is not a readable image",
    ),
    "other size": (
        content() | {"train/dog/10.png": encoded(pixels(0, 5, 6)), "train/dog/9.png": encoded(pixels(0, 7, 7))},
        r"train/dog/10\.png is 6x5 pixels and must be 4x5 as the other images; give --image-size 32 to",
    ),
    "other size in test": (
        content() | {"test/cat/9.png": encoded(pixels(0, 8, 8))},
        r"test/cat/9\.png is 8x8 pixels and must be 4x5 as the other images; give --image-size 32 to",
    ),
    "climbs out": (
        content() | {"train/../../evil.png": b"x"},
        r"all\.zip has an entry that leads out of it: 'train/\.\.",
    ),
    "climbs out, hidden": (content() | {"../.evil": b"x"}, r"an entry that leads out of it: '\.\./\.evil'$"),
    "climbs out, Windows": (content() | {"train\\..\\evil.png": b"x"}, r"an entry that leads out of it"),
    "absolute": (content() | {"/etc/evil.png": b"x"}, r"an entry that leads out of it: '/etc/evil\.png'$"),
    "absolute, Windows": (content() | {"C:\\evil.png": b"x"}, r"an entry that leads out of it"),
}


def error_of(path: Path) -> str:
    with pytest.raises(ValueError, match=r"^data: ") as caught:
        datasets.load("folder", str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_archive_is_one_clear_line(tmp_path: Path, case: str) -> None:
    files, message = WRONG[case]
    assert re.search(message, error_of(write_zip(tmp_path / "all.zip", files)))


@pytest.mark.parametrize("case", [case for case in WRONG if "climbs" not in case and "absolute" not in case])
def test_a_wrong_folder_is_one_clear_line(tmp_path: Path, case: str) -> None:
    files, message = WRONG[case]
    as_folder = message.replace(r"all\.zip:", "/").replace(r"all\.zip", re.escape(str(tmp_path)))
    as_folder = as_folder.replace("no train/", r"no train/ or train\.zip")
    assert re.search(as_folder, error_of(write_folder(tmp_path, files)))


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    assert error_of(tmp_path / "gone") == f"data: {tmp_path / 'gone'} does not exist"


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.zip").write_bytes(b"no archive")
    for path in (tmp_path / "train.zip", tmp_path):
        assert "train.zip is not a readable zip archive" in error_of(path)


def test_a_flipped_bit_in_an_archive_is_found(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", content())
    data = bytearray(path.read_bytes())
    data[data.index(content()["train/dog/9.png"]) + 50] ^= 1
    path.write_bytes(data)
    assert re.search(r"x\.zip:train/dog/9\.png is not a readable image", error_of(path))


def test_the_folder_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, content())
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path))
    loaded: Dataset[Split] = datasets.load("folder")
    check_split(loaded.train, "train", ORDER)
    monkeypatch.delenv("ENGINE_DATA")
    with pytest.raises(ValueError, match="data: the dataset folder needs the path of an image folder"):
        datasets.load("folder")
