"""Roofline: operations and bytes of a pass's ops, and the seconds that they need on a device of given peaks.

Nothing is computed: the passes run on fake tensors, through the engine's own twins and layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.lib.timing import Call, repeated
from engine import models
from engine.attacks.twin import Twin
from engine.system.precision import Precision

# Ops that launch nothing: they only look at memory, or hand it out.
FREE = ("prim::device", "aten::empty", "aten::detach", "aten::alias", "aten::lift_fresh", "aten::_unsafe_view")


# How many of its first arguments BatchNorm reads twice, for its sums and to apply them, and its flag of training.
_READ_TWICE = {"aten::native_batch_norm": (1, 5), "aten::native_batch_norm_backward": (2, 7)}


class Op(NamedTuple):
    """One op: floating-point operations of convolutions and matrix products, bytes read and written, format."""

    name: str
    flops: float
    bytes: float
    dtype: torch.dtype


@dataclass(frozen=True)
class Hardware:
    """Peaks of a device. flops: dense, by format, per second. bandwidth: bytes a second.

    launch, node: seconds that a kernel takes at least, launched by the host, and as a node of a CUDA graph.
    reached, sustained: the shares of both that convolutions and other ops are assumed to reach.
    """

    name: str
    flops: dict[torch.dtype, float]
    bandwidth: float
    launch: float = 5e-6
    node: float = 1.6e-6
    reached: float = 0.6
    sustained: float = 0.85

    def seconds(self, op: Op, *, launched: bool) -> float:
        """The longest of computing, moving and a node of a graph; launched: and of the host's launch of it."""
        computing = op.flops / (self.flops[op.dtype] * self.reached) if op.flops else 0.0
        longest = max(computing, op.bytes / (self.bandwidth * self.sustained), self.node)
        return max(longest, self.launch) if launched else longest


def _gpu(name: str, bf16: float, tf32: float, gigabytes: float) -> Hardware:
    """Tensor peaks in 10^12 a second, without sparsity; float32 convolutions run in TF32, as torch has it."""
    return Hardware(name, {torch.bfloat16: bf16 * 1e12, torch.float32: tf32 * 1e12}, gigabytes * 1e9)


# From NVIDIA's data sheets of each product.
GPUS = {
    "h100": _gpu("H100 SXM", 989.4, 494.7, 3350),
    "a100": _gpu("A100 SXM 80 GB", 312, 156, 2039),
    "l4": _gpu("L4", 121, 60.5, 300),
    "rtx4090": _gpu("GeForce RTX 4090", 165.2, 82.6, 1008),
}


class _Recorder(TorchDispatchMode):
    """Notes the ops that are run inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if not func.is_view and name not in FREE:
            moved = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            count = flop_registry.get(func.overloadpacket)
            flops = float(count(*args, **kwargs, out_val=out)) if count else 0.0
            dtype = next((tensor.dtype for tensor in moved), torch.float32)
            moved += _read_again(name, args)
            self.ops.append(Op(name, flops, float(sum(map(_bytes, moved))), dtype))
        return out


def _read_again(name: str, args: Any) -> list[Tensor]:
    """Tensors among the first arguments that an op reads a second time, too large to be in a cache still."""
    count, flag = _READ_TWICE.get(name, (0, 0))
    return list(args[:count]) if count and args[flag] else []


def _bytes(tensor: Tensor) -> int:
    """Bytes of the memory behind a tensor: less than its values where it is expanded."""
    return int(min(tensor.numel() * tensor.dtype.itemsize, tensor.untyped_storage().nbytes()))


class PassOps(NamedTuple):
    """Ops of one pass of each kind, as `training.plan.Passes` counts them, and bytes kept for a backward."""

    attacked: list[Op]
    trained: list[Op]
    forward: list[Op]
    kept_attacked: int
    kept_trained: int
    parameters: int


def passes(model: str, batch_size: int, precision: Precision, *, bn: str, size: int = 32) -> PassOps:
    """The passes of a model. bn: BatchNorm's mode in the attack; teachers are folded."""
    student = precision.place(models.build(model, 10))
    attacked, teacher = Twin(student, bn, precision), Twin(student, "eval", precision)
    weights = list(student.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True):
        shape = (batch_size, 3, size, size)
        images = torch.empty(shape).contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(batch_size, dtype=torch.int64)

        def loss(logits: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(logits.float(), labels)

        def attack() -> Tensor:
            return loss(attacked(images.requires_grad_()))

        def train() -> Tensor:
            with precision.autocast():
                return loss(student(images.detach()))

        attacked_ops, kept_attacked = _recorded(attack, lambda value: torch.autograd.grad(value, images))
        trained_ops, kept_trained = _recorded(train, lambda value: torch.autograd.grad(value, weights))
        with torch.no_grad():
            forward_ops, _ = _recorded(lambda: teacher(images), lambda _: None)
    parameters = sum(value.numel() for value in weights)
    return PassOps(attacked_ops, trained_ops, forward_ops, kept_attacked, kept_trained, parameters)


def _recorded(forward: Callable[[], Tensor], backward: Callable[[Tensor], object]) -> tuple[list[Op], int]:
    """Ops of both, and the bytes of all memory that the forward left for the backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with _Recorder() as recorder:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = forward()
        backward(value)
    return recorder.ops, sum(kept.values())


def seconds(ops: Iterable[Op], hardware: Hardware, *, launched: bool) -> float:
    """One op after the other."""
    return sum(hardware.seconds(op, launched=launched) for op in ops)


def seconds_at_least(ops: Iterable[Op], hardware: Hardware, least: float) -> float:
    """One op after the other, none shorter than so many seconds."""
    return sum(max(hardware.seconds(op, launched=False), least) for op in ops)


def share_of_convolutions(ops: Sequence[Op], hardware: Hardware) -> float:
    """Part of the time that goes into convolutions."""
    convolutions = [op for op in ops if "convolution" in op.name]
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
    source = torch.ones(2**25)
    bandwidth = 2 * source.nbytes / best(lambda: torch.empty_like(source).copy_(source))
    small = torch.ones(8)
    launch = best(lambda: [small.add_(1) for _ in range(1000)]) / 1000
    return Hardware("this processor", flops, bandwidth, launch, 0.0, reached=1.0, sustained=1.0)
