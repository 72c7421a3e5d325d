"""The native library: loading it, its instruction set, and the calls into it.

The library knows neither Python nor torch: it is called through ctypes, and given torch's own parallel loop.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from ctypes import c_char_p, c_double, c_float, c_int, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.kernels.contract import (
    LossAndGradients,
    LossInputs,
    LossSpec,
    WeightTransforms,
    check_indices,
    check_kinds,
    check_labels,
    look_up,
)

_FILE = Path(__file__).with_name("_native.so")
_INTERFACE = 9  # of csrc/library.cpp
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # DType of csrc/cpu.h
_OUT_OF_RANGE, _OUT_OF_MEMORY = 1, 2
_MOST_CHANNELS_AT_ONCE = 32  # PANEL of csrc/conv3x3.cpp, of the widest set of instructions

# Kind of csrc/cpu.h, Term, and LossArguments before the views of its logits.
_KINDS = {"ce": 0, "kl": 1, "margin": 2, "kl_live": 3}
_TERM = struct.Struct("5q3d")
_CONV = struct.Struct("2P4qq3P5q3q")  # ConvArguments of csrc/cpu.h
_LOSS, _VIEW = "5q2d2Pq2Pq4P", "P3qP"

_UPDATE: list[Any] = [c_void_p, c_void_p, c_int, c_void_p, c_int64, c_int64, c_int, c_float, c_float, c_void_p]
_FAB: list[Any] = [*[c_void_p] * 4, c_int64, c_int64, c_int, c_double, c_double]
_CROP: list[Any] = [*[c_void_p] * 6, c_int64, c_int64, *[c_int] * 3, c_uint64, c_uint32, *[c_int] * 3]
_NORM: list[Any] = [*[c_void_p] * 8, c_int, c_int64, c_int64, c_double, c_double, c_int]
_NORM_BACKWARD: list[Any] = [*[c_void_p] * 9, c_int, c_int64, c_int64, c_int]
_IMAGE_CONV: list[Any] = [*[c_void_p] * 6, c_int, *[c_int64] * 4]
_IMAGE_CONV_BACKWARD: list[Any] = [*[c_void_p] * 4, c_int, *[c_int64] * 4]
_IMAGE_CONV_UPDATE: list[Any] = [*[c_void_p] * 5, c_float, c_float, c_void_p, c_int, *[c_int64] * 4]
_START: list[Any] = [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int, c_float, c_uint64, c_uint32]


@functools.cache
def missing(device_type: str) -> str:
    """Reason why the library cannot serve on a type of device; empty where it can."""
    if not _FILE.is_file():
        return "the native library is not built (make native)"
    try:
        library = _library()
    except OSError as error:
        return f"the native library does not load: {error} (make native)"
    if device_type == "cuda" and not hasattr(library, "engine_cuda_error"):
        return "the native library was built without CUDA (make native where there is a CUDA compiler)"
    return ""


def description(device_type: str) -> str:
    """Instruction set and threads, or CUDA C++, in words for the user."""
    if device_type == "cuda":
        return "CUDA C++"
    threads = torch.get_num_threads()
    return f"{_library().engine_instruction_set().decode()}, {threads} thread{'s' if threads > 1 else ''}"


@functools.cache
def _library() -> ctypes.CDLL:
    """The loaded library. Raises OSError where it was built from other sources."""
    library = ctypes.CDLL(str(_FILE))
    if not hasattr(library, "engine_interface") or library.engine_interface() != _INTERFACE:
        raise OSError(f"{_FILE} was built from other sources")
    library.engine_instruction_set.restype = c_char_p
    library.engine_cpu_distill_loss.argtypes = [c_char_p]
    library.engine_cpu_pgd_update.argtypes = _UPDATE
    library.engine_cpu_fab_step.argtypes = _FAB
    library.engine_cpu_crop_flip.argtypes = _CROP
    library.engine_cpu_random_start.argtypes = _START
    library.engine_cpu_conv3x3.argtypes = [c_char_p]
    library.engine_cpu_batch_norm.argtypes = _NORM
    library.engine_cpu_batch_norm_backward.argtypes = _NORM_BACKWARD
    library.engine_cpu_image_conv3x3.argtypes = _IMAGE_CONV
    library.engine_cpu_image_conv3x3_backward.argtypes = _IMAGE_CONV_BACKWARD
    library.engine_cpu_image_conv3x3_update.argtypes = _IMAGE_CONV_UPDATE
    if hasattr(library, "engine_cuda_error"):
        library.engine_cuda_error.restype = c_char_p
        library.engine_cuda_pgd_update.argtypes = [*_UPDATE, c_void_p]
        library.engine_cuda_crop_flip.argtypes = [*_CROP, c_void_p]
    # Torch's threads, not a second pool of them: two would fight for the processors.
    torch_parallel_for = ctypes.CDLL(torch._C.__file__).torch_parallel_for
    library.engine_use_threads(ctypes.cast(torch_parallel_for, c_void_p))
    return library


def _call(op: str, device: torch.device, *arguments: object) -> int:
    """Call engine_cpu_{op} and return its status, or engine_cuda_{op} on the current stream, and return 0."""
    library = _library()
    if device.type == "cpu":
        status: int = getattr(library, f"engine_cpu_{op}")(*arguments)
        if status == _OUT_OF_MEMORY:
            raise MemoryError(f"{op}: no memory to compute in")
        return status
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        code = getattr(library, f"engine_cuda_{op}")(*arguments, stream)
    if code:
        raise RuntimeError(f"{op} on {device}: {library.engine_cuda_error(code).decode()}")
    return 0


def loss_and_gradients(inputs: LossInputs, spec: LossSpec, wants: tuple[bool, ...]) -> LossAndGradients:
    """Values of `reference.distill_loss` and its gradients on a CPU, of logits in float32, float16 or bfloat16."""
    terms, pack = _terms(spec), _packer(len(wants))
    labels, sample_weights, factors = inputs.labels, inputs.sample_weights, inputs.factors
    batch, classes = inputs.logits[0].shape
    if sample_weights is not None:
        sample_weights = sample_weights.to(torch.float32).contiguous()
    if factors is not None:
        factors = factors.to(torch.float32).contiguous()
    wanted = sum(wants)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=labels.device)

    gradients = empty(wanted, batch, classes) if wanted else None
    result = LossAndGradients(empty(), empty(batch), empty(len(spec.terms)), empty(batch), gradients)
    views: list[int] = []
    place = 0 if gradients is None else gradients.data_ptr()
    for logits, is_wanted in zip(inputs.logits, wants, strict=True):
        views += (logits.data_ptr(), _dtype(logits), *logits.stride(), place if is_wanted else 0)
        place += 4 * batch * classes * is_wanted
    call = pack(
        batch,
        classes,
        len(wants),
        len(spec.terms),
        spec.trust,
        spec.beta,
        spec.label_smoothing,
        ctypes.addressof(terms),
        labels.data_ptr(),
        *labels.stride(),
        _pointer(sample_weights),
        _pointer(factors),
        0 if factors is None else factors.shape[1],
        *map(_pointer, result[:4]),
        *views,
    )
    if _call("distill_loss", labels.device, call) == _OUT_OF_RANGE:
        check_labels(inputs)
    return result


@functools.lru_cache(maxsize=256)
def _terms(spec: LossSpec) -> ctypes.Array[Any]:
    """The terms as the library reads them."""
    check_kinds("the native library", _KINDS, spec)
    return ctypes.create_string_buffer(
        b"".join(
            _TERM.pack(
                _KINDS[term.kind],
                term.student,
                term.target,
                term.detach,
                term.factor,
                term.a,
                term.b,
                term.temperature,
            )
            for term in spec.terms
        )
    )


@functools.cache
def _packer(logits: int) -> Callable[..., bytes]:
    return struct.Struct(_LOSS + logits * _VIEW).pack


def pgd_update(
    x_adv: Tensor, grad: Tensor, x_nat: Tensor, l2: bool, epsilon: float, step_size: float, counts: Tensor | None
) -> None:
    """`reference.pgd_update` of dense tensors of one layout: images float32, grad float32, float16 or bfloat16."""
    batch = x_adv.shape[0]
    _call(
        "pgd_update",
        x_adv.device,
        x_adv.data_ptr(),
        grad.data_ptr(),
        _dtype(grad),
        x_nat.data_ptr(),
        batch,
        x_adv.numel() // max(batch, 1),
        l2,
        epsilon,
        step_size,
        _pointer(counts),
    )


def fab_step(
    x_adv: Tensor, x_nat: Tensor, grad: Tensor, difference_B: Tensor, l2: bool, alpha_max: float, eta: float
) -> None:
    """`reference.fab_step` of dense tensors of one layout on a CPU, all in float32."""
    batch = x_adv.shape[0]
    pointers = map(_pointer, (x_adv, x_nat, grad, difference_B))
    _call("fab_step", x_adv.device, *pointers, batch, x_adv.numel() // max(batch, 1), l2, alpha_max, eta)


# many parameters: those of the op, in one order for all implementations
def crop_flip(
    x_BCHW: Tensor,
    labels_B: Tensor,
    images_NHWC: Tensor,
    labels_N: Tensor,
    sample_B: Tensor,
    seed: int,
    epoch: int,
    padding: int,
    flip: bool,
    augment: bool,
    index_B: Tensor | None = None,
) -> None:
    """`reference.crop_flip` of contiguous images into float32."""
    tensors = (x_BCHW, labels_B, images_NHWC, labels_N, sample_B, index_B)
    numbers = (len(sample_B), *images_NHWC.shape, seed, epoch, padding, flip, augment)
    if _call("crop_flip", x_BCHW.device, *map(_pointer, tensors), *numbers) == _OUT_OF_RANGE:
        check_indices(sample_B, index_B, len(images_NHWC))


def random_start(noise: Tensor, sample_B: Tensor, epsilon: float, seed: int, counter: int | Tensor) -> None:
    """`reference.random_start`, the uniform start in an L-inf ball, on a CPU, into dense float32."""
    batch, channels = noise.shape[:2]
    _call(
        "random_start",
        noise.device,
        noise.data_ptr(),
        sample_B.data_ptr(),
        batch,
        channels,
        noise.numel() // max(batch * channels, 1),
        not noise.is_contiguous(),
        epsilon,
        seed,
        int(counter),
    )


def conv3x3(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    flip: bool,
    tile: int,
    transforms: WeightTransforms | None = None,
) -> Tensor:
    """`reference.conv3x3` on a CPU by tiles of 2 x 2 or 4 x 4 outputs: float32, channels-last, channels in 16s.

    The transformed weights take (tile + 2)^2 / 9 times the memory of the weights, for the time of the call, or in
    transforms, where they are looked for first.
    """
    batch, channels, height, width = images.shape
    out_stride, in_stride, *strides = weight.stride()
    channels_out = weight.shape[0]
    if flip:
        channels_out, out_stride, in_stride = weight.shape[1], in_stride, out_stride
    bias = None if bias is None else bias.contiguous()
    padded = -(-channels_out // _MOST_CHANNELS_AT_ONCE) * _MOST_CHANNELS_AT_ONCE
    known = None if transforms is None else transforms.get(weight, flip, tile)
    transformed = images.new_empty((tile + 2) ** 2 * padded * channels) if known is None else known
    result = torch.empty(
        (batch, channels_out, height, width), dtype=images.dtype, memory_format=torch.channels_last
    )
    call = _CONV.pack(
        images.data_ptr(),
        weight.data_ptr(),
        out_stride,
        in_stride,
        *strides,
        flip,
        _pointer(bias),
        transformed.data_ptr(),
        result.data_ptr(),
        *(batch, height, width, channels, channels_out),
        tile,
        torch.get_num_threads(),
        known is not None,
    )
    _call("conv3x3", images.device, call)
    if transforms is not None:
        transforms.put(weight, flip, tile, transformed)
    return result


# many parameters: those of the op, in one order for all implementations
def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.batch_norm` of maps in channels_last, and (2, C) mean and 1 / sqrt(var + eps), on a CPU."""
    channels = x.shape[1]
    y, statistics_2C = torch.empty_like(x), weight.new_empty(2, channels)
    _call(
        "batch_norm",
        x.device,
        x.data_ptr(),
        _pointer(residual),
        weight.data_ptr(),
        bias.data_ptr(),
        _pointer(running_mean),
        _pointer(running_var),
        y.data_ptr(),
        statistics_2C.data_ptr(),
        _dtype(x),
        x.numel() // channels,
        channels,
        momentum,
        eps,
        relu,
    )
    return y, statistics_2C


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics_2C: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of `batch_norm`: of x, of the residual where y is given, and (2, C) of weight and bias."""
    channels = x.shape[1]
    grad_x, grad_residual = torch.empty_like(x), None if y is None else torch.empty_like(x)
    grad_parameters_2C = torch.empty_like(statistics_2C)
    _call(
        "batch_norm_backward",
        x.device,
        grad.data_ptr(),
        x.data_ptr(),
        _pointer(y),
        weight.data_ptr(),
        bias.data_ptr(),
        statistics_2C.data_ptr(),
        grad_x.data_ptr(),
        _pointer(grad_residual),
        grad_parameters_2C.data_ptr(),
        _dtype(x),
        x.numel() // channels,
        channels,
        relu,
    )
    return grad_x, grad_residual, grad_parameters_2C


def image_conv3x3(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.image_conv3x3` of float32 in channels_last on a CPU, into float32 or bfloat16."""
    batch, _, height, width = images.shape
    shape = (batch, len(weight), height, width)
    y = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    tensors = (images, weight, bias, mean, std, y)
    _call("image_conv3x3", images.device, *map(_pointer, tensors), _dtype(y), *_map_sizes(y))
    return y


