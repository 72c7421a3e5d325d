"""The .beton format, against files that FFCV wrote and what FFCV reads of them; and files that are damaged."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.pipelines import datasets, ffcv
from engine.pipelines.ffcv import beton_writer
from engine.pipelines.reading import beton
from engine.pipelines.reading.encoded import encoded_splits
from engine.pipelines.splits import Request
from tests.pipelines.loaders import ARRAYS
from tests.pipelines.photographs import encode, smooth

# Written by FFCV, and read by it: rows of metadata, and the bytes of each image, as JSON.
FOREIGN = """
import json, sys
import numpy as np
import torch
from engine.pipelines.ffcv import repairs  # imports FFCV as it must be
from ffcv.fields import (BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField,
                         TorchTensorField)
from ffcv.loader import Loader, OrderOption
from ffcv.memory_managers import OSCacheManager
from ffcv.reader import Reader
from ffcv.writer import DatasetWriter

FIELDS = {"weight": FloatField(), "note": BytesField(), "image": None, "name": JSONField(), "label": IntField(),
          "array": NDArrayField(np.dtype("f8"), (4,)), "tensor": TorchTensorField(torch.float32, (2, 3))}

class Samples:
    def __init__(self, fields, heights):
        self.fields, self.heights = fields, heights
    def __len__(self):
        return 12
    def __getitem__(self, i):
        i = int(i)
        image = np.random.default_rng(i).integers(0, 256, (6 + i % self.heights, 9, 3), dtype=np.uint8)
        parts = {"weight": i / 4, "note": np.frombuffer(b"note" * (i + 1), np.uint8), "image": image,
                 "name": {"n": i}, "label": i % 3, "array": np.arange(4.0) * i, "tensor": torch.full((2, 3), i)}
        parts["tensor"] = parts["tensor"].float()
        return tuple(parts[name] for name in self.fields)

found = {}
for name, image, heights, kept in (
    ("all", RGBImageField("proportion"), 5, list(FIELDS)),
    ("raw", RGBImageField("raw"), 1, ["image", "label"]),
    ("jpg", RGBImageField("jpg", max_resolution=8), 5, ["label", "image"]),
):
    path = f"{sys.argv[1]}/{name}.beton"
    fields = {**{key: FIELDS[key] for key in kept}, "image": image}
    np.random.seed(0)
    DatasetWriter(path, fields, num_workers=2).from_indexed_dataset(Samples(fields, heights), chunksize=5)
    reader = Reader(path)
    rows = reader.metadata[f"f{kept.index('image')}"]
    manager = OSCacheManager(reader)
    with manager.context as state:
        read = manager.compile_reader()
        contents = [read(row["data_ptr"], manager.context.state).tobytes().hex() for row in rows]
    pipelines = {key: None for key in kept if key != "label"}
    loader = Loader(path, 5, 1, order=OrderOption.SEQUENTIAL, pipelines=pipelines, drop_last=False)
    found[name] = {
        "fields": reader.field_names, "page_size": int(reader.page_size), "contents": contents,
        "rows": [reader.metadata[f"f{i}"].tobytes().hex() for i in range(len(kept))],
        "labels": [int(label) for (labels,) in loader for label in labels[:, 0]],
    }
