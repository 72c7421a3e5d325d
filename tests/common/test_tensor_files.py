"""Files of tensors: one flipped bit anywhere is found, and a small file cannot claim much memory."""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import random
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from engine.common.tensor_files import Content, read_tensors, short_repr, tensor_fault, write_tensors

LINE = r"^[^\n]*$"
VALUE: dict[str, Any] = {
    "format": 2,
    "weights": {"a": torch.arange(300.0), "b": torch.ones(3, 4)},
    "rows": [1, 2.5],
}


def saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def read(path: Path) -> tuple[Content | None, str]:
    """Content of a file, or the reason why it is refused."""
    try:
        return read_tensors(path), ""
    except ValueError as error:
        return None, str(error).removeprefix(f"{path}: ")


def refused(path: Path, data: bytes) -> str:
    """Reason why the file with that content is refused."""
    path.write_bytes(data)
    with pytest.raises(ValueError, match=LINE) as error:
        read_tensors(path)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value).removeprefix(f"{path}: ")


def with_pickle(change: Callable[[bytes], bytes], value: object) -> bytes:
    """A file whose pickle was changed, with right checksums."""
    source, target = zipfile.ZipFile(io.BytesIO(saved(value))), io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for record in source.infolist():
            content = source.read(record)
            archive.writestr(record.filename, change(content) if record.filename.endswith("data.pkl") else content)
    return target.getvalue()


# The seal


def test_a_sealed_file_is_an_ordinary_one_with_a_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_tensors(path, VALUE)
    data = path.read_bytes()
    content = read_tensors(path)
    assert (content.sealed, content.note, content.sha256) == (True, "", hashlib.sha256(data).hexdigest())
    for loaded in (
        content.value,
        torch.load(path, weights_only=True),
        torch.load(path, mmap=True, weights_only=True),
    ):
        assert torch.equal(loaded["weights"]["a"], VALUE["weights"]["a"])
        assert loaded["rows"] == VALUE["rows"]
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment == b"engine sha256:" + hashlib.sha256(data[:-64]).hexdigest().encode()


def test_one_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    """All that says how the archive ends, and any place of the rest: refused, or known to have lost its seal."""
    path, other = tmp_path / "a.pt", tmp_path / "b.pt"
    write_tensors(path, VALUE)
    data = path.read_bytes()
    end = 8 * (len(data) - 120)
    draw = random.Random(0)
    for bit in [*range(end, 8 * len(data)), *(draw.randrange(end) for _ in range(400))]:
        other.write_bytes(flipped(data, bit))
        content, said = read(other)
        if content is None:
            assert said.startswith("is ")
        else:
            assert not content.sealed, bit
            assert content.value["format"] == 2  # which is not believed without a seal: see weights.check_own


