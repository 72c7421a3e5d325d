"""Files of tensors and plain values: sealed by a checksum as they are written, checked as they are read.

torch.load compares no checksum of a file, and lets a tensor claim more memory than the file has bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import reprlib
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from engine.common.errors import printable
from engine.common.files import regular_file, replacing

_ZIP = b"PK\x03\x04"
_END_OF_ZIP, _END_LENGTH = b"PK\x05\x06", 22  # without a comment
_MARK = b"engine sha256:"
_DIGEST_LENGTH = 64
_MOST_DEPTH, _MOST_VALUES = 32, 1_000_000
_LENGTH_OF_HEADER, _MOST_HEADER = 8, 1 << 24

# Kinds of files by their first bytes, or those at a place.
_KINDS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras?)"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"GGUF", "a GGUF file"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (257, b"ustar", "a tar archive: unpack it"),
    (0, b"\x1f\x8b", "compressed by gzip: unpack it"),
    (0, b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it"),
    (0, b"\xfd7zXZ", "compressed by xz: unpack it"),
    (0, b"BZh", "compressed by bzip2: unpack it"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"%PDF", "a PDF"),
    (0, b"version https://git-lfs", "a pointer of Git LFS, and not the file itself: git lfs pull"),
    (0, b"Rar!", "a RAR archive: unpack it"),
    (0, b"PK\x05\x06", "an empty ZIP archive"),
)
_PICKLE, _TORCH_IN_PICKLE = re.compile(rb"\x80[\x03-\x05]"), b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""Beginnings of the pickles of Python 3, and the number that torch's older format has in its first one."""
_NUMBERS = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
_ONNX = re.compile(rb"\x08[\x01-\x14](\x12.{1,40}|[\x1a\x22\x2a\x32\x3a])", re.DOTALL)
"""Its version, the producer's name or what else may come next."""
_EXPORTED = {
    "onnx": "an ONNX model",
    "torchscript": "a TorchScript archive, whose code would run: save the network's state_dict() alone",
    "pt2": "an exported program of torch.export: save the network's state_dict() alone",
}
"""Exported networks by their format, in words for who needs a checkpoint."""


class _NumberType:
    """Stand-in for numpy.dtype, of which a file could make one that misleads NumPy."""

    def __init__(self, code: str, *_: object) -> None:
        if code not in _NUMBERS:
            raise ValueError("no number")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _number(kind: _NumberType, content: bytes) -> Any:
    """A number of NumPy as one of Python."""
    return np.frombuffer(content, kind.order + kind.code)[0].item()


_VALUES: list[Any] = [
    argparse.Namespace,
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]
"""Plain values that checkpoints often have beside weights: a script's options, and NumPy's numbers."""


@dataclass(frozen=True)
class Content:
    """Content of a file. sealed: its checksum was there, and fits. sha256: of the file.

    note: names what could not be checked, "" where all was. kind: of the file. metadata: of a safetensors file.
    """

    value: Any
    sealed: bool
    sha256: str
    note: str
    kind: str = "torch"
    metadata: Mapping[str, str] = field(default_factory=dict)


def write_tensors(path: Path, value: Mapping[str, Any]) -> None:
    """Write tensors and plain values for `torch.load(weights_only=True)`, sealed, atomically.

    The seal is the ZIP archive's comment: the SHA-256, in hex, of all that stands before it.
    """
    # Through memory: torch reports a full disk as an internal error of its zip writer, a plain file as OSError.
    buffer = io.BytesIO()
    torch.save(dict(value), buffer)
    with buffer.getbuffer() as view:
        assert view[-_END_LENGTH:][:4] == _END_OF_ZIP, "torch.save wrote a comment"
    buffer.seek(-2, io.SEEK_END)
    buffer.write((len(_MARK) + _DIGEST_LENGTH).to_bytes(2, "little") + _MARK)
    with buffer.getbuffer() as view:
        digest = hashlib.sha256(view).hexdigest()
    buffer.write(digest.encode())
    with replacing(path) as beside:
        beside.write_bytes(buffer.getbuffer())