json.dump(found, sys.stdout)
"""


def require_ffcv() -> None:
    try:
        ffcv.check_installed()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("foreign")


@pytest.fixture(scope="module")
def foreign(folder: Path) -> Any:
    """Content of the files that FFCV's own writer put into the folder, as FFCV reads it."""
    require_ffcv()
    done = subprocess.run([sys.executable, "-c", FOREIGN, folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


names = pytest.mark.parametrize("name", ["all", "raw", "jpg"])

# ---------------------------------------------------------------- what FFCV writes and reads


@names
def test_a_file_of_ffcv_s_is_read_as_ffcv_reads_it(name: str, foreign: Any, folder: Path) -> None:
    file, theirs = beton.read(folder / f"{name}.beton"), foreign[name]
    assert (len(file), file.page_size, list(file.fields)) == (12, theirs["page_size"], theirs["fields"])
    assert [file.rows[field].tobytes().hex() for field in file.fields] == theirs["rows"]
    assert file.labels.tolist() == theirs["labels"] == [number % 3 for number in range(12)]
    assert file.class_names == ("0", "1", "2")
    assert file.sizes.tolist() == [len(content) // 2 for content in theirs["contents"]]
    for number, (content, row) in enumerate(zip(theirs["contents"], file.images, strict=True)):
        head = b"" if row["mode"] == beton.JPEG else b"P6 %d %d 255\n" % (row["width"], row["height"])
        assert file.encoded(number) == head + bytes.fromhex(content)


def test_fields_of_every_type_are_known(foreign: Any, folder: Path) -> None:
    file = beton.read(folder / "all.beton")
    assert file.fields == {
        "weight": "float", "note": "bytes", "image": "rgb image", "name": "json", "label": "int",
        "array": "array", "tensor": "tensor",
    }  # fmt: skip
    assert {*file.images["mode"].tolist()} == {beton.JPEG, beton.RAW}
    assert file.rows["weight"].tolist() == [number / 4 for number in range(12)]


@names
def test_its_images_are_those_that_were_written(name: str, foreign: Any, folder: Path) -> None:
    file = beton.read(folder / f"{name}.beton")
    images = file.listings()[""]
    for number, mode in enumerate(file.images["mode"].tolist()):
        height = 6 + number % (1 if name == "raw" else 5)
        written = np.random.default_rng(number).integers(0, 256, (height, 9, 3), dtype=np.uint8)
        got = images.decode(number)
        if name == "jpg":
            assert got.shape == ((height * 8 // 9, 8, 3) if height < 9 else (8, 9 * 8 // height, 3))
        elif mode == beton.RAW:
            np.testing.assert_array_equal(got, written)
        else:  # of noise, and with the colours of four pixels in one
            assert np.corrcoef(got.ravel(), written.ravel())[0, 1] > 0.5


def test_two_files_of_ffcv_s_are_a_data_set(foreign: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train.beton").symlink_to(folder / "raw.beton")
    (tmp_path / "val.beton").symlink_to(folder / "all.beton")
    assert beton.is_beton(tmp_path)
    request = Request(limit_train=6, image_size=4)
    train, test = encoded_splits(*beton.splits(tmp_path, request), request)
    assert (len(train), len(test), train.class_names) == (6, 12, ("0", "1", "2"))
    assert train.labels.bincount().tolist() == [2, 2, 2]
    assert test.images[torch.arange(12)].shape == (12, 4, 4, 3)
    (tmp_path / "test.beton").symlink_to(folder / "jpg.beton")
    assert beton.splits(tmp_path, request)[1].tree.where() == str(tmp_path / "test.beton")


def test_files_are_known_by_their_content(foreign: Any, folder: Path, tmp_path: Path) -> None:
    for name in ("data.ffcv", "data", "data.zip"):
        (tmp_path / name).symlink_to(folder / "raw.beton")
        assert beton.is_beton(tmp_path / name)
    (tmp_path / "text").write_text("words " * 10)
    with zipfile.ZipFile(tmp_path / "true.zip", "w") as archive:
        archive.writestr("train/a/1.png", b"")
    assert not any(map(beton.is_beton, (tmp_path / "text", tmp_path / "true.zip", tmp_path / "gone", tmp_path)))
    found = datasets.find("folder", str(tmp_path / "data"), Request(image_size=4, only_test=True))
    assert (len(found.train), len(found.test)) == (0, 12)
    with pytest.raises(ValueError, match="does not say which images are for testing"):
        datasets.find("folder", str(tmp_path / "data"), Request(image_size=4))


def test_files_of_ffcv_s_imagenet_are_a_data_set(foreign: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "val_400_0.10_90.ffcv").symlink_to(folder / "raw.beton")
    found = datasets.find("folder", str(tmp_path), Request(image_size=4, only_test=True))
    assert (len(found.train), len(found.test)) == (0, 12)
    with pytest.raises(ValueError, match=r"holds no train\.beton"):
        datasets.find("folder", str(tmp_path), Request(image_size=4))
    (tmp_path / "train_400_0.10_90.ffcv").symlink_to(folder / "all.beton")
    assert len(datasets.find("folder", str(tmp_path), Request(image_size=4)).train) == 12
    (tmp_path / "train_500_0.50_90.ffcv").symlink_to(folder / "all.beton")
    with pytest.raises(ValueError, match="holds several files of train: "):
        datasets.find("folder", str(tmp_path), Request(image_size=4))


def test_a_file_of_ours_is_read_back_and_by_ffcv(tmp_path: Path) -> None:
    require_ffcv()
    path = tmp_path / "x.beton"
    beton_writer.write(path, [ARRAYS, ARRAYS.take(torch.arange(5))])
    train, test = encoded_splits(*beton.splits(path, Request()), Request())
    assert (len(train), len(test), train.class_names) == (len(ARRAYS), 5, ARRAYS.class_names)
    assert torch.equal(train.images[torch.arange(len(ARRAYS))], ARRAYS.images)
    assert torch.equal(test.images[torch.arange(5)], ARRAYS.images[:5])
    assert torch.equal(train.labels, ARRAYS.labels)
    assert train.where(7) == f"{path}: image 7"
    assert test.where(0) == f"{path}: image {len(ARRAYS)}"

    from ffcv.reader import Reader

    file, theirs = beton.read(path), Reader(str(path))
    assert list(file.fields) == theirs.field_names == ["image", "label", "class_name", "split"]
    for number, field in enumerate(file.fields):
        assert file.rows[field].tobytes() == theirs.metadata[f"f{number}"].tobytes()


# ---------------------------------------------------------------- a file that is made here, without FFCV

PAGE = 1024
TABLE_ROW = struct.Struct("<QQQ")
ROW = struct.Struct("<BHHQ3xqQQq")  # image, what aligns the others, label, class_name, split
FIELD = struct.Struct("<B16s1024x")
HEAD = 24 + 4 * FIELD.size
COUNT = 6
PICTURES = [smooth(number, 8, 6 + number % 20) for number in range(40)]
MODES = [beton.RAW, beton.JPEG] * 20
CONTENTS = [
    encode(picture) if mode == beton.JPEG else picture.tobytes()
    for picture, mode in zip(PICTURES, MODES, strict=True)
]
CLASSES = ("Käse", "雪")


def build(count: int = COUNT, *, empty: bool = False) -> bytes:
    """A file of images, half of them JPEG, of two classes: four for training, the others for testing.

    empty: each has also a note of no bytes, in the place where its image is.
    """
    fields = [(2, b"image"), (1, b"label"), (3, b"class_name"), (1, b"split"), (3, b"note")][: 5 if empty else 4]
    start, data, rows = 8 * PAGE, b"", b""
    table: list[tuple[int, int, int]] = []

    def allocate(sample: int, content: bytes) -> int:
        nonlocal data
        table.append((sample, start + len(data), len(content)))
        data += content
        return table[-1][1]

    for sample, picture, mode, content in zip(range(count), PICTURES, MODES, CONTENTS, strict=False):
        if len(data) % PAGE + len(content) > PAGE:
            data += bytes(-len(data) % PAGE)
        name = CLASSES[sample % 2].encode()
        note_at = allocate(sample, b"") if empty else 0
        image_at, name_at = allocate(sample, content), allocate(sample, name)
        height, width = picture.shape[:2]
        rows += ROW.pack(mode, width, height, image_at, sample % 2, name_at, len(name), int(sample >= 4))
        rows += struct.pack("<QQ", note_at, 0) if empty else b""
    data += bytes(-len(data) % PAGE)
    header = struct.pack("<HHIQQ", 2, len(fields), PAGE, count, start + len(data))
    head = header + b"".join(FIELD.pack(*field) for field in fields) + rows
    return head.ljust(start, b"\0") + data + b"".join(TABLE_ROW.pack(*row) for row in table)


FILE = build()
TABLE = int.from_bytes(FILE[16:24], "little")


@contextmanager
def holding(content: bytes) -> Iterator[Path]:
    """A file with that content, for one example."""
    with NamedTemporaryFile(suffix=".beton") as file:
        file.write(content)
        file.flush()
        yield Path(file.name)


@pytest.mark.parametrize("content", [FILE, build(empty=True)], ids=["", "with what is empty"])
def test_images_are_found_by_what_is_allocated(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    path.write_bytes(content)
    file = beton.read(path)
    assert file.sizes.tolist() == list(map(len, CONTENTS[:COUNT]))
    if "note" in file.fields:
        assert file.rows["note"]["at"].tolist() == file.images["at"].tolist()
    train, test = beton.splits(path, Request())
    assert (train.class_names, train.labels.tolist(), test.labels.tolist()) == (CLASSES, [0, 1, 0, 1], [0, 1])
    assert train.names + test.names == tuple(f"image {number}" for number in range(COUNT))
    for number in range(COUNT):
        head = b"" if MODES[number] == beton.JPEG else b"P6 %d 8 255\n" % (6 + number)
        assert file.encoded(number) == head + CONTENTS[number]


# ---------------------------------------------------------------- damage


def check(path: Path) -> None:
    """The file is refused in one line that names it, or all that is read of it lies within it."""
    said = ""
    try:
        file = beton.read(path)
        parts = file.listings()
    except ValueError as error:
        said = str(error)
    else:
        size = path.stat().st_size
        ends = [
            (int(row["at"]), int(row["at"]) + int(length))
            for row, length in zip(file.images, file.sizes, strict=True)
        ]
        assert all(
            HEAD < start < end <= TABLE <= size and (end - 1) // file.page_size == start // file.page_size
            for start, end in ends
        )
        for sample, row in enumerate(file.images):
            content = file.encoded(sample)
            if row["mode"] == beton.RAW:
                assert len(content.split(b"255\n", 1)[1]) == int(row["height"]) * int(row["width"]) * 3
        assert sum(map(len, parts.values())) == len(file)
    if said:
        assert said.startswith("data: ")
        assert str(path) in said
        assert "\n" not in said


def test_a_file_that_ends_too_early_is_refused_wherever(tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    path.write_bytes(FILE)
    for end in reversed(range(len(FILE))):
        os.truncate(path, end)
        with pytest.raises(ValueError, match=r"^data: .*/x\.beton is no whole \.beton file \([^\n]+\)$"):
            beton.read(path)


PLACES = [
    *range(24),
    *(24 + field * FIELD.size + at for field in range(4) for at in range(17)),
    *range(HEAD, HEAD + COUNT * ROW.size),
    *range(TABLE, len(FILE)),
]


def test_no_bit_of_the_head_or_of_the_table_leads_out_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    path.write_bytes(FILE)
    with path.open("r+b", buffering=0) as file:
        for at in PLACES:
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([FILE[at] ^ 1 << bit]), at)
                check(path)
            os.pwrite(file.fileno(), FILE[at : at + 1], at)
    assert path.read_bytes() == FILE


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(PLACES), st.integers(0, 255), min_size=1, max_size=4))
def test_no_few_bytes_of_them_do(changes: dict[int, int]) -> None:
    content = bytearray(FILE)
    for at, value in changes.items():
        content[at] = value
    with holding(bytes(content)) as path:
        check(path)


def test_numbers_beyond_reason_are_refused_at_once(tmp_path: Path) -> None:
    """The file is so large that reading as many rows as it could hold would take all memory."""
    path = tmp_path / "x.beton"
    size = TABLE + (1 << 40) // 24 * 24
    for count in (6, size // 24 - 1, size // 8):
        path.write_bytes(FILE[:8] + struct.pack("<QQ", count, TABLE) + FILE[24:])
        os.truncate(path, size)
        check(path)
        with pytest.raises(ValueError, match=rf"\(it holds {count:,} samples and [\d,]+ allocations\)$"):
            beton.read(path)


def with_row(sample: int, **values: Any) -> Callable[[bytes], bytes]:
    """The content with other values in the row of a sample: of image mode, width, height and at."""
    names = ("mode", "width", "height", "at", "label", "name_at", "name_size", "split")

    def change(content: bytes) -> bytes:
        start = HEAD + sample * ROW.size
        row = dict(zip(names, ROW.unpack_from(content, start), strict=True))
        return content[:start] + ROW.pack(*(row | values).values()) + content[start + ROW.size :]

    return change


def with_field(number: int, kind: int, name: bytes) -> Callable[[bytes], bytes]:
    start = 24 + number * FIELD.size
    return lambda content: content[:start] + FIELD.pack(kind, name) + content[start + FIELD.size :]


def with_bytes(at: int, replacement: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + replacement + content[at + len(replacement) :]


WHOLE = r"is no whole \.beton file "
IMAGE_AT = int.from_bytes(FILE[HEAD + 5 : HEAD + 13], "little")
FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", WHOLE + r"\(it ends at byte 0, within its head\)"),
    "text": (
        lambda content: b"image,label\n" * 9,
        WHOLE + r"\(it begins with format version 28009, and 2 is known",
    ),
    "a JPEG": (lambda content: CONTENTS[1], WHOLE + r"\(it begins with format version 55551, and 2 is known\)"),
    "never finished": (with_bytes(16, bytes(8)), WHOLE + r"\(its writing was never finished\)"),
    "cut off": (lambda content: content[:-5], WHOLE + r"\(it is cut off at byte [\d,]+\)"),
    "cut off before the table": (
        lambda content: content[: TABLE - 9],
        WHOLE + r"\(it is cut off at byte [\d,]+\)",
    ),
    "no table": (lambda content: content[:TABLE], WHOLE + r"\(it holds 6 samples and 0 allocations\)"),
    "no samples": (with_bytes(8, bytes(8)), WHOLE + r"\(it holds no samples\)"),
    "no fields": (
        with_bytes(2, bytes(2)),
        r"needs the fields image \(rgb image\) and label \(int\), and it has $",
    ),
    "a sample too many": (with_bytes(8, b"\7"), WHOLE + r"\(it holds 7 samples and 12 allocations\)"),
    "no pages": (with_bytes(4, bytes(4)), WHOLE + r"\(its pages are of 0 bytes\)"),
    "pages of no power of two": (with_bytes(4, b"\1\4\0\0"), WHOLE + r"\(its pages are of 1,025 bytes\)"),
    "no label": (
        with_field(1, 1, b"class"),
        r"needs the fields image .*, and it has image \(rgb image\), class \(int\)",
    ),
    "no image": (
        with_field(0, 2, b"picture"),
        r"needs the fields .*, and it has picture \(rgb image\), label \(int\)",
    ),
    "a label that is no number": (with_field(1, 0, b"label"), r"it has image \(rgb image\), label \(float\)"),
    "a field twice": (with_field(3, 1, b"label"), WHOLE + r"\(two fields have one name\)"),
    "a custom field": (with_field(2, 255, b"mine"), WHOLE + r"\(its field 'mine' is of the custom type 255\)"),
    "a field of other letters": (
        with_field(2, 3, b"caf\xe9"),
        WHOLE + r"\(its field 'caf.' is not of ASCII letters\)",
    ),
    "a field of two lines": (with_field(2, 3, b"a\nb"), WHOLE + r"\(its field 'a\\nb' is not of ASCII letters\)"),
    "a label below 0": (with_row(3, label=-1), "has a label out of range: -1, where labels must be 0 to 2 for 3"),
    "a label too many": (
        with_row(3, label=7),
        "has a label out of range: 7, where labels must be 0 to 2 for 3 cl",
    ),
    "a third split": (with_row(5, split=2), WHOLE + r"\(image 5 is in no known split\)"),
    "a split below 0": (with_row(2, split=-1), WHOLE + r"\(image 2 is in no known split\)"),
    "an image in the head": (with_row(4, at=HEAD), WHOLE + r"\(image 4 is nowhere in the file\)"),
    "an image after the end": (with_row(4, at=1 << 63), WHOLE + r"\(image 4 is nowhere in the file\)"),
    "another's image": (with_row(2, at=IMAGE_AT), WHOLE + r"\(image 2 has the place of another sample\)"),
    "another mode": (with_row(2, mode=2), WHOLE + r"\(image 2 is neither JPEG nor raw\)"),
    "more pixels than bytes": (with_row(4, height=9), WHOLE + r"\(image 4 has another size than its pixels\)"),
    "no pixels": (with_row(1, width=0), WHOLE + r"\(image 1 has no pixels\)"),
    "an allocation in the head": (
        with_bytes(TABLE, TABLE_ROW.pack(0, HEAD, 9)),
        WHOLE + r"\(it has an allocation outside of it\)",
    ),
    "an allocation that is too long": (
        with_bytes(TABLE, TABLE_ROW.pack(0, IMAGE_AT, TABLE - IMAGE_AT + 1)),
        WHOLE + r"\(it has an allocation outside of it\)",
    ),
    "an image in two pages": (
        with_bytes(
            TABLE + 2 * TABLE_ROW.size,
            TABLE_ROW.pack(1, int.from_bytes(FILE[HEAD + ROW.size + 5 : HEAD + ROW.size + 13], "little"), PAGE),
        ),
        WHOLE + r"\(image 1 is in two pages\)",
    ),
    "a class name after the end": (
        with_row(1, name_at=TABLE),
        WHOLE + r"\(image 1 has a class name outside the file",
    ),
    "a class name that is too long": (with_row(1, name_size=1 << 62), "has a class name outside the file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_said(fault: str, tmp_path: Path) -> None:
    make, words = FAULTS[fault]
    path = tmp_path / "x.beton"
    path.write_bytes(make(FILE))
    with pytest.raises(ValueError, match=rf"^data: {re.escape(str(path))} [^\n]*{words}[^\n]*$"):
        beton.read(path).listings()


# ---------------------------------------------------------------- files that do not fit


def test_files_that_are_not_there_or_do_not_fit_are_said(tmp_path: Path) -> None:
    def said(path: Path, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            beton.splits(path, Request())

    unsplit = with_field(3, 1, b"part")(FILE)
    file, train, test = (tmp_path / f"{name}.beton" for name in ("none", "train", "test"))
    said(file, rf"^data: cannot read {file}: No such file or directory$")
    file.write_bytes(unsplit)
    said(file, r"^data: .*/none\.beton does not say which images are for testing \(it has no field `split`\)")
    train.write_bytes(unsplit)
    said(tmp_path, rf"^data: {tmp_path} holds no test\.beton and no val\.beton$")
    test.write_bytes(FILE)
    said(tmp_path, rf"^data: {test} holds images of both splits: give the file itself, not its folder$")
    test.write_bytes(unsplit.replace(CLASSES[1].encode(), "雨".encode()))
    said(tmp_path, rf"^data: {tmp_path} must have the same classes for training and for testing$")
    test.write_bytes(unsplit)
    assert list(map(len, beton.splits(tmp_path, Request()))) == [6, 6]
    test.unlink()
    test.mkdir()
    said(tmp_path, rf"^data: {tmp_path} holds no test\.beton and no val\.beton$")
    with pytest.raises(ValueError, match=rf"^data: cannot read {test}: Is a directory$"):
        beton.read(test)


def test_a_class_without_images_for_testing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.beton").write_bytes(with_row(5, split=0)(FILE))
    with pytest.raises(ValueError, match="must have the same classes for training and for testing"):
        beton.splits(tmp_path / "x.beton", Request())


def test_a_field_split_that_is_no_number_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.beton").write_bytes(with_field(3, 0, b"split")(FILE))
    assert {part: len(images) for part, images in beton.read(tmp_path / "x.beton").listings().items()} == {"": 6}