@pytest.mark.parametrize(
    "change", [lambda d: d[:-1], lambda d: d + b"\0", lambda d: d[:1000] + d[1001:], lambda d: d[:-78]]
)
def test_a_cut_or_longer_file_is_not_sealed(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_tensors(path, VALUE)
    path.write_bytes(change(path.read_bytes()))
    content, said = read(path)
    assert said.startswith("is ") if content is None else not content.sealed


def test_a_full_disk_leaves_the_file_of_before(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_tensors(path, {"a": torch.ones(1)})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_tensors(path, VALUE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# Files of others


def test_what_a_foreign_archive_has_of_checksums_is_compared(tmp_path: Path) -> None:
    """A flipped bit is refused, or it is where no content is: in what pads the records."""
    path, data, draw = tmp_path / "a.pt", saved(VALUE), random.Random(1)
    accepted = 0
    for _ in range(400):
        path.write_bytes(flipped(data, draw.randrange(8 * len(data))))
        content, said = read(path)
        if content is None:
            assert said.startswith("is ")
            continue
        accepted, value = accepted + 1, content.value
        assert torch.equal(value["weights"]["a"], VALUE["weights"]["a"])
        assert torch.equal(value["weights"]["b"], VALUE["weights"]["b"])
        assert {key: value[key] for key in ("format", "rows")} == {"format": 2, "rows": [1, 2.5]}
    assert accepted < 250  # this file is so small that half of it is padding


def test_a_flipped_value_is_named_by_its_record(tmp_path: Path) -> None:
    data = saved(VALUE)
    place = data.index(torch.tensor(100.0).numpy().tobytes() + torch.tensor(101.0).numpy().tobytes())
    assert refused(tmp_path / "a.pt", flipped(data, 8 * place)) == (
        "is damaged: its record 'archive/data/0' does not fit its checksum"
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_where_nothing_can_be_compared_it_is_said(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.serialization.set_crc32_options(False)
    try:
        path.write_bytes(saved(VALUE, _use_new_zipfile_serialization=zipped))
    finally:
        torch.serialization.set_crc32_options(True)
    content = read_tensors(path)
    assert "damage to it cannot be seen" in content.note
    assert torch.equal(content.value["weights"]["a"], VALUE["weights"]["a"])


def test_a_file_of_checksums_has_no_note(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(saved(VALUE))
    assert (read_tensors(path).sealed, read_tensors(path).note) == (False, "")


# Bounds


@pytest.fixture
def little_memory() -> Any:
    """Room for the test and 2 GB more."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 10**9, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def deflated(value: object, size: int) -> bytes:
    """A record of zeros that is a thousand times smaller in the file."""
    source, target = zipfile.ZipFile(io.BytesIO(saved(value))), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for record in source.infolist():
            archive.writestr(record.filename, bytes(size) if "/data/" in record.filename else source.read(record))
    return target.getvalue()


def overlapping() -> bytes:
    """Many entries of one record."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(100_000))
        archive.filelist *= 100_000
        archive.start_dir = target.tell()
    return target.getvalue()


def numel(count: int) -> Callable[[bytes], bytes]:
    """The pickle of a tensor of 3 values whose storage claims so many."""

    def change(content: bytes) -> bytes:
        place = content.index(b"K\x03", content.index(b"cpu"))  # where it lies, and how long it is
        return content[:place] + b"\x8a\x08" + count.to_bytes(8, "little") + content[place + 2 :]

    return change


def twice(depth: int) -> object:
    """Lists of lists, each of which holds the one before twice: small as it is, endless for who walks it."""
    value: object = [0]
    for _ in range(depth):
        value = [value, value]
    return value


def nested(depth: int) -> object:
    value: object = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: deflated({"a": torch.zeros(3)}, 10**7), "compressed"),
        (overlapping, "claim more bytes"),
        (lambda: with_pickle(numel(10**12), {"a": torch.zeros(3)}), "no checkpoint"),
        (lambda: with_pickle(numel(4 * 10**8), {"a": torch.zeros(3)}), "no checkpoint"),
        (
            lambda: numel(10**12)(saved({"a": torch.zeros(3)}, _use_new_zipfile_serialization=False)),
            "no checkpoint",
        ),
        (lambda: saved(twice(25)), "more than 1,000,000 values"),
        (lambda: saved(nested(33)), "more than 32 levels deep"),
        (lambda: saved(nested(300)), "more than 32 levels deep"),
        (lambda: b"\x80\x02" + b"(" * 10**6 + b"t" * 10**6 + b".", "no checkpoint"),
    ],
)
def test_a_small_file_costs_little(
    make: Callable[[], bytes], words: str, tmp_path: Path, little_memory: None
) -> None:
    data = make()
    assert len(data) < 7 * 10**6
    assert words in refused(tmp_path / "a.pt", data)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "absent", "link to itself", "huge and empty"])
def test_what_is_no_file_is_refused_without_waiting(kind: str, tmp_path: Path, little_memory: None) -> None:
    path = tmp_path / "a.pt"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "huge and empty":
        with path.open("wb") as file:
            file.truncate(10**12)
    elif kind == "device":
        path = Path("/dev/zero")
    with pytest.raises(ValueError, match=LINE) as error:
        read_tensors(path)
    assert str(error.value).startswith(f"{path}: ")


# Tensors


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.eye(3).to_sparse(), "a sparse tensor (sparse_coo)"),
        (lambda: torch.eye(3).to_sparse_csr(), "a sparse tensor (sparse_csr)"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "a quantised tensor (qint8)"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
        (
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "a tensor of the class NestedTensor",
        ),
        (lambda: torch.empty(3, device="meta"), "a tensor without values (on the device meta)"),
        (lambda: torch.ones(1).expand(10**12), "a tensor of 1,000,000,000,000 values, of which fewer are there"),
        (
            lambda: torch.ones(1).expand(10**6, 10**6),
            "a tensor of 1,000,000,000,000 values, of which fewer are there",
        ),
        (lambda: "text", "str and no tensor"),
        (lambda: torch.ones(3), ""),
        (lambda: torch.nn.Parameter(torch.ones(3)), ""),
        (lambda: torch.ones(4, 4).t()[1:], ""),
        (lambda: torch.empty(0), ""),
    ],
)
def test_odd_tensors_are_known_by_name(make: Callable[[], Tensor], words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": make()}, path)
    assert tensor_fault(read_tensors(path).value["a"]) == words


def test_any_value_is_shown_in_a_short_line() -> None:
    for value in (10**5000, "x" * 10**6, nested(10**5), {"a\nb": 1}, torch.ones(1000)):
        assert len(short_repr(value)) <= 80
        assert "\n" not in short_repr(value)


# Plain values beside tensors


class _Reduced:
    """Pickled as a call of a function with arguments."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def test_numbers_of_numpy_and_options_are_read_as_plain_values(tmp_path: Path) -> None:
    numbers = [kind(3) for kind in (np.float64, np.float32, np.float16, np.int64, np.int8, np.uint16, np.bool_)]
    value = {"args": argparse.Namespace(lr=0.1), "numbers": numbers, "swapped": np.dtype(">f8").type(0.25)}
    torch.save(value, tmp_path / "a.pt")
    read = read_tensors(tmp_path / "a.pt").value
    assert read == {"args": argparse.Namespace(lr=0.1), "numbers": [3, 3, 3, 3, 3, 3, True], "swapped": 0.25}
    assert [type(number) for number in read["numbers"]] == [float, float, float, int, int, int, bool]


@pytest.mark.parametrize(
    "value",
    [
        np.array([1.0]),
        np.void(b"12345678"),
        _Reduced(np.dtype, "O"),
        _Reduced(np.dtype, "f8,O"),
    ],
)  # fmt: skip
def test_no_other_object_of_numpy_is_made(value: object, tmp_path: Path) -> None:
    torch.save({"a": value}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"^[^\n]*a.pt: (holds the Python object|is no checkpoint)[^\n]*$"):
        read_tensors(tmp_path / "a.pt")


def test_the_header_of_safetensors_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    length = (1 << 24) + 8
    path.write_bytes(length.to_bytes(8, "little") + b'{"' + b" " * length)
    with pytest.raises(ValueError, match="its header has 16,777,224 bytes, and 16,777,216 are the most"):
        read_tensors(path)
    path.write_bytes(safetensors.torch.save({"a": torch.ones(3)})[:-1])
    with pytest.raises(ValueError, match="a.safetensors: is a damaged safetensors file: "):
        read_tensors(path)
