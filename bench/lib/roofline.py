"""Roofline: the seconds that kernels of known operations and bytes need on a device of given peaks."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from bench.lib.timing import Call, repeated
from engine.system.precision import Precision

# Rows and columns of a tile of a matrix product, either way round.
TILES = ((256, 128), (128, 128), (256, 64))


class Product(NamedTuple):
    """Size of the result of `groups` matrix products, in tiles. is_split: sums are divided over all processors."""

    rows: int
    columns: int
    groups: int = 1
    is_split: bool = False

    def efficiency(self, processors: int) -> float:
        """Values of the result by those that the tiles' waves have room for, with the best of the tiles."""

        def with_tile(rows: int, columns: int) -> float:
            tiles = self.groups * math.ceil(self.rows / rows) * math.ceil(self.columns / columns)
            waves = tiles / processors if self.is_split else math.ceil(tiles / processors)
            return self.groups * self.rows * self.columns / (waves * processors * rows * columns)

        return max(with_tile(*size) for tile in TILES for size in (tile, tile[::-1]))


class Op(NamedTuple):
    """One kernel: floating-point operations of convolutions and matrix products, bytes moved, format."""

    name: str
    flops: float
    bytes: float
    dtype: torch.dtype
    product: Product | None = None


@dataclass(frozen=True)
class Hardware:
    """Peaks of a device. flops: dense, by format, per second. bandwidth: bytes a second.

    launch, node: seconds that a kernel takes at least, launched by the host, and as a node of a CUDA graph.
    reached, sustained: the shares of both that full waves of tiles and other ops are assumed to reach.
    processors: streaming multiprocessors, over which tiles are divided; None: no loss by tiles is assumed.
    ieee_flops: of float32 without tensor cores.
    """

    name: str
    flops: dict[torch.dtype, float]
    bandwidth: float
    launch: float = 5e-6
    node: float = 1.6e-6
    reached: float = 0.6
    sustained: float = 0.85
    processors: int | None = None
    ieee_flops: float | None = None

    def without_tf32(self) -> Hardware:
        """The same, where products and convolutions in float32 are not rounded."""
        assert self.ieee_flops is not None
        return replace(self, flops=self.flops | {torch.float32: self.ieee_flops})

    def seconds(self, op: Op, *, launched: bool) -> float:
        """The longest of computing, moving and a node of a graph; launched: and of the host's launch of it."""
        computing = op.flops / (self.flops[op.dtype] * self.reached) if op.flops else 0.0
        if op.product is not None and self.processors is not None:
            computing /= op.product.efficiency(self.processors)
        longest = max(computing, op.bytes / (self.bandwidth * self.sustained), self.node)
        return max(longest, self.launch) if launched else longest


def _gpu(name: str, bf16: float, tf32: float, ieee: float, gigabytes: float, processors: int) -> Hardware:
    """Peaks in 10^12 a second, without sparsity; float32 convolutions run in TF32, as torch has it."""
    flops = {torch.bfloat16: bf16 * 1e12, torch.float32: tf32 * 1e12}
    return Hardware(name, flops, gigabytes * 1e9, processors=processors, ieee_flops=ieee * 1e12)


# From NVIDIA's data sheets of each product.
GPUS = {
    "h100": _gpu("H100 SXM", 989.4, 494.7, 66.9, 3350, 132),
    "a100": _gpu("A100 SXM 80 GB", 312, 156, 19.5, 2039, 108),
    "l4": _gpu("L4", 121, 60.5, 30.3, 300, 58),
    "rtx4090": _gpu("GeForce RTX 4090", 165.2, 82.6, 82.6, 1008, 128),
}


def seconds(ops: Iterable[Op], hardware: Hardware, *, launched: bool) -> float:
    """One op after the other."""
    return sum(hardware.seconds(op, launched=launched) for op in ops)


def launches_of_lists(sizes: Iterable[int], *, lists: int) -> int:
    """Kernels of torch's multi_tensor_apply with CUDA 12: each takes so many tensors, or 320 parts of 65,536."""
    launches = tensors = parts = 0
    for size in sizes:
        tensors += 1
        for _ in range(math.ceil(size / 65_536)):
            if parts == 320:
                launches, tensors, parts = launches + 1, 1, 0
            parts += 1
        if tensors == _TENSORS_AT_ONCE[lists]:
            launches, tensors, parts = launches + 1, 0, 0
    return launches + (tensors > 0)


_TENSORS_AT_ONCE = {2: 64, 3: 48}  # by the number of lists, from torch's ATen/native/cuda/MultiTensorApply.cuh


def share_of_convolutions(ops: Sequence[Op], hardware: Hardware) -> float:
    """Part of the time that goes into convolutions."""
    convolutions = [op for op in ops if "convolution" in op.name or "image_conv3x3" in op.name]
    return seconds(convolutions, hardware, launched=False) / seconds(ops, hardware, launched=False)


def measured_cpu(precision: Precision) -> Hardware:
    """Peaks of this processor: its best convolution in each format, and its copy; all of it counts as reached."""

    def best(call: Call) -> float:
        return min(repeated(call))

    flops = {}
    for dtype in {torch.float32, precision.amp_dtype or torch.float32}:
        x = torch.ones(32, 128, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.ones(128, 128, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
        needed = 2.0 * x.numel() * 128 * 9
        flops[dtype] = needed / best(functools.partial(torch.nn.functional.conv2d, x, weight, padding=1))
    source, target = torch.ones(2**25), torch.zeros(2**25)
    bandwidth = 2 * source.nbytes / best(lambda: target.copy_(source))
    small = torch.ones(8)
    launch = best(lambda: [small.add_(1) for _ in range(1000)]) / 1000
    return Hardware("this processor", flops, bandwidth, launch, 0.0, reached=1.0, sustained=1.0)
