"""The .beton format, against files that FFCV wrote and what FFCV reads of them; and files that are damaged."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.pipelines import beton, beton_writer, ffcv
from engine.pipelines.encoded import encoded_splits
from engine.pipelines.splits import Request, Split
from tests.pipelines.loaders import ARRAYS, COUNT

HEAD = 24 + 4 * 1041  # of a file with four fields, before the samples' rows

FOREIGN = """
import sys
import numpy as np
from ffcv.writer import DatasetWriter
from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField

class Samples:
    def __len__(self):
        return 12
    def __getitem__(self, i):
        i = int(i)
        generator = np.random.default_rng(i)
        image = generator.integers(0, 256, (6 + i % MANY, 9, 3), dtype=np.uint8)
        parts = {"weight": i / 4, "image": image, "name": {"n": i}, "label": i % 3,
                 "array": np.arange(4.0) * i, "note": np.frombuffer(b"note" * (i + 1), np.uint8)}
        return tuple(parts[name] for name in fields)

fields = {"weight": FloatField(), "image": None, "name": JSONField(), "label": IntField(),
          "array": NDArrayField(np.dtype("f8"), (4,)), "note": BytesField()}
for name, mode, MANY, kept in (("all", "proportion", 5, list(fields)), ("raw", "raw", 1, ["image", "label"]),
                               ("jpg", "jpg", 5, ["label", "image"])):
    fields["image"] = RGBImageField(mode)
    chosen = {key: fields[key] for key in kept}
    everything, fields = fields, chosen
    np.random.seed(0)
    writer = DatasetWriter(f"{sys.argv[1]}/{name}.beton", chosen, num_workers=2)
    writer.from_indexed_dataset(Samples(), chunksize=5)
    fields = everything
