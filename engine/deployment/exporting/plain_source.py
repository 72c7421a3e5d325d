"""Source code of a network: its operations as plain calls of torch, which need no engine."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from engine.deployment.artefacts.facts import ArtefactFacts

_MOST_NUMBERS = 4096
"""Numbers of a constant tensor that stand in the source."""
_PREFIX = "network."

_CALLS: dict[str, str] = {
    "aten.conv2d.default": "F.conv2d",
    "aten.linear.default": "F.linear",
    "aten.relu.default": "F.relu",
    "aten.relu6.default": "F.relu6",
    "aten.silu.default": "F.silu",
    "aten.gelu.default": "F.gelu",
    "aten.hardtanh.default": "F.hardtanh",
    "aten.max_pool2d.default": "F.max_pool2d",
    "aten.avg_pool2d.default": "F.avg_pool2d",
    "aten.adaptive_avg_pool2d.default": "F.adaptive_avg_pool2d",
    "aten.scaled_dot_product_attention.default": "F.scaled_dot_product_attention",
    "aten.mean.dim": "torch.mean",
    "aten.flatten.using_ints": "torch.flatten",
    "aten.cat.default": "torch.cat",
    "aten.sigmoid.default": "torch.sigmoid",
    "aten.matmul.default": "torch.matmul",
    "aten.permute.default": "torch.permute",
    "aten.reshape.default": "torch.reshape",
    "aten.transpose.int": "torch.transpose",
}
"""Functions of torch that take what the operation takes, in the same order."""
_IN_PLACE = {
    "aten.relu_.default": "F.relu",
    "aten.silu_.default": "F.silu",
    "aten.hardtanh_.default": "F.hardtanh",
}
"""The same of operations that write where they read: another line may read that tensor again."""
_INFIX = {
    "aten.add.Tensor": "+",
    "aten.sub.Tensor": "-",
    "aten.mul.Tensor": "*",
    "aten.div.Tensor": "/",
}
_LEFT_OUT = ("aten._assert_tensor_metadata.default", "aten.sym_constrain_range_for_size.default")
"""Checks, of which nothing is read."""
_SAME = ("aten.dropout.default", "aten.feature_dropout.default")
"""Operations that give what they are given, in evaluation."""
_SYMBOLS: dict[Any, str] = {
    operator.mul: "*", operator.add: "+", operator.sub: "-", operator.floordiv: "//", operator.mod: "%",
}  # fmt: skip


def source_of(program: ExportedProgram, facts: ArtefactFacts) -> str:
    """A module of Python: Network, load, predict, and a command line.

    Its weights are a safetensors file of the network's state dict. Raises ValueError for a network that holds
    tensors beside those.
    """
    body = "\n".join(f"        {line}" if line else "" for line in _Writer(program).lines())
    height, width = facts.image_size
    names = facts.class_names or [str(number) for number in range(facts.num_classes)]
    return _TEMPLATE.format(
        model=_as_text(facts.model),
        dataset=_as_text(facts.dataset or "unknown data"),
        engine=_as_text(facts.made_by.get("engine", "")),
        sha256=_as_text(facts.checkpoint.sha256),
        names=_listed(names),
        height=height,
        width=width,
        epsilon=facts.epsilon,
        threat_model=facts.threat_model,
        classes=facts.num_classes,
        body=body,
    )


def _as_text(text: str) -> str:
    """Text for a docstring or a comment, which no name that a stranger's file tells may leave."""
    return re.sub(r"[^A-Za-z0-9_ .:/+-]", "?", text)[:200]


def _listed(names: Sequence[str]) -> str:
    return "".join(f"    {json.dumps(name)},\n" for name in names)


