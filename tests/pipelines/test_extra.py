"""Extra images in npz files and folders, and what is refused of them. N images."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.common import host_memory
from engine.pipelines import datasets, extra
from engine.pipelines.datasets import AnyDataset, Dataset
from engine.pipelines.reading import npz
from engine.pipelines.reading.encoded import EncodedImages
from engine.pipelines.splits import Request, Split

CLASSES = ("cat", "dog", "frog")
LEVELS = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 1, 0])


def dataset() -> AnyDataset:
    """Four images in memory."""
    images = torch.arange(4 * 8 * 8 * 3).view(4, 8, 8, 3).to(torch.uint8)
    split = Split(images, torch.tensor([0, 1, 2, 0]), CLASSES)
    return Dataset("own", split, split, CLASSES, True, "memory")


def in_files(folder: Path, size: int | None = None) -> AnyDataset:
    """Three images that stay in their files."""
    for part in ("train", "test"):
        for name in CLASSES:
            path = folder / part / name
            path.mkdir(parents=True)
            Image.fromarray(LEVELS[len(name)]).save(path / "a.png")
    return datasets.find("folder", str(folder), Request(image_size=size, resident="never"))


def found(path: Path, of: AnyDataset | None = None, **options: Any) -> Any:
    return extra.find(str(path), of or dataset(), Request(), **options).images


@pytest.mark.parametrize("names", [*zip(npz.IMAGE_NAMES[:4], npz.LABEL_NAMES[:4], strict=True), ("X", "Y"), None])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_usual_names_are_read_compressed_or_not(tmp_path: Path, names: Any, save: Any) -> None:
    path = tmp_path / "a.npz"
    if names is None:
        save(path, LEVELS, LABELS)
    else:
        save(path, **{names[0]: LEVELS, names[1]: LABELS, "notes": np.arange(3)})
    split = found(path)
    assert torch.equal(split.images, torch.from_numpy(LEVELS))
    assert split.labels.tolist() == LABELS.tolist()
    assert extra.are_labelled(split)


@pytest.mark.parametrize(
    "image",
    [
        LEVELS.transpose(0, 3, 1, 2),
        np.asfortranarray(LEVELS),
        (LEVELS / 255).astype(np.float32),
        (LEVELS / 255).transpose(0, 3, 1, 2),
    ],
)
def test_channels_first_and_floats_become_grey_levels(tmp_path: Path, image: Any) -> None:
    np.savez(tmp_path / "a.npz", image=image)
    split = found(tmp_path / "a.npz")
    assert torch.equal(split.images, torch.from_numpy(LEVELS))
    assert split.labels.tolist() == [extra.UNLABELLED] * 5
    assert not extra.are_labelled(split)


def test_grey_images_are_in_all_three_channels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=LEVELS[..., 0], y=LABELS[:, None])
    split = found(tmp_path / "a.npz")
    assert torch.equal(split.images, torch.from_numpy(LEVELS[..., :1]).expand(-1, -1, -1, 3))
    assert split.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"pictures": LEVELS}, "named image, images, x"),
        ({"x": LEVELS, "data": LEVELS}, r"x \(5, 8, 8, 3\), data"),
        ({"x": LEVELS, "y": LABELS, "label": LABELS}, "which are the labels, y or label"),
        ({"x": LEVELS, "y": LABELS + 1}, "labels are 1 to 3, and those of the data 0 to 2"),
        ({"x": LEVELS, "y": LABELS - 1}, "labels are -1 to 1"),
        ({"x": LEVELS, "y": LABELS[:4]}, "5 whole numbers are expected"),
        ({"x": LEVELS, "y": LABELS / 2}, "float64"),
        ({"x": LEVELS.astype(np.float32)}, r"in \[0, 1\], got 0 to 255"),
        ({"x": LEVELS / 127.5 - 1}, "got -1 to 1"),
        ({"x": np.where(LEVELS[0, 0, 0, 0] == LEVELS, np.nan, 0.5)}, r"in \[0, 1\]"),
        ({"x": LEVELS.astype(np.int64)}, "got int64"),
        ({"x": (LEVELS / 255).astype(np.uint8)}, "no pixel above 1: floats that were cut"),
        ({"x": LEVELS[:0]}, "no image"),
        ({"x": LEVELS[:, :4]}, "8x4 pixels and must be 8x8"),
        ({"x": np.zeros((2, 3, 8, 3), np.uint8)}, "first or last"),
        ({"x": LEVELS[0]}, r"first or last, got \(8, 8, 3\)"),
        ({"x": np.full((5, 8, 8, 3), 1.0000001)}, "got 1.0000001 to 1.0000001"),
        ({"x": np.array([[[None]]], object)}, "pickled Python objects"),
    ],
)
def test_what_is_ambiguous_or_of_other_values_is_refused(
    tmp_path: Path, arrays: dict[str, Any], named: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=f"^extra_data: .*{named}"):
        found(tmp_path / "a.npz")


def test_no_pickle_is_read_and_the_line_says_how_to_convert_it(tmp_path: Path) -> None:
    path = tmp_path / "ti_500K_pseudo_labeled.pickle"
    path.write_bytes(pickle.dumps({"data": LEVELS, "extrapolated_targets": LABELS}))
    with pytest.raises(ValueError, match=r"is a pickle.*numpy\.savez"):
        found(path)


def test_damage_and_other_files_are_told_with_the_path(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, image=np.tile(LEVELS, (50, 1, 1, 1)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz: .*damaged"):
        found(path)
    path.write_bytes(content[:200])
    with pytest.raises(ValueError, match=r"a\.npz: it is no readable \.npz file"):
        found(path)
    with pytest.raises(ValueError, match="extra_data: cannot read .*nothing"):
        found(tmp_path / "nothing")


def test_a_cut_array_and_too_large_a_one_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "a.npz", image=LEVELS)
    with zipfile.ZipFile(tmp_path / "a.npz") as file:
        content = file.read("image.npy")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as file:
        file.writestr("image.npy", content[:-1])
    with pytest.raises(ValueError, match="cut off"):
        found(tmp_path / "b.npz")
    np.savez_compressed(tmp_path / "c.npz", image=LEVELS)
    together = 2 * (4 + 5) * 8 * 8 * 3
    monkeypatch.setattr(host_memory, "available", lambda: together)
    assert len(found(tmp_path / "a.npz")) == 5
    for available, name in ((together - 1, "a"), (1000, "c")):
        monkeypatch.setattr(host_memory, "available", lambda available=available: available)
        with pytest.raises(ValueError, match="more than half of the memory"):
            found(tmp_path / f"{name}.npz")


def test_labels_that_are_not_wanted_are_not_looked_at(tmp_path: Path) -> None:
    for labels in (LABELS + 90, np.eye(3)[LABELS], np.array([None] * 5)):
        np.savez(tmp_path / "a.npz", image=LEVELS, label=labels, y=labels)
        assert found(tmp_path / "a.npz", with_labels=False).labels.tolist() == [extra.UNLABELLED] * 5


def folder_of(path: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(LEVELS[number]).save(path / name)
    return path


def test_class_folders_are_labelled_by_the_names_of_the_data(tmp_path: Path) -> None:
    path = folder_of(tmp_path, ["frog/a.png", "cat/b.png", "frog/c.png"])
    for name in ("README.txt", "cat/b.json", "frog/empty"):
        (path / name).write_text("no image" * (name != "frog/empty"))
    split, notes = extra.find(str(path), dataset(), Request())
    assert isinstance(split, Split)
    assert notes == (f"files that are no images are left out: 3, the first {path}/README.txt",)
    order = [1, 0, 2]
    assert torch.equal(split.images, torch.from_numpy(LEVELS[order]))
    assert split.labels.tolist() == [0, 2, 2]
    assert found(path, with_labels=False).labels.tolist() == [extra.UNLABELLED] * 3


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    split = found(folder_of(tmp_path, ["b.png", "a.png"]))
    assert torch.equal(split.images, torch.from_numpy(LEVELS[[1, 0]]))
    assert split.labels.tolist() == [extra.UNLABELLED] * 2


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["bird/a.png"], "'bird' is of no class of the data; these are cat, dog, frog"),
        (["cat/a.png", "b.png"], "images beside folders"),
        (["cat/images/a.png", "dog/b.png"], "cat/images: a folder of images must hold no other folder"),
        (["a.png", "more/images/b.png"], "more/images: a folder of images must hold no other folder"),
        ([], "holds no images"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path: Path, names: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=f"^extra_data: .*{named}"):
        found(folder_of(tmp_path, names))


def test_bad_images_are_left_out_where_they_are_to_be(tmp_path: Path) -> None:
    path = folder_of(tmp_path, ["a.png", "b.png"])
    (path / "a.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"^extra_data: .*a\.png is not a readable image"):
        found(path)
    split: Any = extra.find(str(path), dataset(), Request(on_bad_image="skip")).images
    assert torch.equal(split.images, torch.from_numpy(LEVELS[1:2]))
    assert [Path(name).name for name in split.skipped] == ["a.png"]


def test_images_in_memory_are_joined(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=LEVELS, label=LABELS)
    originals: Any = dataset()
    joined = extra.join(originals.train, found(tmp_path / "a.npz"))
    assert isinstance(joined, Split)
    assert torch.equal(joined.images[4:], torch.from_numpy(LEVELS))
    assert torch.equal(joined.images[:4], originals.train.images[torch.arange(4)])
    assert joined.labels.tolist() == [0, 1, 2, 0, *LABELS]


@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize("kind", ["npz", "npz inside", "folder", "inside"])
def test_images_in_files_are_joined_by_name(tmp_path: Path, kind: str, size: int | None) -> None:
    originals: Any = in_files(tmp_path / "data", size)
    path = (tmp_path / "data" if "inside" in kind else tmp_path) / kind
    if "npz" in kind:
        np.savez(path := path.with_suffix(".npz"), image=LEVELS, label=LABELS)
    else:
        path = folder_of(path, ["cat/1.png", "frog/2.png"])
    images = found(path, originals)
    joined = extra.join(originals.train, images)
    assert isinstance(joined, EncodedImages)
    assert len(joined) == 3 + len(images)
    assert joined.where(0) == originals.train.where(0)
    assert joined.where(3) == images.where(0)
    for number in range(3):
        assert np.array_equal(joined.decode(number), originals.train.decode(number))
        assert joined.read(number) == originals.train.read(number)
    for number in range(len(images)):
        assert np.array_equal(joined.decode(3 + number), LEVELS[number])
    assert joined.labels.tolist() == [*originals.train.labels, *images.labels]


def test_a_hash_of_the_data_holds_the_extra_images_and_their_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=LEVELS, label=LABELS)
    images, plain = found(tmp_path / "a.npz"), dataset()
    other = replace(images, labels=images.labels.flip(0))
    hashes = {each.sha256 for each in (plain, replace(plain, extra=images), replace(plain, extra=other))}
    assert len(hashes) == 3
    assert len({replace(plain, extra=each).train_sha256 for each in (None, images, other)}) == 3


def test_images_that_stay_in_a_beton_file_take_none_beside_them(tmp_path: Path) -> None:
    originals: Any = in_files(tmp_path / "data")
    held = replace(originals, train=replace(originals.train, beton=tmp_path / "a.beton"))
    with pytest.raises(ValueError, match=r"a\.beton stay in their file"):
        found(tmp_path, held)


def test_a_class_is_the_same_however_a_system_spells_its_accents(tmp_path: Path) -> None:
    names = ("caf\u00e9", "dog")
    split: Any = replace(dataset().train, class_names=names)
    images = found(
        folder_of(tmp_path, ["cafe\u0301/a.png", "dog/b.png"]), Dataset("own", split, split, names, True, "x")
    )
    assert images.labels.tolist() == [0, 1]


def test_images_of_a_data_set_of_one_size_are_not_cut_to_it(tmp_path: Path) -> None:
    Image.fromarray(LEVELS[0, :4]).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is 8x4 pixels and must be 8x8 as the other images$"):
        found(tmp_path)


def test_test_images_are_not_trained_on(tmp_path: Path) -> None:
    split: Any = dataset().test
    images = np.concatenate([LEVELS, split.images[[2, 0]].numpy()])
    np.savez(tmp_path / "a.npz", image=images)
    named = r"2 of the 7 images of .*a\.npz are test images .* the first: image 5$"
    with pytest.raises(ValueError, match=named):
        found(tmp_path / "a.npz")
    in_files(tmp_path / "data")
    in_memory = datasets.find("folder", str(tmp_path / "data"), Request())
    with pytest.raises(ValueError, match="3 of the 3 images of .* are test images"):
        found(tmp_path / "data" / "test", in_memory)


def test_training_images_alone_are_none_beside_them(tmp_path: Path) -> None:
    images = [*LEVELS[:2], *LEVELS[:1]]
    held: Any = Split(torch.from_numpy(LEVELS[:2]), torch.tensor([0, 1]), CLASSES)
    of = replace(dataset(), train=held)
    np.savez(tmp_path / "a.npz", image=images)
    with pytest.raises(ValueError, match=r"a\.npz are training images of the data, all of them$"):
        found(tmp_path / "a.npz", of)
    np.savez(tmp_path / "a.npz", image=[*images, LEVELS[2]])
    assert len(found(tmp_path / "a.npz", of)) == 4


@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize("linked", [False, True])
def test_files_of_the_data_are_known_whichever_links_lead_there(
    tmp_path: Path, size: int | None, linked: bool
) -> None:
    originals = in_files(tmp_path / "data", size)
    path = tmp_path / "data"
    if linked:
        (path := tmp_path / "linked").symlink_to("data")
    with pytest.raises(ValueError, match=r"3 of the 3 images of .*test are test images .* first: .*cat/a\.png"):
        found(path / "test", originals)
    with pytest.raises(ValueError, match="are training images of the data, all of them"):
        found(path / "train", originals)
    assert len(found(folder_of(tmp_path / "more", ["cat/a.png", "dog/a.png"]), originals)) == 2


def test_files_of_other_sizes_need_views_of_one(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for number, image in enumerate((LEVELS[0, :4], LEVELS[1])):
        Image.fromarray(image).save(tmp_path / "more" / f"{number}.png")
    with pytest.raises(
        ValueError, match=r"0\.png: its images are 8x4 pixels and must be 8x8 as those of the data"
    ):
        found(tmp_path / "more", in_files(tmp_path / "data"))
    images = found(tmp_path / "more", in_files(tmp_path / "other", 6))
    assert images.images[torch.arange(2)].shape == (2, 6, 6, 3)
