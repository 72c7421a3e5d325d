"""The kernels of a network's passes, with operations and bytes, as the engine's own twins and layers call them.

Nothing is computed: the passes run on fake tensors. What differs between processor and GPU is in `Execution`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.lib.roofline import Op, Product
from engine import models
from engine.attacks.twin import Twin
from engine.kernels import dispatch, fab_step, image_conv3x3
from engine.models import layers
from engine.system.precision import Precision
from engine.training.weights.half_weights import HalfWeights

# Ops that launch nothing: they only look at memory, or hand it out.
FREE = (
    "prim::device", "aten::empty", "aten::detach", "aten::alias", "aten::lift_fresh", "aten::_unsafe_view",
    "profiler::_record_function_enter_new", "profiler::_record_function_exit",
)  # fmt: skip
# How many of its first arguments torch's BatchNorm reads twice, to sum and to apply, and its flag of training.
_READ_TWICE = {"aten::native_batch_norm": (1, 5), "aten::native_batch_norm_backward": (2, 7)}
_COPIES = ("aten::_to_copy", "aten::clone", "aten::copy_")  # pointwise, too

Call = tuple[Any, Any, Any]
"""Arguments, keywords and results of an op."""


class Execution(NamedTuple):
    """Implementations that run the passes.

    fused_norm: BatchNorm, addition and ReLU are the engine's op. stem: format of the products of its op of the
    normalisation and the first convolution; None: torch's run. separate_bias: a convolution's bias is added by a
    kernel of its own, as with cuDNN. compiled: pointwise ops in a row, on as many values, are one kernel.
    """

    fused_norm: bool
    stem: torch.dtype | None
    separate_bias: bool
    compiled: bool

    @staticmethod
    def gpu(*, compiled: bool) -> Execution:
        """A GPU that is not here, with Triton."""
        norm, stem = (dispatch.preference(op) != "reference" for op in ("batch_norm", "image_conv3x3"))
        return Execution(norm, torch.bfloat16 if stem else None, separate_bias=True, compiled=compiled)

    @staticmethod
    def plain() -> Execution:
        """A GPU that is not here, with torch's own ops."""
        return Execution(fused_norm=False, stem=None, separate_bias=True, compiled=False)

    @staticmethod
    def cpu() -> Execution:
        """The processor at hand, with the implementations that it has."""
        device = torch.device("cpu")
        norm, stem = (dispatch.choose(op, device) != "reference" for op in ("batch_norm", "image_conv3x3"))
        return Execution(norm, torch.float32 if stem else None, separate_bias=False, compiled=False)


class PassOps(NamedTuple):
    """Kernels of one pass of each kind, as `training.plan.Passes` counts them, and bytes kept for a backward.

    sizes: of each parameter. images: values of a batch.
    """

    attacked: list[Op]
    trained: list[Op]
    forward: list[Op]
    kept_attacked: int
    kept_trained: int
    sizes: tuple[int, ...]
    images: int

    @property
    def parameters(self) -> int:
        return sum(self.sizes)


def passes(
    model: str, batch_size: int, precision: Precision, execution: Execution, *, bn: str, size: int = 32
) -> PassOps:
    """The passes of a model. bn: BatchNorm's mode in the attack; teachers are folded."""
    student = precision.place(models.build(model, 10))
    attacked, teacher = Twin(student, bn, precision), Twin(student, "eval", precision)
    in_half: AbstractContextManager[None] = nullcontext()
    if precision.amp_dtype is not None:
        in_half = HalfWeights(student, precision.amp_dtype).in_place()
    with in_half, FakeTensorMode(allow_non_fake_inputs=True), _own_ops(execution):
        weights = list(student.parameters())
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

        attacked_ops, kept_attacked = _recorded(
            execution, attack, lambda value: torch.autograd.grad(value, images)
        )
        trained_ops, kept_trained = _recorded(execution, train, lambda value: torch.autograd.grad(value, weights))
        with torch.no_grad():
            forward_ops, _ = _recorded(execution, lambda: teacher(images), lambda _: None)
    sizes = tuple(value.numel() for value in weights)
    return PassOps(attacked_ops, trained_ops, forward_ops, kept_attacked, kept_trained, sizes, math.prod(shape))


def ops_of(call: Callable[[Tensor], object], images: Tensor, execution: Execution) -> list[Op]:
    """Kernels of a call, which is given fake images in place of these."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _own_ops(execution):
        fake = mode.from_tensor(images)
        with _Recorder(execution) as recorder:
            call(fake)
    return [kernel.op for kernel in recorder.kernels]


def _recorded(
    execution: Execution, forward: Callable[[], Tensor], backward: Callable[[Tensor], object]
) -> tuple[list[Op], int]:
    """Kernels of both, and the bytes of all memory that the forward left for the backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with _Recorder(execution) as recorder:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = forward()
        backward(value)
    kernels = _joined(recorder.kernels) if execution.compiled else recorder.kernels
    return [kernel.op for kernel in kernels], sum(kept.values())


