"""Checks of exported files before a runtime reads them: nothing in them may run Python or open other files.

torch.export.load unpickles weights that say so, evaluates the text of symbolic sizes and calls any function under
`torch` that a node names; TorchScript has operations that write files; an ONNX model may name other files.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from engine.common.optional import load
from engine.common.tensor_files import short_repr

NO_ONNX = "ONNX needs packages that are not there: pip install 'iad-engine[export]' ({reason})"

_MOST_TEXT = 2**26
"""Bytes of a record of code, which torch compresses."""
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|torch\.sym_\w+|math\.(ceil|floor|trunc)|"
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|getitem)"
)
_SYMBOL = r"Symbol\('[su]\d+'(, (positive|nonnegative|integer)=True)*\)"
_SIZE = re.compile(rf"({_SYMBOL}|[su]\d+|Integer\(-?\d+\)|(Mul|Add|FloorDiv|Mod|Max|Min)\(|-?\d+|[-+*/(), ])+")
_RECORDS = re.compile(
    r"models/model\.json|data/sample_inputs/model\.pt|data/(weights|constants)/(weight|tensor)_\d+|"
    r"data/(weights/model_weights|constants/model_constants)_config\.json|extra/[\w.-]+|"
    r"archive_format|archive_version|byteorder|\.format_version|\.storage_alignment|\.data/[\w.-]+|version"
)
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")
_CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", None)
_OBJECTS = ("as_custom_obj", "as_operator", "as_graph", "as_opaque_obj", "as_string_to_argument")
_TORCHSCRIPT_FILES = re.compile(r"\b(save|from_file)\b")
_TORCHSCRIPT_OPS = re.compile(r"\bops\s*\.\s*(\w+)")
_TORCHSCRIPT_SPACES = ("prim", "aten")


def check_exported_program(data: bytes) -> None:
    """Raise ValueError where `torch.export.load` would run anything but the operations of a network."""
    with _opened(data) as archive:
        records = _records(archive)
        for name in records:
            if not _RECORDS.fullmatch(name):
                raise ValueError(f"holds {short_repr(name)}, which no plain exported network does")
        missing = {"models/model.json", "data/sample_inputs/model.pt"} - set(records)
        if missing:
            raise ValueError(f"holds no {sorted(missing)[0]}: it is of another version of torch, or damaged")
        for name in records:
            if name.endswith("_config.json"):
                _check_payloads(_json(archive, records[name]))
        program = _json(archive, records["models/model.json"])
        sample = archive.read(records["data/sample_inputs/model.pt"])
    for key, value in _values(program):
        _check_value(key, value)
    for key in program.get("range_constraints", {}):
        _check_size(key)
    try:
        torch.load(io.BytesIO(sample), weights_only=True)  # torch falls back to unpickling anything
    except Exception:  # a file of strangers may raise anything
        raise ValueError("its sample inputs are no plain tensors, and reading them could run code") from None


def _check_payloads(config: dict[str, Any]) -> None:
    """Weights and constants are plain bytes."""
    for name, payload in dict(config.get("config", {})).items():
        path = payload.get("path_name") if isinstance(payload, dict) else None
        if not isinstance(path, str) or not _PAYLOAD.fullmatch(path) or payload.get("use_pickle") is not False:
            raise ValueError(f"its tensor {short_repr(name)} is a pickle, whose code would run")


def _check_value(key: str, value: Any) -> None:
    """A value of the program, under its key."""
    if key == "target" and not (isinstance(value, str) and _OPERATOR.fullmatch(value)):
        raise ValueError(f"calls {short_repr(value)}, which is no operation of a network")
    if key == "expr_str":
        _check_size(value)
    if key in _OBJECTS or (key in ("custom_obj_values", "treespec_namedtuple_fields") and value):
        raise ValueError(f"holds an object ({key}), and reading it could run code")
    if key in ("in_spec", "out_spec"):
        try:
            spec = json.loads(value)
        except (TypeError, ValueError, RecursionError):
            raise ValueError("its inputs and outputs are not described") from None
        for name, inner in _values(spec):
            if name == "type" and inner not in _CONTAINERS:
                raise ValueError(f"takes or gives {short_repr(inner)}, which is no tensor")


def _check_size(value: Any) -> None:
    if not (isinstance(value, str) and len(value) < 1000 and _SIZE.fullmatch(value)):
        raise ValueError(f"has the size {short_repr(value)}, which torch would evaluate")


def _values(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every value under a key, at any depth."""
    left = [tree]
    while left:
        found = left.pop()
        if isinstance(found, dict):
            yield from found.items()
            left += found.values()
        elif isinstance(found, list):
            left += found


