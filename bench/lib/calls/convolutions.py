"""A network's own convolutions, run alone: the speed that a training step is measured by."""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.lib.timing import Call
from engine.config import RunConfig
from engine.methods import Method
from engine.models.layers import ImageConv2d
from engine.training import plan

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = COMPUTATIONS = ("forward", "input gradient", "weight gradient")


class Layer(NamedTuple):
    """A convolution at one size. images: it sees the image itself, and runs in float32."""

    input_BCHW: tuple[int, ...]
    weight_OIHW: tuple[int, ...]
    stride: int
    padding: int
    groups: int
    images: bool


class Work(NamedTuple):
    """One of the three computations of a convolution."""

    layer: Layer
    kind: str


def layers(network: nn.Module, images_BCHW: tuple[int, ...]) -> Counter[Layer]:
    """The convolutions of a forward pass, and how many there are of each."""
    found: Counter[Layer] = Counter()

    def note(module: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        stride, padding = module.stride[0], module.padding[0]
        assert isinstance(padding, int)
        shape = tuple(inputs[0].shape)
        is_first = isinstance(module, ImageConv2d)
        found[Layer(shape, tuple(module.weight.shape), stride, padding, module.groups, is_first)] += 1

    meta = copy.deepcopy(network).to("meta")
    for module in meta.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    meta(torch.empty(images_BCHW, device="meta"))
    return found


def of_step(found: Mapping[Layer, int], method: Method, run: RunConfig) -> Counter[Work]:
    """Number of runs of each computation in a step of the engine; student and teachers have the same layers."""
    attacked, trained, forward = plan.passes(method, run.attack, run.forwards)
    work: Counter[Work] = Counter()
    for layer, count in found.items():
        work[Work(layer, FORWARD)] += count * (attacked + trained + forward)
        work[Work(layer, INPUT_GRADIENT)] += count * (attacked + trained * (not layer.images))
        work[Work(layer, WEIGHT_GRADIENT)] += count * trained
    return work


def flops(work: Work) -> int:
    """2 B C_out H_out W_out (C_in / groups) k^2 in each of the three."""
    _, per_group, kernel, _ = work.layer.weight_OIHW
    return 2 * math.prod(output(work.layer)) * per_group * kernel**2


def output(layer: Layer) -> tuple[int, ...]:
    """Shape of what a convolution gives: (B, C, H, W)."""
    batch, _, *sides = layer.input_BCHW
    out, _, kernel, _ = layer.weight_OIHW
    return batch, out, *((side + 2 * layer.padding - kernel) // layer.stride + 1 for side in sides)


def numbers(layer: Layer) -> int:
    """Numbers in input, weight and output together: each computation reads two of them and makes the third."""
    return sum(map(math.prod, (layer.input_BCHW, layer.weight_OIHW, output(layer))))


def call(
    work: Work, dtype: torch.dtype, device: torch.device, layout: torch.memory_format = torch.channels_last
) -> Call:
    """Run it on random values, the incoming gradient too: on ones a GPU draws less power and is faster."""
    layer = work.layer
    x, weight = (random(shape, dtype, device, layout) for shape in (layer.input_BCHW, layer.weight_OIHW))
    stride, padding = [layer.stride] * 2, [layer.padding] * 2
    forward = functools.partial(
        torch.ops.aten.convolution, x, weight, None, stride, padding, [1, 1], False, [0, 0], layer.groups
    )
    if work.kind == FORWARD:
        return forward
    mask = [work.kind == INPUT_GRADIENT, work.kind == WEIGHT_GRADIENT, False]
    return functools.partial(
        torch.ops.aten.convolution_backward,
        torch.randn_like(forward()), x, weight, None, stride, padding, [1, 1], False, [0, 0], layer.groups, mask,
    )  # fmt: skip


def random(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: torch.memory_format
) -> Tensor:
    """Tensor of standard normal numbers."""
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)


def seconds(work: Mapping[Work, int], one: Mapping[Work, float]) -> float:
    """Seconds of a step's convolutions alone. one: seconds of each."""
    return sum(count * one[kind] for kind, count in work.items())


def calls(found: Iterable[Layer], dtype: torch.dtype, device: torch.device) -> dict[Work, Call]:
    """Every computation of the layers, channels-last; the first layer in float32 whatever the dtype."""
    return {
        work: call(work, torch.float32 if layer.images else dtype, device)
        for layer in found
        for work in (Work(layer, kind) for kind in COMPUTATIONS)
    }
