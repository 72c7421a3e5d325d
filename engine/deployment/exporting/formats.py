"""Formats of exports, and how far each may be from the network that was exported. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from engine.common import optional
from engine.common.lookup import look_up

INT8 = "int8"
INT8_FILE = "model-int8.onnx"


class Tolerance(NamedTuple):
    """Distances that an exported file may have from the original.

    logits: max |difference| / max(1, max |logit|); None: any. same_class: least share of the images that get the
    same class. accuracy: most difference of an accuracy, natural or under attack, in [0, 1].
    """

    logits: float | None
    same_class: float
    accuracy: float


@dataclass(frozen=True)
class Format:
    """A format of exported files.

    files: that it writes. packages: modules that it needs beside torch. loading: lines of Python that load it.
    """

    name: str
    summary: str
    files: tuple[str, ...]
    packages: tuple[str, ...]
    tolerance: Tolerance
    loading: str

    @property
    def main(self) -> str:
        """The file that is loaded."""
        return self.files[0]


_SAME_OPERATIONS = Tolerance(logits=1e-5, same_class=1.0, accuracy=0.01)

_LOAD_ONNX = """\
import numpy, onnxruntime
session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
images = numpy.zeros((1, 3, {height}, {width}), numpy.float32)  # RGB in [0, 1]
(logits,) = session.run(None, {{"images": images}})"""
_LOAD_PT2 = """\
import torch
network = torch.export.load("{file}").module()
images = torch.zeros(1, 3, {height}, {width})  # RGB in [0, 1]
logits = network(images)"""
_LOAD_TORCHSCRIPT = """\
import torch
network = torch.jit.load("{file}")
images = torch.zeros(1, 3, {height}, {width})  # RGB in [0, 1]
logits = network(images)"""
_LOAD_SAFETENSORS = """\
import engine, torch
network = engine.load_model("{file}").module
images = torch.zeros(1, 3, {height}, {width})  # RGB in [0, 1]
logits = network(images)"""
_LOAD_PLAIN = """\
import torch
from model import load
network = load("model.safetensors")  # or in a shell: python model.py IMAGE.png
logits = network(torch.zeros(1, 3, {height}, {width}))  # RGB in [0, 1]"""

FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format(
            "onnx",
            "for onnxruntime and every other runtime of ONNX",
            ("model.onnx",),
            ("onnx", "onnxscript", "onnxruntime"),
            Tolerance(logits=1e-4, same_class=0.995, accuracy=0.01),
            _LOAD_ONNX,
        ),
        Format("pt2", "torch.export's, for torch alone", ("model.pt2",), (), _SAME_OPERATIONS, _LOAD_PT2),
        Format(
            "torchscript", "for libtorch in C++", ("model.torchscript",), (), _SAME_OPERATIONS, _LOAD_TORCHSCRIPT
        ),
        Format(
            "safetensors",
            "weights and facts, for engine",
            ("model.safetensors",),
            (),
            Tolerance(logits=0.0, same_class=1.0, accuracy=0.0),
            _LOAD_SAFETENSORS,
        ),
        Format(
            "plain",
            "a readable file of Python that needs torch and safetensors alone",
            ("model.py", "model.safetensors"),
            (),
            _SAME_OPERATIONS,
            _LOAD_PLAIN,
        ),
    )
}
"""What `engine export --format` writes."""
QUANTIZED = Format(
    f"onnx {INT8}",
    "the same with weights and activations of 8 bits",
    (INT8_FILE,),
    ("onnx", "onnxruntime"),
    Tolerance(logits=None, same_class=0.9, accuracy=0.03),
    _LOAD_ONNX,
)
NO_PACKAGES = "--format {name}: {package} is not there: pip install 'iad-engine[export]' ({reason})"


def wanted(text: str) -> tuple[Format, ...]:
    """The formats of a list "onnx,pt2". Raises ValueError for unknown ones."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--format: name at least one of {', '.join(FORMATS)}")
    return tuple(look_up("--format", name, FORMATS) for name in dict.fromkeys(names))


def check_installed(formats: Iterable[Format]) -> None:
    """Raise ValueError where the packages of a format are absent."""
    for entry in formats:
        for package in entry.packages:
            optional.load(package, missing=NO_PACKAGES.replace("{name}", entry.name).replace("{package}", package))


def loading(entry: Format, image_size: tuple[int, int]) -> str:
    """Lines that load a file of this format, for images (height, width)."""
    return entry.loading.format(file=entry.main, height=image_size[0], width=image_size[1])