def read_tensors(path: str | Path) -> Content:
    """The content of a file of tensors, of this project or not, read as data only: no code in it can run.

    Raises ValueError, one line with the path, for what is no such file, is damaged, holds what is neither a
    tensor nor a plain value, or claims more than its bytes can hold.
    """
    try:
        data = regular_file(Path(path)).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise ValueError(f"{path}: does not fit into the memory") from None
    if not data:
        raise ValueError(f"{path}: is empty")
    if _is_safetensors(data):
        return _read_safetensors(path, data)
    if kind := kind_of(data):
        raise ValueError(f"{path}: is no checkpoint: it is {kind}")
    sealed = data[-_DIGEST_LENGTH - len(_MARK) :].startswith(_MARK)
    if sealed and hashlib.sha256(data[:-_DIGEST_LENGTH]).hexdigest().encode() != data[-_DIGEST_LENGTH:]:
        raise ValueError(f"{path}: is damaged: its content does not fit its checksum")
    note = _check_records(path, data, sealed=sealed)
    value = _load(path, data)
    _check_extent(path, value)
    return Content(value, sealed, hashlib.sha256(data).hexdigest(), note)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, atomically."""
    content = safetensors_bytes(tensors, metadata)
    with replacing(path) as beside:
        beside.write_bytes(content)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file."""
    plain = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    content: bytes = safetensors.torch.save(plain, dict(metadata))
    return content


def kind_of(data: bytes) -> str:
    """Words for a file that is no file of tensors, by its content; "" where it may be one."""
    for place, mark, words in _KINDS:
        if data[place : place + len(mark)] == mark:
            return words
    if data.startswith(_ZIP):
        return _kind_of_archive(io.BytesIO(data))
    if _PICKLE.match(data) and _TORCH_IN_PICKLE not in data[:64]:
        return "a plain pickle, whose code would run: write the network's state_dict() by torch.save"
    return _EXPORTED["onnx"] if _ONNX.match(data) else _kind_of_text(data)


def exported_format(file: BinaryIO) -> str | None:
    """Format of an exported network by its content, a key of `_EXPORTED`; None for any other file.

    Of an archive, which may be large, the names of its records are read.
    """
    head = file.read(4096)
    if head[8:9] == b"{":  # safetensors
        return None
    words = _kind_of_archive(file) if head.startswith(_ZIP) else kind_of(head)
    return next((name for name, told in _EXPORTED.items() if told == words), None)


def _kind_of_text(data: bytes) -> str:
    """Words for a text; "" for what is none."""
    start = data[:1000].lstrip()
    if start[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page: the download gave that instead of the file"
    if not start.isascii() or not start.translate(None, b"\t\n\r\f").decode("ascii").isprintable():
        return ""
    if start.startswith(b"{") and b'"weight_map"' in data:
        return "the index of a checkpoint in several files: write their tensors into one"
    return "a text"


def _kind_of_archive(file: BinaryIO) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception:  # a damaged archive may raise anything in zipfile
        return ""
    within = {name.partition("/")[2] for name in names}
    if "constants.pkl" in within or any(name.startswith("code/") for name in within):
        return _EXPORTED["torchscript"]
    if "data.pkl" in within:
        return ""
    if any(name.startswith(("models/", "data/aotinductor")) or name == "archive_format" for name in within):
        return _EXPORTED["pt2"]
    if names and all(name.endswith(".npy") for name in names):
        return "an .npz file of NumPy arrays"
    return f"a ZIP archive of {len(names):,} other files, the first {short_repr(next(iter(names), None))}"


def _is_safetensors(data: bytes) -> bool:
    """True where a length comes first, and then a header in JSON of that length."""
    length = int.from_bytes(data[:_LENGTH_OF_HEADER], "little")
    start = data[_LENGTH_OF_HEADER : _LENGTH_OF_HEADER + 2]
    return start[:1] == b"{" and start[1:] in (b'"', b"}", b" ") and length <= len(data)


def _read_safetensors(path: str | Path, data: bytes) -> Content:
    length = int.from_bytes(data[:_LENGTH_OF_HEADER], "little")
    if length > _MOST_HEADER:
        raise ValueError(
            f"{path}: is no checkpoint: its header has {length:,} bytes, and {_MOST_HEADER:,} are the most"
        )
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[_LENGTH_OF_HEADER : _LENGTH_OF_HEADER + length])
    except Exception as error:  # whatever the package raises, its own exceptions among it
        raise ValueError(f"{path}: is a damaged safetensors file: {printable(error):.200}") from None
    note = "a safetensors file, which has no checksums: damage to it cannot be seen"
    metadata = header.get("__metadata__", {})
    tensors = {key: tensors[key] for key in header if key in tensors}  # the package gives them in any order
    return Content(tensors, False, hashlib.sha256(data).hexdigest(), note, "safetensors", metadata)


