"""cuDNN's operations on a pretended GPU: outputs of the right shape, format and layout, and a launch for each.

torch then takes the path that it takes with cuDNN: channels-last where an input is, one call a convolution.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

Shape = Sequence[int]

_driver = ctypes.CDLL("libcuda.so.1")
_driver.fake_cuda_launch.argtypes = (ctypes.c_char_p, ctypes.c_void_p)


def install() -> torch.library.Library:
    """Put them in the place of torch's, as long as what is returned lives."""
    library = torch.library.Library("aten", "IMPL")
    operations = (convolution, convolution_backward, batch_norm, batch_norm_backward)
    names = ("cudnn_convolution", "convolution_backward", "cudnn_batch_norm", "cudnn_batch_norm_backward")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they replace torch's
        for name, operation in zip(names, operations, strict=True):
            library.impl(name, operation, "CUDA")
    return library


def convolution(
    x: Tensor, weight: Tensor, padding: Shape, stride: Shape, dilation: Shape, groups: int, *plan: bool
) -> Tensor:
    """aten::cudnn_convolution. plan: benchmark, deterministic, allow_tf32."""
    sizes = [x.shape[0], weight.shape[0]]
    for axis in range(2):
        covered = dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        sizes.append((x.shape[2 + axis] + 2 * padding[axis] - covered) // stride[axis] + 1)
    return _launched("cudnn_forward", _empty(sizes, x, _layout(x, weight)))


# many parameters: those of aten::convolution_backward
def convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias_sizes: Shape | None, stride: Shape, padding: Shape,
    dilation: Shape, transposed: bool, output_padding: Shape, groups: int, wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """aten::convolution_backward: gradients of x, of the weight and of the bias, as far as they are wanted."""
    layout = _layout(x, weight)
    return (
        _launched("cudnn_input_gradient", _empty(x.shape, x, layout)) if wanted[0] else None,
        _launched("cudnn_weight_gradient", _empty(weight.shape, weight, layout)) if wanted[1] else None,
        gradient.sum((0, 2, 3)) if wanted[2] else None,
    )


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None,
    training: bool, momentum: float, epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """aten::cudnn_batch_norm: the output, what is saved of the batch, and cuDNN's reserve."""
    saved = [weight.new_empty(weight.shape if training else 0) for _ in range(2)]
    out = _launched("cudnn_batch_norm", torch.empty_like(x))
    return out, saved[0], saved[1], x.new_empty(0, dtype=torch.uint8)


def batch_norm_backward(
    x: Tensor, gradient: Tensor, weight: Tensor, *statistics: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """aten::cudnn_batch_norm_backward: gradients of x, of the weight and of the bias."""
    _launched("cudnn_batch_norm_backward", x)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Channels-last where one of them is, and not only as well."""
    last = any(
        tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
        for tensor in (x, weight)
    )
    return torch.channels_last if last else torch.contiguous_format


def _empty(shape: Shape, like: Tensor, layout: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _launched(name: str, out: Tensor) -> Tensor:
    stream = torch.cuda.current_stream(out.device).cuda_stream
    assert _driver.fake_cuda_launch(name.encode(), stream) == 0
    return out