"""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of FFCV's own writer."""
    require_ffcv()
    folder = tmp_path_factory.mktemp("foreign")
    subprocess.run([sys.executable, "-c", FOREIGN, str(folder)], check=True, capture_output=True, timeout=60)
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of ours, of 43 and 5 raw images, without the zeros at the end of its page."""
    require_ffcv()
    path = tmp_path_factory.mktemp("ours") / "x.beton"
    beton_writer.write(path, [ARRAYS, ARRAYS.take(torch.arange(5))])
    return path.read_bytes()


def require_ffcv() -> None:
    try:
        ffcv.check_installed()
    except ValueError as error:
        pytest.skip(str(error))


def table_at(content: bytes) -> int:
    return int.from_bytes(content[16:24], "little")


# ---------------------------------------------------------------- what FFCV writes and reads


@pytest.mark.parametrize("name", ["all", "raw", "jpg"])
def test_a_file_of_ffcv_s_is_read_as_ffcv_reads_it(name: str, foreign: Path) -> None:
    from ffcv.reader import Reader

    from engine.pipelines import ffcv_repairs  # noqa: F401  # imports FFCV as it must be

    path = foreign / f"{name}.beton"
    mine, theirs = beton.read(path), Reader(str(path))
    assert (len(mine), mine.page_size) == (theirs.num_samples, theirs.page_size) == (12, 8 << 20)
    assert list(mine.fields) == theirs.field_names
    for number, field in enumerate(mine.fields):
        assert mine.rows[field].tobytes() == theirs.metadata[f"f{number}"].tobytes()
    sizes = dict(zip(theirs.alloc_table["ptr"].tolist(), theirs.alloc_table["size"].tolist(), strict=True))
    assert mine.sizes.tolist() == [sizes[at] for at in mine.images["at"].tolist()]
    assert mine.labels.tolist() == [number % 3 for number in range(12)]
    assert mine.class_names == ("0", "1", "2")
    if name == "all":
        assert mine.fields == {
            "weight": "float", "image": "rgb image", "name": "json", "label": "int", "array": "array",
            "note": "bytes",
        }  # fmt: skip
        assert {*mine.images["mode"].tolist()} == {beton.JPEG, beton.RAW}


@pytest.mark.parametrize("name", ["all", "raw", "jpg"])
def test_its_images_are_those_that_were_written(name: str, foreign: Path) -> None:
    file = beton.read(foreign / f"{name}.beton")
    images = file.listings()[""]
    for number, mode in enumerate(file.images["mode"].tolist()):
        written = np.random.default_rng(number).integers(
            0, 256, (6 + number % (1 if name == "raw" else 5), 9, 3), dtype=np.uint8
        )
        got = images.decode(number)
        assert got.shape == written.shape
        assert file.encoded(number)[:2] == (b"\xff\xd8" if mode == beton.JPEG else b"P6")
        if mode == beton.RAW:
            np.testing.assert_array_equal(got, written)
        else:  # of noise, and with the colours of four pixels in one
            assert np.corrcoef(got.ravel(), written.ravel())[0, 1] > 0.5


def test_two_files_of_ffcv_s_are_a_data_set(foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "train.beton").symlink_to(foreign / "raw.beton")
    (tmp_path / "val.beton").symlink_to(foreign / "all.beton")
    assert beton.is_beton(tmp_path)
    request = Request(limit_train=6, image_size=4)
    train, test = encoded_splits(*beton.splits(tmp_path, request), request)
    assert (len(train), len(test), train.class_names) == (6, 12, ("0", "1", "2"))
    assert train.labels.bincount().tolist() == [2, 2, 2]
    assert test.images[torch.arange(12)].shape == (12, 4, 4, 3)
    (tmp_path / "test.beton").symlink_to(foreign / "jpg.beton")
    assert beton.splits(tmp_path, request)[1].tree.where() == str(tmp_path / "test.beton")


def test_a_file_of_ours_is_read_back(ours: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    path.write_bytes(ours)
    train, test = encoded_splits(*beton.splits(path, Request()), Request())
    assert (len(train), len(test), train.class_names) == (COUNT, 5, ARRAYS.class_names)
    assert torch.equal(train.images[torch.arange(COUNT)], ARRAYS.images)
    assert torch.equal(test.images[torch.arange(5)], ARRAYS.images[:5])
    assert torch.equal(train.labels, ARRAYS.labels)
    assert train.where(7) == f"{path}: image 7"
    assert test.where(0) == f"{path}: image {COUNT}"


# ---------------------------------------------------------------- damage


def check(path: Path) -> None:
    """The file is refused in one line that names it, or all that is read of it lies within it."""
    said = None
    try:
        file = beton.read(path)
        parts = file.listings()
    except ValueError as error:
        said = str(error)
    if said is not None:
        assert said.startswith("data: ")
        assert str(path) in said
        assert "\n" not in said
        return
    size = path.stat().st_size
    for row, length in zip(file.images, file.sizes, strict=True):
        assert 0 < int(row["at"]) <= int(row["at"]) + int(length) <= size
    for images in parts.values():
        for sample in range(len(images)):
            if file.images["mode"][beton.position(images.names[sample])] == beton.RAW:
                assert images.decode(sample).nbytes == file.sizes[beton.position(images.names[sample])]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_file_that_ends_too_early_is_refused(data: st.DataObject, ours: bytes) -> None:
    ends = st.integers(0, HEAD + 5000) | st.integers(table_at(ours) - 100, len(ours) - 1)
    with temporary(ours[: data.draw(ends)]) as path, pytest.raises(ValueError, match=f"^data: {path} is no whole"):
        beton.read(path)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_no_byte_of_the_head_or_of_the_table_can_lead_out_of_the_file(data: st.DataObject, ours: bytes) -> None:
    content = bytearray(ours)
    places = (
        st.integers(0, 23)
        | st.sampled_from([24 + field * 1041 + at for field in range(4) for at in range(20)])
        | st.integers(HEAD, HEAD + 64 * (COUNT + 5))
        | st.integers(table_at(ours), len(ours) - 1)
    )
    for at in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    with temporary(bytes(content)) as path:
        check(path)


@contextmanager
def temporary(content: bytes) -> Iterator[Path]:
    """A file with that content, for one example."""
    with NamedTemporaryFile(suffix=".beton") as file:
        file.write(content)
        file.flush()
        yield Path(file.name)


def with_row(content: bytes, field: str, sample: int, value: object) -> bytes:
    """The content with another value in the row of a sample."""
    with temporary(content) as path:
        rows = beton.read(path).rows.copy()
    rows[field][sample] = value
    return content[:HEAD] + rows.tobytes() + content[HEAD + rows.nbytes :]


def renamed(content: bytes, before: bytes, after: bytes) -> bytes:
    head = content[:HEAD].replace(before.ljust(16, b"\0"), after.ljust(16, b"\0"), 1)
    return head + content[HEAD:]


FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", r"is no whole \.beton file \(it ends at byte 0, within its head\)"),
    "text": (
        lambda content: b"image,label\n" * 9,
        r"is no whole \.beton file \(it begins with format version 28009",
    ),
    "never finished": (
        lambda content: content[:16] + bytes(8) + content[24:],
        r"is no whole \.beton file \(its writing was never finished\)",
    ),
    "cut off": (lambda content: content[:-5], r"is no whole \.beton file \(it is cut off at byte [\d,]+\)"),
    "no rows of the table": (
        lambda content: content[: table_at(content)],
        r"is no whole \.beton file \(nothing is allocated in it\)",
    ),
    "no label": (
        lambda content: renamed(content, b"label", b"class"),
        r"it has image \(rgb image\), class \(int\)",
    ),
    "a field twice": (lambda content: renamed(content, b"split", b"label"), "two fields have one name"),
    "a custom field": (
        lambda content: content[: 24 + 1041] + b"\xff" + content[24 + 1042 :],
        "its field 'label' is of the custom type 255",
    ),
    "a label below 0": (
        lambda content: with_row(content, "label", 3, -1),
        "has a label out of range: -1, where labels must be 0 to 5 for 6 classes",
    ),
    "a label too many": (
        lambda content: with_row(content, "label", 3, 7),
        "has a label out of range: 7, where labels must be 0 to 5 for 6 classes",
    ),
    "a third split": (lambda content: with_row(content, "split", 9, 2), "image 9 is in no known split"),
    "another mode": (
        lambda content: with_row(content, "image", 4, (2, 8, 8, table_at(content) - 8 - 3)),
        "image 4 is nowhere in the file",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_said(fault: str, ours: bytes, tmp_path: Path) -> None:
    make, words = FAULTS[fault]
    path = tmp_path / "x.beton"
    path.write_bytes(make(ours))
    with pytest.raises(ValueError, match=rf"^data: {path} .*{words}"):
        beton.read(path).listings()


def test_files_that_are_not_there_or_do_not_fit_are_said(ours: bytes, foreign: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"^data: cannot read {tmp_path}/none\.beton: No such file or directory$"
    ):
        beton.splits(tmp_path / "none.beton", Request())
    with pytest.raises(ValueError, match=r"does not say which images are for testing \(it has no field `split`\)"):
        beton.splits(foreign / "raw.beton", Request())
    (tmp_path / "train.beton").write_bytes(ours)
    with pytest.raises(ValueError, match=rf"^data: {tmp_path} holds no test\.beton and no val\.beton$"):
        beton.splits(tmp_path, Request())
    (tmp_path / "test.beton").symlink_to(foreign / "raw.beton")
    with pytest.raises(ValueError, match="holds images of both splits: give the file itself, not its folder"):
        beton.splits(tmp_path, Request())
    (tmp_path / "train.beton").unlink()
    beton_writer.write(tmp_path / "train.beton", [ARRAYS])
    with pytest.raises(ValueError, match="must have the same classes for training and for testing"):
        beton.splits(tmp_path, Request())


def test_a_class_without_images_for_testing_is_refused(tmp_path: Path) -> None:
    require_ffcv()
    without = ARRAYS.take((ARRAYS.labels != 2).nonzero()[:, 0])
    assert isinstance(without, Split)
    beton_writer.write(tmp_path / "x.beton", [ARRAYS, without])
    with pytest.raises(ValueError, match="must have the same classes for training and for testing"):
        beton.splits(tmp_path / "x.beton", Request())