def tensor_fault(value: object) -> str:
    """Reason why a value is no plain tensor whose values are all there; "" where it is one."""
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} and no tensor"
    if type(value) not in (Tensor, nn.Parameter):
        return f"a tensor of the class {type(value).__name__}"
    if value.is_nested:
        return "a nested tensor"
    if value.layout != torch.strided:
        return f"a sparse tensor ({_name(value.layout)})"
    if value.is_quantized:
        return f"a quantised tensor ({_name(value.dtype)})"
    if value.device.type != "cpu":
        return f"a tensor without values (on the device {value.device.type})"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"a tensor of {value.numel():,} values, of which fewer are there"
    return ""


class _Shown(reprlib.Repr):
    """Short reprs: of tensors, and of all that has a long or costly repr, the type alone."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring, self.maxlevel = 60, 2

    def repr_instance(self, value: object, level: int) -> str:
        plain = isinstance(value, bool | float | bytes | torch.dtype) or value is None
        return repr(value) if plain else type(value).__name__


def short_repr(value: object) -> str:
    """One short line for a value of unknown size, for messages."""
    try:
        text = _Shown().repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


def _check_records(path: str | Path, data: bytes, *, sealed: bool) -> str:
    """Refuse an archive whose records are not as they were written. Returns a note where that cannot be seen."""
    if not data.startswith(_ZIP):
        return "a file of torch's older format, which has no checksums: damage to it cannot be seen"
    checked = True
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
            checked = sealed or any(record.CRC for record in records)
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                wrong = "is no checkpoint: its records are compressed, and torch's never are"
            elif sum(record.file_size for record in records) > len(data):
                wrong = "is no checkpoint: its records claim more bytes than it has"
            else:
                wrong = "" if sealed or not checked else _first_damaged(archive)
    except Exception:  # a damaged archive may raise anything in zipfile
        wrong = "is no checkpoint, or a damaged one"
    if wrong:
        raise ValueError(f"{path}: {wrong}")
    return "" if checked else "a file without checksums: damage to it cannot be seen"


def _first_damaged(archive: zipfile.ZipFile) -> str:
    for record in archive.infolist():
        try:
            with archive.open(record) as file:
                while file.read(1 << 20):
                    pass
        except zipfile.BadZipFile:
            return f"is damaged: its record {short_repr(record.filename)} does not fit its checksum"
    return ""


def _load(path: str | Path, data: bytes) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about how the file was written
            with torch.serialization.safe_globals(_VALUES):
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind may raise anything in torch's reader
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path}: holds the Python object {short_repr(refused[1])[1:-1]}, and loading it could run code; "
                "save the network's state_dict() alone"
            ) from None
        raise ValueError(f"{path}: is no checkpoint, or a damaged one") from None


def _check_extent(path: str | Path, value: object) -> None:
    """Refuse containers that are too deep or too large to walk. A value in several places counts in each."""
    left, count = [(value, 0)], 0
    while left:
        found, depth = left.pop()
        count += 1
        if depth > _MOST_DEPTH:
            raise ValueError(f"{path}: is no checkpoint: it is nested more than {_MOST_DEPTH} levels deep")
        if count > _MOST_VALUES:
            raise ValueError(f"{path}: is no checkpoint: it holds more than {_MOST_VALUES:,} values")
        if isinstance(found, Mapping):
            left += [(inner, depth + 1) for inner in found.values()]
        elif isinstance(found, list | tuple | set):
            left += [(inner, depth + 1) for inner in found]