# ---------------------------------------------------------------- from calls of ops to kernels


class _Kernel(NamedTuple):
    """A kernel, and what it reads and writes: bytes by storage. values: of a pointwise one, how many."""

    op: Op
    reads: dict[int, int]
    writes: dict[int, int]
    values: int | None = None


class _Recorder(TorchDispatchMode):
    """Notes the kernels of ops that are called inside."""

    def __init__(self, execution: Execution) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[_Kernel] = []
        self._execution = execution
        self._alive: list[Any] = []  # so that no storage has the number of an older one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if not func.is_view and name not in FREE:
            self._alive.append((args, kwargs, out))
            self.kernels += _KERNELS.get(name, _one)(func, (args, kwargs, out), self._execution)
        return out


def _kernel(name: str, reads: Any, writes: Any, *, flops: float = 0.0, product: Product | None = None) -> _Kernel:
    """A kernel that reads and writes the tensors once; those that are None are not there."""
    read, written = (
        [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)] for given in (reads, writes)
    )
    moved = [*read, *written]
    dtype = next((tensor.dtype for tensor in moved), torch.float32)
    op = Op(name, flops, float(sum(map(_bytes, moved))), dtype, product)
    return _Kernel(op, _by_storage(read), _by_storage(written))


def _by_storage(tensors: Sequence[Tensor]) -> dict[int, int]:
    return {tensor.untyped_storage()._cdata: _bytes(tensor) for tensor in tensors}


def _bytes(tensor: Tensor) -> int:
    """Bytes of the memory behind a tensor: less than its values where it is expanded."""
    return int(min(tensor.numel() * tensor.dtype.itemsize, tensor.untyped_storage().nbytes()))


def _one(func: Any, call: Call, execution: Execution) -> list[_Kernel]:
    """An op of one kernel, which reads its arguments and writes its results, and torch's BatchNorm."""
    args, kwargs, out = call
    name = func._schema.name
    count = flop_registry.get(func.overloadpacket)
    flops = float(count(*args, **kwargs, out_val=out)) if count else 0.0
    number, flag = _READ_TWICE.get(name, (0, 0))
    again = args[:number] if number and args[flag] else ()
    kernel = _kernel(name, (args, kwargs, again), out, flops=flops)
    if torch.Tag.pointwise in func.tags or name in _COPIES:
        return [kernel._replace(values=out.numel())]
    return [kernel]


