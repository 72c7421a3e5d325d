"""Calls that `bench.peaks` times: copies, matrix products, a network's convolutions and BatchNorms, each alone."""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bench.lib.calls import convolutions, op_cases
from bench.lib.calls.convolutions import COMPUTATIONS, FORWARD, Layer, Work
from bench.lib.calls.op_cases import COPY
from bench.lib.timing import Call
from engine.system import precision

MATMUL, CONVOLUTION, STEM, BATCH_NORM = "matmul", "convolution", "stem", "batch norm"
BACKWARD = "backward"


class NumberFormat(NamedTuple):
    """Format of numbers and of their products. tf32: products of float32 may round to TF32; else it is IEEE's."""

    name: str
    dtype: torch.dtype
    tf32: bool = False


BFLOAT16, FLOAT16 = NumberFormat("bfloat16", torch.bfloat16), NumberFormat("float16", torch.float16)
FLOAT32, TF32 = NumberFormat("float32", torch.float32), NumberFormat("tf32", torch.float32, tf32=True)

LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
CHANNELS_LAST, CONTIGUOUS = LAYOUTS

# How cuDNN chooses an algorithm: (torch.backends.cudnn.deterministic, .benchmark).
PLANS = {"deterministic": (True, False), "heuristic": (False, False), "benchmark": (False, True)}
DETERMINISTIC, HEURISTIC, BENCHMARK = PLANS


@dataclass(frozen=True)
class PeakCase:
    """One thing to time.

    make: operands on the device, and the call that uses them. bytes_moved: each operand once. flops: None where
    memory decides. times: how often a step of IAD-I runs a convolution, or a forward pass a BatchNorm. cached: the
    operands may stay in the cache from one call to the next.
    """

    op: str
    kind: str
    shape: str
    make: Callable[[], Call] = field(repr=False)
    bytes_moved: int
    format: NumberFormat = FLOAT32
    layout: str = ""
    plan: str = ""
    flops: int | None = None
    times: int | None = None
    cached: bool = False

    @property
    def name(self) -> str:
        """Name of the case in a line of output."""
        parts = (self.op, self.kind, self.shape, self.format.name, self.layout, self.plan)
        return " ".join(filter(None, parts))


@dataclass(frozen=True)
class PeakSetting:
    """Device, sizes and number of repetitions.

    rows: of the square matrices. beyond_bytes: operands as large lie beyond the cache. rounds: at most.
    sample_s: seconds of a case in a round.
    """

    device: torch.device
    rows: int
    beyond_bytes: int
    rounds: int = 15
    sample_s: float = 0.01

    @property
    def formats(self) -> tuple[NumberFormat, ...]:
        """Formats of matrix products and of the first convolution."""
        if self.device.type == "cuda":
            return (BFLOAT16, FLOAT16, TF32, FLOAT32)
        return (FLOAT32, BFLOAT16, FLOAT16)

    @property
    def passes(self) -> tuple[NumberFormat, ...]:
        """Formats of the other convolutions: on a GPU those of AMP."""
        return (BFLOAT16, FLOAT16) if self.device.type == "cuda" else self.formats

    @property
    def plans(self) -> tuple[str, ...]:
        """Ways to choose an algorithm; without cuDNN there is nothing to choose."""
        return tuple(PLANS) if self.device.type == "cuda" else ("",)


def groups(
    layers: Mapping[Layer, int],
    norms: Mapping[tuple[int, ...], int],
    work: Mapping[Work, int],
    setting: PeakSetting,
) -> list[list[PeakCase]]:
    """Everything, in groups that take turns; what decides most comes first, as time may run out.

    layers, norms: of a forward pass, with their numbers. work: of a step.
    """
    first, *others = setting.passes
    return [
        _copies(setting),
        _products(setting),
        *_convolutions(layers, work, setting, first),
        *_stem(layers, work, setting),
        *_norms(norms, setting),
        *(group for form in others for group in _convolutions(layers, work, setting, form)),
    ]


def norms(network: nn.Module, images_BCHW: tuple[int, ...]) -> Counter[tuple[int, ...]]:
    """Shapes of the inputs of a forward pass's BatchNorms, and how many there are of each."""
    found: Counter[tuple[int, ...]] = Counter()
    meta = copy.deepcopy(network).to("meta")
    for module in meta.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(lambda _, inputs: found.update([tuple(inputs[0].shape)]))
    meta(torch.empty(images_BCHW, device="meta"))
    return found


