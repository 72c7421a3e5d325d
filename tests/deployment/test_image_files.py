"""Image files as users name them: folders to any depth, lists, links, FIFOs; nothing waits or counts twice."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from engine.deployment.image_files import decode, image_files, paths_in


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), (10, 20, 30)).save(path, "PNG")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images at three depths, one without an extension, one hidden; a text; links that lead round in a circle."""
    for name in ("b/2.png", "b/10.png", "a.png", "b/c/1.png", "d", ".hidden/x.png", "b/.y.png"):
        image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "b" / "round").symlink_to(tmp_path)
    return tmp_path


def test_a_folder_is_listed_to_its_depths_in_the_order_of_names(folder: Path) -> None:
    found = image_files([str(folder)])
    names = [os.path.relpath(path, folder) for path in found.paths]
    assert names == ["a.png", "b/10.png", "b/2.png", "b/c/1.png", "d"]
    assert found.notes == (f"files that are no images are left out: 1, the first {folder}/notes.txt",)


def test_files_come_in_the_order_given_and_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "b" / "round").unlink()
    monkeypatch.chdir(folder)
    found = image_files(["d", "b", "./b/2.png", str(folder / "a.png"), "a.png", "notes.txt", "missing.png"])
    assert found.paths[:4] == ("d", "b/10.png", "b/2.png", "b/c/1.png")
    assert found.paths[4:] == (str(folder / "a.png"), "notes.txt", "missing.png")  # named: its decoding tells
    assert found.notes == ("files that are named more than once count once: 2 names are left out",)


def test_a_link_is_a_file_of_its_own(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder / "a.png")
    assert len(image_files([str(folder / "link.png"), str(folder / "a.png")]).paths) == 2


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=rf"^IMAGES: {tmp_path} holds no image$"):
        image_files([str(tmp_path)])
    with pytest.raises(ValueError, match=r"^IMAGES: no file is named$"):
        image_files([])


def test_a_fifo_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "e.png")
    os.mkfifo(folder / "f")  # not named as an image, so looked into
    found = image_files([str(folder)])
    assert str(folder / "e.png") in found.paths
    assert str(folder / "f") not in found.paths
    with pytest.raises(ValueError, match=r"e\.png is not a readable image \(a FIFO, a device or a socket"):
        decode(str(folder / "e.png"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No such file or directory"),
        (b"", "cannot identify image file"),
        (b"\x89PNG\r\n\x1a\n", "not a readable image"),
    ],
)
def test_what_is_no_image_is_named(content: bytes | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=told) as caught:
        decode(str(path))
    assert str(caught.value).startswith(f"{path} is not a readable image (")


def test_an_image_that_claims_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "x.ppm"
    path.write_bytes(b"P6 10000 10000 255\n" + bytes(30))
    with pytest.raises(ValueError, match=r"10000x10000 pixels, and 89,478,485 are the most"):
        decode(str(path))


NAMES = st.binary(min_size=1, max_size=9).filter(lambda name: not set(name) & set(b"\0\n\r"))


@given(st.lists(NAMES), st.booleans())
def test_any_names_of_files_come_through_a_list(names: list[bytes], null: bool) -> None:
    end = b"\0" if null else b"\n"
    stream = io.BytesIO(b"".join(name + end for name in names))
    assert [os.fsencode(path) for path in paths_in(stream, null=null)] == names


def test_lists_of_other_systems_and_without_a_last_end_are_read() -> None:
    assert paths_in(io.BytesIO(b"a b.png\r\n\r\nc.png")) == ["a b.png", "c.png"]
    assert paths_in(io.BytesIO(b"a\nb\0c\r"), null=True) == ["a\nb", "c\r"]
