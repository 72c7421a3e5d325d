"""Writers of exported files, one for each format."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from engine.common import optional
from engine.common.errors import printable
from engine.common.lookup import look_up
from engine.deployment.artefacts.archives import NO_ONNX
from engine.deployment.artefacts.black_box import silent
from engine.deployment.artefacts.facts import EXTRA_FILE, ArtefactFacts, facts_of
from engine.deployment.exporting import plain_source
from engine.deployment.exporting.formats import FORMATS, Format
from engine.deployment.exporting.programs import example, exportable, program_of
from engine.models.weights import LoadedModel, save_safetensors

_OPSET = 18
_STACK = "pkg.torch"
"""Begin of what torch notes of each operation: files and lines of who exported, among others."""


@dataclass(frozen=True)
class ExportSubject:
    """Network to be exported, for images (height, width)."""

    loaded: LoadedModel
    image_size: tuple[int, int]

    @cached_property
    def network(self) -> nn.Module:
        """A copy in float32, on the CPU."""
        return exportable(self.loaded.module)

    @cached_property
    def program(self) -> ExportedProgram:
        """Its forward, recorded. Raises ValueError as `program_of` does."""
        return program_of(self.network, self.image_size)

    @cached_property
    def facts(self) -> ArtefactFacts:
        """Facts that the files carry."""
        return facts_of(self.loaded, self.image_size)


def write(entry: Format, subject: ExportSubject, folder: Path) -> None:
    """Write the files of a format into a folder, where another format may have written the same ones.

    Raises ValueError, one line, where the network cannot be written so, and OSError where the disk is full.
    """
    try:
        look_up("format", entry.name, WRITERS)(subject, folder)
    except ValueError as error:
        raise ValueError(f"{subject.loaded.path}: {entry.name}: {error}") from None


def _write_onnx(subject: ExportSubject, folder: Path) -> None:
    onnx = optional.load("onnx", missing=NO_ONNX)
    try:
        with _quiet():
            made = torch.onnx.export(
                subject.program,
                (),
                dynamo=True,
                opset_version=_OPSET,
                input_names=["images"],
                output_names=["logits"],
                verbose=False,
            )
        assert made is not None
        model = made.model_proto
    except Exception as error:  # the exporter raises kinds without end
        raise ValueError(f"torch.onnx does not translate this network: {printable(error):.300}") from None
    _strip(model)
    _name_batch(model)
    for key, text in subject.facts.as_metadata().items():
        model.metadata_props.add(key=key, value=text)
    model.producer_name = "engine"
    onnx.checker.check_model(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def _strip(model: Any) -> None:
    """Drop what torch notes of its own: it names files and lines."""
    left = [model]
    while left:
        message = left.pop()
        for field, value in message.ListFields():
            if field.name == "metadata_props":
                for entry in [entry for entry in value if entry.key.startswith(_STACK)]:
                    value.remove(entry)
            elif field.name == "doc_string":
                message.ClearField("doc_string")
            elif field.message_type is not None:
                left += [value] if hasattr(value, "ListFields") else value


def _name_batch(model: Any) -> None:
    """Call the number of images N."""
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_param = "N"


def _write_pt2(subject: ExportSubject, folder: Path) -> None:
    buffer = io.BytesIO()
    with silent():
        torch.export.save(subject.program, buffer, extra_files={EXTRA_FILE: subject.facts.model_dump_json()})
    (folder / "model.pt2").write_bytes(buffer.getvalue())


def _write_torchscript(subject: ExportSubject, folder: Path) -> None:
    buffer = io.BytesIO()
    try:
        with silent(), torch.no_grad():
            traced = torch.jit.trace(subject.network, example(subject.image_size), check_trace=False)
            torch.jit.save(traced, buffer, _extra_files={EXTRA_FILE: subject.facts.model_dump_json()})
    except Exception as error:  # torch.jit raises kinds without end
        raise ValueError(f"torch.jit does not follow this network: {printable(error):.300}") from None
    (folder / "model.torchscript").write_bytes(buffer.getvalue())


def _write_safetensors(subject: ExportSubject, folder: Path) -> None:
    save_safetensors(subject.loaded, folder / "model.safetensors")


def _write_plain(subject: ExportSubject, folder: Path) -> None:
    source = plain_source.source_of(subject.program, subject.facts)
    (folder / "model.py").write_text(source, encoding="utf-8")
    _write_safetensors(subject, folder)


WRITERS: dict[str, Callable[[ExportSubject, Path], None]] = {
    "onnx": _write_onnx,
    "pt2": _write_pt2,
    "torchscript": _write_torchscript,
    "safetensors": _write_safetensors,
    "plain": _write_plain,
}
assert WRITERS.keys() == FORMATS.keys()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing reaches standard output or standard error either: the exporter prints its steps."""
    with silent(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