class _Writer:
    """Writes a program's operations as lines of Python."""

    def __init__(self, program: ExportedProgram) -> None:
        self._graph = program.graph
        signature = program.graph_signature
        self._weights: dict[str, str] = {
            **signature.inputs_to_parameters,
            **{
                name: buffer
                for name, buffer in signature.inputs_to_buffers.items()
                if buffer not in signature.non_persistent_buffers
            },
        }
        constants: Mapping[str, Any] = {
            **signature.inputs_to_lifted_tensor_constants,
            **{
                name: buffer
                for name, buffer in signature.inputs_to_buffers.items()
                if buffer in signature.non_persistent_buffers
            },
        }
        self._constants = {name: program.constants[target] for name, target in constants.items()}
        self._names: dict[str, str] = {}
        self._block = ""

    def lines(self) -> list[str]:
        """Lines of the forward's body."""
        found: list[str] = []
        used = {argument for node in self._graph.nodes for argument in node.all_input_nodes}
        for node in self._graph.nodes:
            if node.op == "placeholder":
                found += self._placeholder(node, is_used=node in used)
            elif node.op == "call_function":
                found += self._call(node)
            elif node.op == "output":
                (result,) = node.args[0]
                found.append(f"return {self._value(result)}")
            else:
                raise ValueError(f"plain: the program has {node.op} {node.target}, which is not known")
        return found

    def _placeholder(self, node: fx.Node, *, is_used: bool) -> list[str]:
        """Weights are read where they are used; constants become lines."""
        if node.name in self._weights:
            self._names[node.name] = f"w[{json.dumps(self._weights[node.name].removeprefix(_PREFIX))}]"
            return []
        if node.name not in self._constants:
            self._names[node.name] = "images"
            return []
        self._names[node.name] = node.name
        return [f"{node.name} = {_constant(self._constants[node.name])}.to(images.device)"] if is_used else []

    def _call(self, node: fx.Node) -> list[str]:
        name = str(node.target)
        if name in _LEFT_OUT:
            return []
        if name in _SAME or self._is_conversion_to_same(node):
            self._names[node.name] = self._value(node.args[0])
            return []
        self._names[node.name] = node.name
        return [*self._heading(node), f"{node.name} = {self._expression(node, name)}"]

    def _is_conversion_to_same(self, node: fx.Node) -> bool:
        """True for a conversion to the number format that the tensor has already."""
        if not str(node.target).startswith("aten.to.dtype"):
            return False
        given = node.args[0]
        return isinstance(given, fx.Node) and given.meta["val"].dtype == node.meta["val"].dtype

    def _heading(self, node: fx.Node) -> list[str]:
        """A comment where another block of the network begins."""
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        parts = stack[-1].split(".")[1:] if stack else []  # the first is the one that names the argument
        block = ".".join(parts[: 2 + (parts[:1] == ["network"])])  # a library's network has another one around it
        if not block or block == self._block:
            return []
        self._block = block
        return ["", f"# {_as_text(block)}"]

    def _expression(self, node: fx.Node, name: str) -> str:
        args, kwargs = list(node.args), dict(node.kwargs)
        if node.target in _SYMBOLS:
            return f" {_SYMBOLS[node.target]} ".join(self._value(argument) for argument in args)
        if name in _INFIX and len(args) == 2 and not kwargs:
            left, right = (self._value(argument) for argument in args)
            return f"{left} {_INFIX[name]} {right}"
        if name == "aten.sym_size.int":
            return f"{self._value(args[0])}.shape[{args[1]}]"
        if node.target is operator.getitem:
            return f"{self._value(args[0])}[{self._value(args[1])}]"
        if name == "aten.batch_norm.default":
            x, weight, bias, mean, variance, _, _, eps, *_ = (self._value(argument) for argument in args)
            return f"F.batch_norm({x}, {mean}, {variance}, {weight}, {bias}, eps={eps})"
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
            raise ValueError(f"plain: the operation {name} is none of torch's own")
        given = [self._value(argument) for argument in args]
        given += [f"{key}={self._value(value)}" for key, value in kwargs.items()]
        if name in _IN_PLACE:
            return f"{_IN_PLACE[name]}({', '.join(given)}, inplace=True)"
        return f"{_CALLS.get(name, f'torch.ops.{name}')}({', '.join(given)})"

    def _value(self, value: Any) -> str:
        """An argument as Python writes it."""
        if isinstance(value, fx.Node):
            return self._names[value.name]
        if isinstance(value, list | tuple):
            inner = ", ".join(map(self._value, value))
            return f"[{inner}]"
        if isinstance(value, torch.device):
            return "images.device"
        if value is None or isinstance(value, bool | int | float | str | torch.dtype):
            return _float(value) if isinstance(value, float) else repr(value)
        if isinstance(value, torch.layout | torch.memory_format):
            return str(value)
        raise ValueError(f"plain: an argument of the type {type(value).__name__} is not known")


def _float(value: float) -> str:
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def _constant(tensor: Tensor) -> str:
    if tensor.numel() > _MOST_NUMBERS:
        raise ValueError(
            f"plain: the network holds a tensor of {tensor.numel():,} numbers that is no weight; at most "
            f"{_MOST_NUMBERS:,} can stand in a source"
        )
    return f"torch.tensor({tensor.tolist()!r}, dtype={tensor.dtype})"


_TEMPLATE = '''"""{model}, trained on {dataset}: a network in plain torch, written by engine {engine}.

Needs torch and safetensors, and Pillow to read images. The operations below are those of the network in
evaluation mode, in order; `w` holds the tensors of model.safetensors. Checkpoint: sha256 {sha256}.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

CLASS_NAMES = (
{names})
HEIGHT, WIDTH = {height}, {width}
EPSILON, THREAT_MODEL = {epsilon!r}, {threat_model!r}  # of the training, in the units of images in [0, 1]


class Network(torch.nn.Module):
    """Images (N, 3, {height}, {width}), RGB in [0, 1], to logits (N, {classes}). Normalisation is inside."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in weights.items():
            *path, last = name.split(".")
            place = self
            for part in path:
                if part not in dict(place.named_children()):
                    place.add_module(part, torch.nn.Module())
                place = place.get_submodule(part)
            place.register_buffer(last, tensor)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        w = dict(self.named_buffers())
{body}


def load(path: str | Path = Path(__file__).with_name("model.safetensors")) -> Network:
    """The network with its weights."""
    weights = load_file(path)
    return Network({{name: w.float() if w.is_floating_point() else w for name, w in weights.items()}})


@torch.no_grad()
def predict(network: Network, images: torch.Tensor) -> list[tuple[str, float]]:
    """Class name and probability of each image."""
    probabilities, classes = network(images).softmax(dim=1).max(dim=1)
    return [(CLASS_NAMES[index], float(share)) for index, share in zip(classes.tolist(), probabilities)]


def read_image(path: str | Path) -> torch.Tensor:
    """An image file as (1, 3, {height}, {width}) in [0, 1], resized where it has another size."""
    from PIL import Image

    with Image.open(path) as image:
        image = image.convert("RGB")
        if image.size != (WIDTH, HEIGHT):
            image = image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(1, HEIGHT, WIDTH, 3).permute(0, 3, 1, 2).float() / 255


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python model.py IMAGE...")
    network = load()
    for name in sys.argv[1:]:
        ((label, share),) = predict(network, read_image(name))
        print(f"{{name}}: {{label}} ({{share:.1%}})")
'''
