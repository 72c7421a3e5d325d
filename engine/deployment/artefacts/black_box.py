"""Networks in exported files as black boxes: images to logits, by the runtime of their format.

Shape suffixes: B batch, C classes.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.common.optional import load
from engine.common.stopping import RunFailed
from engine.deployment.artefacts import archives
from engine.deployment.artefacts.facts import EXTRA_FILE, ArtefactFacts, from_json, from_metadata

_SIDES = (32, 224, 64)
"""Heights and widths that are tried where a file does not tell."""


class BlackBox(nn.Module):
    """Images (B, 3, H, W) in [0, 1] on any device to logits (B, C) in float32, by a runtime on the CPU.

    It has no parameters and no BatchNorm, so that nothing looks inside. order: of its outputs, None for their own.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], size: tuple[int, int] | None, format_name: str) -> None:
        super().__init__()
        self._run, self._size, self._format = run, size, format_name
        self.order: list[int] | None = None
        self.has_gradients = False

    def forward(self, images: Tensor) -> Tensor:
        """Logits. Raises ValueError for images of another size, and where gradients are asked for in vain."""
        if self._size is not None and tuple(images.shape[2:]) != self._size:
            (height, width), (given_height, given_width) = self._size, images.shape[2:]
            raise ValueError(
                f"the exported network takes images of {height}x{width}, got {given_height}x{given_width}"
            )
        if images.requires_grad and torch.is_grad_enabled() and not self.has_gradients:
            raise RunFailed(f"an exported file ({self._format}) has no gradients, and an attack asked for them")
        logits_BC = self._run(images.to("cpu", torch.float32).contiguous())
        if self.order is not None:
            logits_BC = logits_BC[:, self.order]
        return logits_BC.to(images.device)

    def probe(self) -> int:
        """The number of classes, seen on two random images; notes whether there are gradients.

        Raises ValueError where the network takes no images of any usual size.
        """
        sizes = [self._size] if self._size is not None else [(side, side) for side in _SIDES]
        generator = torch.Generator().manual_seed(0)
        reason: Exception | None = None
        for height, width in sizes:
            images = torch.rand(2, 3, height, width, generator=generator)
            try:
                with torch.no_grad():
                    logits_BC = self._run(images)
            except Exception as error:  # of whatever runtime
                reason = error
                continue
            if logits_BC.dim() != 2 or len(logits_BC) != 2 or logits_BC.shape[1] < 2:
                raise ValueError(
                    f"gives {tuple(logits_BC.shape)} for 2 images, and logits (2, classes) are expected"
                )
            self.has_gradients = self._differentiates(images)
            return int(logits_BC.shape[1])
        raise ValueError(f"cannot be run on 2 images (3, {sizes[0][0]}, {sizes[0][1]}): {_short(reason)}")

    def _differentiates(self, images: Tensor) -> bool:
        """True if the sum of squared logits has a gradient with respect to the images that is not zero."""
        images = images.clone().requires_grad_()
        try:
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(self._run(images).square().sum(), images)
        except RuntimeError:  # autograd's, for logits that depend on no image it knows
            return False
        return bool(gradient.isfinite().all() and gradient.any())


class ReadNetwork(NamedTuple):
    """A network from an exported file, with the facts in it; these are None where another program wrote it."""

    network: BlackBox
    facts: ArtefactFacts | None


def open_onnx(data: bytes) -> ReadNetwork:
    """An ONNX model, run by onnxruntime on the CPU. Raises ValueError, one line."""
    model = archives.check_onnx(data)
    runtime = load("onnxruntime", missing=archives.NO_ONNX)
    facts = from_metadata({entry.key: entry.value for entry in model.metadata_props})
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what matters is raised
    try:
        session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises kinds of its own
        raise ValueError(f"onnxruntime does not take it: {_short(error)}") from None
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        raise ValueError(
            "takes or gives other than one tensor: images float32 (N, 3, H, W) to logits are expected"
        )
    name, shape = inputs[0].name, inputs[0].shape
    size = (shape[2], shape[3]) if all(isinstance(side, int) for side in shape[2:]) else _size_of(facts)

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {name: images.detach().numpy()})
        return torch.from_numpy(logits)

    return ReadNetwork(BlackBox(run, size, "onnx"), facts)


def open_exported_program(data: bytes) -> ReadNetwork:
    """A program of torch.export. Raises ValueError, one line."""
    archives.check_exported_program(data)
    facts = _facts_in(data)
    try:
        with silent():
            module = torch.export.load(io.BytesIO(data)).module(check_guards=False)
    except Exception as error:  # a file of another version may raise anything
        raise ValueError(f"torch {torch.__version__} does not read it: {_short(error)}") from None
    return _opened(module, facts, "pt2")


def open_torchscript(data: bytes) -> ReadNetwork:
    """A TorchScript archive. Raises ValueError, one line."""
    archives.check_torchscript(data)
    facts = _facts_in(data)
    try:
        with silent():
            module = torch.jit.load(io.BytesIO(data), map_location="cpu").eval()
    except Exception as error:  # a file of another version may raise anything
        raise ValueError(f"torch {torch.__version__} does not read it: {_short(error)}") from None
    return _opened(module, facts, "torchscript")


def _opened(module: Any, facts: ArtefactFacts | None, format_name: str) -> ReadNetwork:
    for parameter in module.parameters():
        parameter.requires_grad_(False)

    def run(images: Tensor) -> Tensor:
        logits_BC = module(images)
        if not isinstance(logits_BC, Tensor):
            raise ValueError(f"gives {type(logits_BC).__name__}, and one tensor of logits is expected")
        return logits_BC.float()

    return ReadNetwork(BlackBox(run, _size_of(facts), format_name), facts)


def _facts_in(data: bytes) -> ArtefactFacts | None:
    text = archives.extra_file(data, EXTRA_FILE)
    return None if text is None else from_json(text)


def _size_of(facts: ArtefactFacts | None) -> tuple[int, int] | None:
    return None if facts is None else (facts.image_size[0], facts.image_size[1])


def _short(error: Exception | None) -> str:
    return " ".join(str(error).split())[:200]


@contextmanager
def silent() -> Iterator[None]:
    """Nothing of torch's exporters and readers is logged or warned inside."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


OPENERS: Mapping[str, Callable[[bytes], ReadNetwork]] = {
    "onnx": open_onnx,
    "pt2": open_exported_program,
    "torchscript": open_torchscript,
}
"""By the format of an exported file, as `tensor_files.exported_format` tells it."""
