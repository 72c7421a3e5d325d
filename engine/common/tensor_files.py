"""Files of tensors and plain values: sealed by a checksum as they are written, checked as they are read.

torch.load compares no checksum of a file, and lets a tensor claim more memory than the file has bytes.
"""

from __future__ import annotations

import hashlib
import io
import re
import reprlib
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.common.files import regular_file, replacing

_ZIP = b"PK\x03\x04"
_END_OF_ZIP, _END_LENGTH = b"PK\x05\x06", 22  # without a comment
_MARK = b"engine sha256:"
_DIGEST_LENGTH = 64
_MOST_DEPTH, _MOST_VALUES = 32, 1_000_000


@dataclass(frozen=True)
class Content:
    """Content of a file. sealed: its checksum was there, and fits. sha256: of the file.

    note: names what could not be checked, "" where all was.
    """

    value: Any
    sealed: bool
    sha256: str
    note: str


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
    sealed = data[-_DIGEST_LENGTH - len(_MARK) :].startswith(_MARK)
    if sealed and hashlib.sha256(data[:-_DIGEST_LENGTH]).hexdigest().encode() != data[-_DIGEST_LENGTH:]:
        raise ValueError(f"{path}: is damaged: its content does not fit its checksum")
    note = _check_records(path, data, sealed=sealed)
    value = _load(path, data)
    _check_extent(path, value)
    return Content(value, sealed, hashlib.sha256(data).hexdigest(), note)


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