def image_conv3x3_backward(grad: Tensor, weight: Tensor, std: Tensor | None) -> Tensor:
    """Gradient of the images, float32 in channels_last. grad: in channels_last."""
    batch, _, height, width = grad.shape
    of_images = torch.empty((batch, 3, height, width), dtype=torch.float32, memory_format=torch.channels_last)
    tensors = (grad, weight, std, of_images)
    _call("image_conv3x3_backward", grad.device, *map(_pointer, tensors), _dtype(grad), *_map_sizes(grad))
    return of_images


def image_conv3x3_update(
    x_adv: Tensor,
    grad: Tensor,
    x_nat: Tensor,
    weight: Tensor,
    std: Tensor | None,
    epsilon: float,
    step_size: float,
    counts: Tensor | None,
) -> None:
    """`reference.pgd_update` in L-inf by the gradient of `image_conv3x3_backward`, which is not written."""
    _call(
        "image_conv3x3_update",
        grad.device,
        *map(_pointer, (grad, weight, std, x_adv, x_nat)),
        epsilon,
        step_size,
        _pointer(counts),
        _dtype(grad),
        *_map_sizes(grad),
    )


def _map_sizes(given: Tensor) -> tuple[int, int, int, int]:
    """Batch, height, width and channels."""
    batch, channels, height, width = given.shape
    return batch, height, width, channels


def _dtype(given: Tensor) -> int:
    return look_up("dtype", given.dtype, _DTYPES)


def _pointer(given: Tensor | None) -> int:
    return 0 if given is None else given.data_ptr()
