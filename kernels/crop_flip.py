"""Random crop and horizontal flip of images that live on the device as uint8. N data set, B batch, C, H, W."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.philox import Stream, random_words


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
) -> tuple[Tensor, Tensor]:
    """Zero-padded random crop and random horizontal flip, values / 255.

    Before its flip a view has at (y, x) the image's pixel (y + r - padding, x + c - padding), or 0 outside it.
    r and c are uniform on 0..2 padding: floor(word * (2 padding + 1) / 2**32) of words 0 and 1 of the sample in
    `Stream.AUGMENT`. The top bit of word 2 is the flip. So a view depends on (seed, epoch, sample) alone.

    images_NHWC: uint8; sample_B: int64; all on one device.
    Returns x_BCHW in [0,1] with channels_last strides, and labels_B.
    """
    labels_B = labels_N[sample_B]
    if augment:
        pixels_BHWC = _crops(
            images_NHWC, sample_B, random_words(seed, Stream.AUGMENT, epoch, sample_B, 3), padding, flip
        )
    else:
        pixels_BHWC = images_NHWC[sample_B]
    x_BHWC = pixels_BHWC.to(dtype)
    # By a tensor: CUDA multiplies by the reciprocal of a Python scalar, which can be an ulp off the quotient.
    x_BHWC /= x_BHWC.new_full((), 255)
    return x_BHWC.permute(0, 3, 1, 2), labels_B


def _crops(images_NHWC: Tensor, sample_B: Tensor, words_B3: Tensor, padding: int, flip: bool) -> Tensor:
    height, width = images_NHWC.shape[1:3]
    shift_B2 = (words_B3[:, :2] * (2 * padding + 1) >> 32) - padding
    column_BW = torch.arange(width, device=sample_B.device).expand(sample_B.shape[0], width)
    if flip:
        column_BW = torch.where(words_B3[:, 2:] >> 31 == 1, width - 1 - column_BW, column_BW)
    y_BH1 = (torch.arange(height, device=sample_B.device) + shift_B2[:, :1])[:, :, None]
    x_B1W = (column_BW + shift_B2[:, 1:])[:, None, :]
    outside_BHW = (y_BH1 < 0) | (y_BH1 >= height) | (x_B1W < 0) | (x_B1W >= width)
    crops_BHWC = images_NHWC[sample_B[:, None, None], y_BH1.clamp(0, height - 1), x_B1W.clamp(0, width - 1)]
    return crops_BHWC.masked_fill_(outside_BHW[..., None], 0)