def _copies(setting: PeakSetting) -> list[PeakCase]:
    """Two sizes within the cache and two beyond it, the largest last."""
    sizes = [(setting.beyond_bytes // 16, True), (setting.beyond_bytes // 4, True)]
    sizes += [(setting.beyond_bytes, False), (4 * setting.beyond_bytes, False)]
    return [
        PeakCase(
            COPY,
            "within the cache" if cached else "beyond the cache",
            f"{size / 2**20:g} MiB",
            functools.partial(op_cases.copy, size, setting.device),
            size,
            cached=cached,
        )
        for size, cached in sizes
    ]


def _products(setting: PeakSetting) -> list[PeakCase]:
    rows = setting.rows
    shape = f"{rows}x{rows}x{rows}"

    def make(dtype: torch.dtype) -> Call:
        a, b = (torch.randn(rows, rows, device=setting.device).to(dtype) for _ in range(2))
        return functools.partial(torch.mm, a, b)

    return [
        PeakCase(
            MATMUL, FORWARD, shape, functools.partial(make, form.dtype), 3 * rows**2 * form.dtype.itemsize, form,
            flops=2 * rows**3,
        )
        for form in setting.formats
    ]  # fmt: skip


def _convolutions(
    layers: Mapping[Layer, int], work: Mapping[Work, int], setting: PeakSetting, form: NumberFormat
) -> Iterator[list[PeakCase]]:
    for layer in layers:
        for kind in COMPUTATIONS if not layer.images else ():
            yield [
                _convolution(CONVOLUTION, Work(layer, kind), work, setting, form, plan) for plan in setting.plans
            ]


def _stem(layers: Mapping[Layer, int], work: Mapping[Work, int], setting: PeakSetting) -> Iterator[list[PeakCase]]:
    """The convolution that sees the images, in every format and layout."""
    ways = [(CHANNELS_LAST, plan) for plan in setting.plans] + [(CONTIGUOUS, setting.plans[0])]
    for layer in layers:
        for kind in COMPUTATIONS if layer.images else ():
            yield [
                _convolution(STEM, Work(layer, kind), work, setting, form, plan, layout)
                for form in setting.formats
                for layout, plan in ways
            ]


def _convolution(
    op: str,
    one: Work,
    work: Mapping[Work, int],
    setting: PeakSetting,
    form: NumberFormat,
    plan: str,
    layout: str = CHANNELS_LAST,
) -> PeakCase:
    layer = one.layer
    return PeakCase(
        op,
        one.kind,
        f"{_by(layer.input_BCHW)}, {_by(layer.weight_OIHW)}, stride {layer.stride}",
        functools.partial(convolutions.call, one, form.dtype, setting.device, LAYOUTS[layout]),
        convolutions.numbers(layer) * form.dtype.itemsize,
        form,
        layout,
        plan,
        convolutions.flops(one),
        work[one],
    )


def _norms(norms: Mapping[tuple[int, ...], int], setting: PeakSetting) -> Iterator[list[PeakCase]]:
    """BatchNorms in train mode: forward reads one array and writes one, backward reads two and writes one."""
    for shape, times in norms.items():
        for kind, arrays in ((FORWARD, 2), (BACKWARD, 3)):
            yield [
                PeakCase(
                    BATCH_NORM,
                    kind,
                    _by(shape),
                    functools.partial(_norm, kind, shape, form.dtype, setting.device, LAYOUTS[layout]),
                    arrays * math.prod(shape) * form.dtype.itemsize,
                    form,
                    layout,
                    times=times,
                )
                for form in (BFLOAT16, FLOAT32)
                for layout in LAYOUTS
            ]


def _norm(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: torch.memory_format
) -> Call:
    """BatchNorm as under autocast: statistics and parameters are float32 whatever the input is."""
    x = convolutions.random(shape, dtype, device, layout).requires_grad_()
    weight, bias = (torch.randn(shape[1], device=device, requires_grad=True) for _ in range(2))
    mean, variance = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)

    def forward() -> Tensor:
        return F.batch_norm(x, mean, variance, weight, bias, training=True)

    if kind == FORWARD:
        return forward
    y = forward()
    incoming = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, (x, weight, bias), incoming, retain_graph=True)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@contextmanager
def settled(case: PeakCase) -> Iterator[None]:
    """Inside, TF32 and how cuDNN chooses are the case's; where it names no plan, cuDNN chooses as in training."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = PLANS[case.plan or DETERMINISTIC]
    try:
        with precision.full_precision():  # which puts back, afterwards, what is set here too
            if case.format.tf32:
                torch.backends.cuda.matmul.allow_tf32 = cudnn.allow_tf32 = True
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