def _convolution(func: Any, call: Call, execution: Execution) -> list[_Kernel]:
    """One matrix product: of each pixel's window with the filters."""
    (x, weight, bias, *_, groups), _, out = call
    pixels = out.numel() // out.shape[1]
    product = Product(pixels, out.shape[1] // groups, groups)
    own_bias = None if execution.separate_bias else bias
    kernel = _kernel(
        func._schema.name, (x, weight, own_bias), out, flops=2.0 * pixels * weight.numel(), product=product
    )
    if bias is None or own_bias is not None:
        return [kernel]
    return [kernel, _kernel("bias", (out, bias), out)._replace(values=out.numel())]


def _convolution_backward(func: Any, call: Call, execution: Execution) -> list[_Kernel]:
    """A matrix product for the gradient of the images, one for that of the weights, whose sums are over pixels."""
    (grad, x, weight, *_, groups, wanted), _, (grad_x, grad_weight, grad_bias) = call
    pixels = grad.numel() // grad.shape[1]
    flops = 2.0 * pixels * weight.numel()
    kernels = []
    if wanted[0]:
        product = Product(x.numel() // x.shape[1], x.shape[1] // groups, groups)
        kernels.append(_kernel(f"{func._schema.name}.x", (grad, weight), grad_x, flops=flops, product=product))
    if wanted[1]:
        product = Product(grad.shape[1] // groups, math.prod(weight.shape[1:]), groups, is_split=True)
        kernels.append(
            _kernel(f"{func._schema.name}.weight", (grad, x), grad_weight, flops=flops, product=product)
        )
    if wanted[2]:
        kernels.append(_kernel("bias.gradient", grad, grad_bias))
    return kernels


def _batch_norm(func: Any, call: Call, execution: Execution) -> list[_Kernel]:
    """Sums of x; then y from x and the residual, the running statistics moved."""
    (x, weight, bias, running_mean, running_var, residual, *_), _, (y, statistics) = call
    running = (running_mean, running_var)
    return [
        _kernel("engine::batch_norm.sums", x, ()),
        _kernel("engine::batch_norm.apply", (x, residual, weight, bias, running), (y, statistics, running)),
    ]


def _batch_norm_backward(func: Any, call: Call, execution: Execution) -> list[_Kernel]:
    """Sums of x and what the ReLU lets through, which is written where y tells it; then the gradient of x."""
    (grad, x, y, weight, bias, statistics, _), _, (grad_x, grad_residual, grad_parameters) = call
    passed = None if y is None else grad_residual
    numbers = (weight, bias, statistics)
    return [
        _kernel("engine::batch_norm_backward.sums", (grad, x, y, numbers), passed),
        _kernel(
            "engine::batch_norm_backward.gradient",
            (grad if passed is None else passed, x, numbers),
            (grad_x, grad_parameters),
        ),
    ]


def _image_conv3x3(func: Any, call: Call, execution: Execution) -> list[_Kernel]:
    """A product with windows of 27 values."""
    (images, weight, *rest, _), _, y = call
    return [_of_windows(func, (images, weight, rest), y, 2.0 * 27 * y.numel(), 32 / 27, execution)]


def _image_conv3x3_backward(func: Any, call: Call, execution: Execution) -> list[_Kernel]:
    """Nine products for the three channels of an image."""
    (grad, weight, std), _, of_images = call
    return [_of_windows(func, (grad, weight, std), of_images, 2.0 * 27 * grad.numel(), 16 / 3, execution)]


def _of_windows(
    func: Any, reads: Any, writes: Tensor, flops: float, padding: float, execution: Execution
) -> _Kernel:
    """A product of float32; on tensor cores six of bfloat16, of matrices that are larger by `padding`."""
    dtype = execution.stem
    assert dtype is not None
    more = 6 * padding if dtype == torch.bfloat16 else 1
    kernel = _kernel(func._schema.name, reads, writes, flops=more * flops)
    return kernel._replace(op=kernel.op._replace(dtype=dtype))


_KERNELS: dict[str, Callable[[Any, Call, Execution], list[_Kernel]]] = {
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
    "engine::batch_norm": _batch_norm,
    "engine::batch_norm_backward": _batch_norm_backward,
    "engine::image_conv3x3": _image_conv3x3,
    "engine::image_conv3x3_backward": _image_conv3x3_backward,
}


def _joined(kernels: Sequence[_Kernel]) -> list[_Kernel]:
    """Pointwise kernels in a row, on as many values, as one: what is read by them alone does not move."""
    last_read = {storage: place for place, kernel in enumerate(kernels) for storage in kernel.reads}
    result: list[_Kernel] = []
    run: list[_Kernel] = []
    for place, kernel in enumerate(kernels):
        if kernel.values is None or (run and run[-1].values != kernel.values):
            result += _as_one(run, place, last_read)
            run = []
        if kernel.values is None:
            result.append(kernel)
        else:
            run.append(kernel)
    return result + _as_one(run, len(kernels), last_read)


def _as_one(run: Sequence[_Kernel], end: int, last_read: dict[int, int]) -> list[_Kernel]:
    """The kernel of a run that ends before the place `end`. What nobody reads is a result, and written."""
    if len(run) < 2:
        return list(run)
    reads: dict[int, int] = {}
    writes: dict[int, int] = {}
    for kernel in run:
        reads |= {storage: size for storage, size in kernel.reads.items() if storage not in writes}
        writes |= kernel.writes
    writes = {storage: size for storage, size in writes.items() if last_read.get(storage, end) >= end}
    moved = float(sum(reads.values()) + sum(writes.values()))
    return [_Kernel(Op("pointwise", 0.0, moved, run[-1].op.dtype), reads, writes, run[-1].values)]


# ---------------------------------------------------------------- the engine's ops on fake tensors


@contextmanager
def _own_ops(execution: Execution) -> Iterator[None]:
    """Networks call the engine's ops on fake tensors too, which they leave to torch otherwise."""
    stem, fab = (sys.modules[op.__module__] for op in (image_conv3x3, fab_step))
    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(fab, "_update", fab._op))
        if execution.fused_norm:
            patched.enter_context(mock.patch.object(layers, "batch_norm", _fused_norm))
        if execution.stem is not None:
            own: dict[str, Any] = {"_forward": stem._op, "_backward": stem._op_backward}
            own |= {"_choose": lambda *_, **__: "fused", "_is_fused": lambda *_: True}
            for name, value in own.items():
                patched.enter_context(mock.patch.object(stem, name, value))
        yield


# many parameters: those of the op
def _fused_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    y: Tensor = _Norm.apply(x, weight, bias, running_mean, running_var, residual, momentum, eps, relu)
    return y


class _Norm(torch.autograd.Function):
    """`engine.kernels.batch_norm` by its registered ops, and keeping what it keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        weight, bias, *_, residual, _, _, ctx.relu = arguments
        y: Tensor
        y, statistics = torch.ops.engine.batch_norm(x, *arguments)
        ctx.has_residual = residual is not None
        kept = (y,) if ctx.relu and ctx.has_residual else ()
        ctx.save_for_backward(x, weight, bias, statistics, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics, *rest = ctx.saved_tensors
        y = rest[0] if rest else None
        found = torch.ops.engine.batch_norm_backward(grad, x, y, weight, bias, statistics, ctx.relu)
        grad_x, grad_residual, (grad_weight, grad_bias) = found
        passed = (grad if y is None else grad_residual) if ctx.has_residual else None
        return grad_x, grad_weight, grad_bias, None, None, passed, None, None, None
