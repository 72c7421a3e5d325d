"""Random crop and horizontal flip of uint8 images on the device.

Shape suffixes: N data set, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from engine.kernels import dispatch, reference
from engine.kernels.contract import check_device, check_indices


# many parameters: all but the first three are given by name
def crop_flip(
    images_NHWC: Tensor,
    labels_N: Tensor,
    sample_B: Tensor,
    *,
    seed: int,
    epoch: int,
    padding: int = 4,
    flip: bool = True,
    augment: bool = True,
    dtype: torch.dtype = torch.float32,
    index_B: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Zero-padded random crop and random horizontal flip, values / 255.

    Before its flip a view has at (y, x) the image's pixel (y + r - padding, x + c - padding), or 0 outside it.
    r and c are uniform on 0..2 padding: floor(word * (2 padding + 1) / 2**32) of words 0 and 1 of the sample in
    `Stream.AUGMENT`. The top bit of word 2 is the flip. So a view depends on (seed, epoch, sample) alone.

    images_NHWC: uint8; labels_N, sample_B: int64; all on one device. out: an earlier result to write into.
    index_B: int64, where each sample's image and label stand in images_NHWC and labels_N, by default at its own
    number. With it a sample may be any number: its low 32 bits draw the view.
    Returns x_BCHW in [0,1] with channels_last strides, and labels_B.
    Raises ValueError for tensors that do not fit, and on a CPU IndexError for an image that is not there.
    """
    _check(images_NHWC, labels_N, sample_B, index_B, padding)
    height, width, channels = images_NHWC.shape[1:]
    if out is None:
        out = (
            torch.empty(
                (len(sample_B), channels, height, width),
                dtype=dtype,
                device=images_NHWC.device,
                memory_format=torch.channels_last,
            ),
            labels_N.new_empty(len(sample_B)),
        )
    else:
        _check_out(*out, (len(sample_B), channels, height, width))
    check_device(
        images_NHWC=images_NHWC,
        labels_N=labels_N,
        sample_B=sample_B,
        index_B=index_B,
        x=out[0],
        labels=out[1],
    )
    signed_seed = seed - (seed >> 63 << 64)  # an op's integers are signed
    crop = _op if torch.compiler.is_compiling() else _crop_flip
    crop(*out, images_NHWC, labels_N, sample_B, signed_seed, epoch, padding, flip, augment, index_B)
    return out


# many parameters: those of the op, in one order for all implementations
def _crop_flip(
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
    index_B: Tensor | None,
) -> None:
    """The crops by the implementation that serves here. seed: as a signed number of 64 bits."""
    fused = x_BCHW.dtype == torch.float32 and images_NHWC.is_contiguous() and labels_N.is_contiguous()
    implementation = dispatch.choose("crop_flip", images_NHWC.device, fused=fused)
    arguments = (
        x_BCHW,
        labels_B,
        images_NHWC,
        labels_N,
        sample_B.contiguous(),
        seed & (2**64 - 1),
        epoch,
        padding,
        flip,
        augment,
        None if index_B is None else index_B.contiguous(),
    )
    if implementation == "reference":
        check_indices(sample_B, index_B, len(images_NHWC))
        reference.crop_flip(*arguments)
        return
    dispatch.fused(implementation, "crop_flip", "crop_flip")(*arguments)
    # Autograd does not see what a kernel writes: it must refuse to use the old values.
    increment_version((x_BCHW, labels_B))


# many parameters: the schema of an op is flat
@torch.library.custom_op("engine::crop_flip", mutates_args=("x_BCHW", "labels_B"))
def _op(
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
    index_B: Tensor | None,
) -> None:
    _crop_flip(x_BCHW, labels_B, images_NHWC, labels_N, sample_B, seed, epoch, padding, flip, augment, index_B)


@_op.register_fake
def _(*_: object) -> None:
    return None


def _check(images_NHWC: Tensor, labels_N: Tensor, sample_B: Tensor, index_B: Tensor | None, padding: int) -> None:
    if images_NHWC.dtype != torch.uint8 or images_NHWC.dim() != 4:
        raise ValueError(
            f"images_NHWC: expected uint8 (N, H, W, C), got {images_NHWC.dtype} of {tuple(images_NHWC.shape)}"
        )
    if labels_N.dtype != torch.int64 or labels_N.shape != images_NHWC.shape[:1]:
        raise ValueError(
            f"labels_N: expected int64 ({len(images_NHWC)},), got {labels_N.dtype} of {tuple(labels_N.shape)}"
        )
    if sample_B.dtype != torch.int64 or sample_B.dim() != 1:
        raise ValueError(f"sample_B: expected int64 (B,), got {sample_B.dtype} of {tuple(sample_B.shape)}")
    if index_B is not None and (index_B.dtype != torch.int64 or index_B.shape != sample_B.shape):
        raise ValueError(
            f"index_B: expected int64 ({len(sample_B)},), got {index_B.dtype} of {tuple(index_B.shape)}"
        )
    if padding < 0:
        raise ValueError(f"padding must be 0 or more, got {padding}")


def _check_out(x_BCHW: Tensor, labels_B: Tensor, shape: tuple[int, ...]) -> None:
    if x_BCHW.shape != shape or not x_BCHW.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"out[0]: expected a channels_last tensor of shape {shape}, got {tuple(x_BCHW.shape)}")
    if labels_B.shape != shape[:1] or labels_B.dtype != torch.int64 or not labels_B.is_contiguous():
        kind = f"{labels_B.dtype} of {tuple(labels_B.shape)}, strides {labels_B.stride()}"
        raise ValueError(f"out[1]: expected int64 ({shape[0]},), contiguous, got {kind}")
