"""ONNX models of 8 bits, by onnxruntime's quantisation."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.common import optional
from engine.common.errors import printable
from engine.deployment.artefacts.archives import NO_ONNX
from engine.deployment.artefacts.black_box import silent
from engine.deployment.artefacts.facts import ArtefactFacts
from engine.deployment.exporting.formats import INT8

_BATCH = 32


def quantize(model: Path, out: Path, facts: ArtefactFacts, images: Tensor | None) -> str:
    """Write a model of int8 beside one of float32; returns the scheme in words, which its metadata has too.

    images: (N, 3, H, W) in [0, 1], by whose activations the ranges are chosen (static, QDQ); None: weights alone
    are of 8 bits in the file, and the ranges are those of each batch (dynamic). Raises ValueError where
    onnxruntime cannot.
    """
    onnx = optional.load("onnx", missing=NO_ONNX)
    tools = optional.load("onnxruntime.quantization", missing=NO_ONNX)
    scheme = f"{INT8} (dynamic)" if images is None else f"{INT8} (static QDQ, {len(images)} images)"
    try:
        with _quiet(), tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "prepared.onnx"
            tools.shape_inference.quant_pre_process(str(model), str(prepared))
            if images is None:
                tools.quantize_dynamic(prepared, out, weight_type=tools.QuantType.QUInt8)
            else:
                tools.quantize_static(
                    prepared,
                    out,
                    _reader(tools, images),
                    quant_format=tools.QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=tools.QuantType.QUInt8,
                    weight_type=tools.QuantType.QInt8,
                )
    except Exception as error:  # onnxruntime raises kinds of its own
        raise ValueError(f"--quantize {INT8}: onnxruntime cannot: {printable(error):.300}") from None
    written = onnx.load(str(out))
    del written.metadata_props[:]
    for key, text in facts.model_copy(update={"quantized": scheme}).as_metadata().items():
        written.metadata_props.add(key=key, value=text)
    out.write_bytes(written.SerializeToString())
    return scheme


def _reader(tools: Any, images: Tensor) -> Any:
    """Calibration images in batches."""

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches: Iterator[Tensor] = iter(images.float().split(_BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch.contiguous().numpy()}

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    with silent(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
    logging.disable(before)