def check_torchscript(data: bytes) -> None:
    """Raise ValueError where the code in a TorchScript archive opens files or calls what is no part of torch."""
    with _opened(data) as archive:
        for name, record in _records(archive).items():
            if not name.startswith("code/") or name.endswith(".debug_pkl"):
                continue
            text = archive.read(record).decode("utf-8", errors="replace")
            if found := _TORCHSCRIPT_FILES.search(text):
                raise ValueError(f"its code calls {found[0]}, which opens files")
            for space in _TORCHSCRIPT_OPS.findall(text):
                if space not in _TORCHSCRIPT_SPACES:
                    raise ValueError(f"its code calls operations of {space!r}, which are no part of a network")


def check_onnx(data: bytes) -> Any:
    """The model in an ONNX file. Raises ValueError where it names other files, which could be any."""
    onnx = load("onnx", missing=NO_ONNX)
    try:
        model = onnx.load_model_from_string(data)
    except Exception:  # of protobuf, which raises its own kinds
        raise ValueError("is no ONNX model, or a damaged one") from None
    left = [model]
    while left:
        message = left.pop()
        if isinstance(message, onnx.TensorProto) and message.data_location == onnx.TensorProto.EXTERNAL:
            where = next((entry.value for entry in message.external_data if entry.key == "location"), "")
            raise ValueError(
                f"its weights lie in another file, {short_repr(where)}: write all into one by onnx.save_model"
            )
        for field, value in message.ListFields():
            if field.message_type is not None:
                left += [value] if hasattr(value, "ListFields") else value
    return model


def extra_file(data: bytes, name: str) -> str | None:
    """Text of an extra file in an archive of torch; None where there is none."""
    with _opened(data) as archive:
        record = _records(archive).get(f"extra/{name}")
        return None if record is None else archive.read(record).decode("utf-8", errors="replace")


def _opened(data: bytes) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        _records(archive)
        damaged = archive.testzip()
    except ValueError:
        raise
    except Exception:  # a damaged archive may raise anything in zipfile
        raise ValueError("is damaged: it is no whole archive") from None
    if damaged is not None:
        raise ValueError(f"is damaged: its record {short_repr(damaged)} does not fit its checksum")
    return archive


def _records(archive: zipfile.ZipFile) -> dict[str, str]:
    """Names of records without the archive's own folder, and their whole names."""
    infos = archive.infolist()
    names = Counter(info.filename for info in infos)
    if any(count > 1 for count in names.values()):
        raise ValueError("holds two records of one name")
    folders = {name.partition("/")[0] for name in names}
    if len(folders) != 1:
        raise ValueError("is no archive of torch: its records lie in several folders")
    for info in infos:
        is_text = info.filename.partition("/")[2].startswith("code/") and info.file_size <= _MOST_TEXT
        if info.compress_type != zipfile.ZIP_STORED and not is_text:
            raise ValueError(f"is no archive of torch: its record {short_repr(info.filename)} is compressed")
    return {name.partition("/")[2]: name for name in names}


def _json(archive: zipfile.ZipFile, name: str) -> dict[str, Any]:
    try:
        content = json.loads(archive.read(name))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"is damaged: {short_repr(name)} is no JSON")
    return content
