"""The ops in eager torch: the standard of the other implementations, and the fallback where none of them serves.

Shape suffixes: B batch, C classes or channels, K the six terms; N data set, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.contract import DistillLoss, LossInputs, LossRow, check_terms
from engine.kernels.philox import Stream, random_words, uniform

# torch ignores the label -100 by default: here that is an error, like any other label that is no class.
_NO_LABEL = torch.iinfo(torch.int64).min


def distill_loss(inputs: LossInputs, row: LossRow) -> DistillLoss:
    """The loss of `engine.kernels.distill_loss`, differentiable by autograd."""
    s_adv, s_nat, t_at_nat, t_at_adv, t_st_adv = (
        None if given is None else given if given.dtype == torch.float64 else given.float() for given in inputs[:5]
    )
    labels = inputs.labels
    example = inputs.student
    count = max(len(labels), 1)

    def cross_entropy(s_BC: Tensor | None) -> Tensor:
        assert s_BC is not None
        return F.cross_entropy(
            s_BC, labels, reduction="none", label_smoothing=row.label_smoothing, ignore_index=_NO_LABEL
        )

    def divergence(target_BC: Tensor | None, temperature: float) -> Tensor:
        assert target_BC is not None
        assert s_adv is not None
        log_p_BC = F.log_softmax(target_BC / temperature, dim=1)
        log_q_BC = F.log_softmax(s_adv / temperature, dim=1)
        return F.kl_div(log_q_BC, log_p_BC, reduction="none", log_target=True).sum(dim=1)

    with torch.no_grad():
        dtype = torch.float64 if example.dtype == torch.float64 else torch.float32
        alpha_B = torch.ones_like(labels, dtype=dtype)
        if t_at_adv is not None:
            alpha_B = trust(t_at_adv, labels, row.beta)

    terms: dict[str, Callable[[], Tensor]] = {
        "ce_nat": lambda: cross_entropy(s_nat),
        "ce_adv": lambda: cross_entropy(s_adv),
        "kl_self": lambda: divergence(
            s_nat.detach() if row.detach_self and s_nat is not None else s_nat, row.tau_self
        ),
        "kl_at_nat": lambda: divergence(_constant(t_at_nat), row.tau),
        "kl_at_adv": lambda: divergence(_constant(t_at_adv), row.tau),
        "kl_st_adv": lambda: divergence(_constant(t_st_adv), row.tau),
    }
    check_terms("the reference", tuple(terms), row)
    loss_B = torch.zeros_like(alpha_B)
    means_K = []
    for (a, b), is_active, term in zip(row.weights, row.active, terms.values(), strict=True):
        if not is_active:
            means_K.append(alpha_B.new_zeros(()))
            continue
        term_B = term()
        loss_B = loss_B + (a + b * alpha_B if b else a) * term_B
        means_K.append(term_B.detach().sum() / count)
    if inputs.sample_weights is not None:
        loss_B = loss_B * inputs.sample_weights.detach().to(loss_B.dtype)
    return DistillLoss(loss_B.sum() / count, alpha_B, torch.stack(means_K), loss_B.detach())


def trust(t_at_adv: Tensor, labels: Tensor, beta: float) -> Tensor:
    """alpha_i = softmax(T_at(x~_i))[y_i] ** beta, the trust in the teacher on each sample (Eq. 4).

    t_at_adv: logits (B, C). labels: (B,) int64. Returns (B,), in [0, 1].
    """
    log_p_B = F.log_softmax(t_at_adv, dim=1).gather(1, labels[:, None]).squeeze(1)
    # A probability that underflows to 0 gives alpha 1 at beta = 0, not 0 * -inf.
    return (beta * log_p_B.clamp_min(torch.finfo(log_p_B.dtype).min)).exp()


def pgd_update(
    x_adv: Tensor, grad: Tensor, x_nat: Tensor, l2: bool, epsilon: float, step_size: float, counts: Tensor | None
) -> None:
    """`engine.kernels.pgd_update`, into x_adv."""
    if counts is not None:
        counts += torch.stack(((grad == 0).sum(), (~grad.isfinite()).sum()))
    grad = grad.to(x_adv.dtype)
    if not l2:
        moved = x_adv + step_size * grad.sign()
        x_adv.copy_(torch.clamp(torch.minimum(torch.maximum(moved, x_nat - epsilon), x_nat + epsilon), 0, 1))
        return
    if not x_adv.numel():
        return
    tiny = torch.finfo(grad.dtype).tiny
    # First to a largest entry of 1: the squares of a tiny gradient would underflow, and its norm with them.
    grad = grad / grad.abs().amax(dim=tuple(range(1, grad.dim())), keepdim=True).clamp_min(tiny)
    delta = x_adv + step_size * grad / _norm(grad).clamp_min(tiny) - x_nat
    x_adv.copy_(torch.clamp(x_nat + delta * (epsilon / _norm(delta).clamp_min(tiny)).clamp_max(1), 0, 1))


def random_start(noise: Tensor, sample_B: Tensor, epsilon: float, seed: int, counter: int) -> None:
    """`engine.kernels.random_start` of the kind "uniform" in an L-inf ball, into `noise`.

    Numbers run in (C, H, W) order whatever the strides of noise.
    """
    uniform_BN = uniform(seed, Stream.ATTACK_START, counter, sample_B, math.prod(noise.shape[1:]))
    noise.copy_((epsilon * (2 * uniform_BN - 1)).view(noise.shape))


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
    """`engine.kernels.crop_flip`, into x_BCHW and labels_B."""
    index_B = sample_B if index_B is None else index_B
    torch.index_select(labels_N, 0, index_B, out=labels_B)
    if augment:
        words_B3 = random_words(seed, Stream.AUGMENT, epoch, sample_B, 3)
        pixels_BHWC = _crops(images_NHWC, index_B, words_B3, padding, flip)
    else:
        pixels_BHWC = images_NHWC[index_B]
    # By a tensor: CUDA multiplies by the reciprocal of a Python scalar, which can be an ulp off the quotient.
    x_BCHW.copy_((pixels_BHWC.to(x_BCHW.dtype) / x_BCHW.new_full((), 255)).permute(0, 3, 1, 2))


def _crops(images_NHWC: Tensor, index_B: Tensor, words_B3: Tensor, padding: int, flip: bool) -> Tensor:
    height, width = images_NHWC.shape[1:3]
    shift_B2 = (words_B3[:, :2] * (2 * padding + 1) >> 32) - padding
    column_BW = torch.arange(width, device=index_B.device).expand(index_B.shape[0], width)
    if flip:
        column_BW = torch.where(words_B3[:, 2:] >> 31 == 1, width - 1 - column_BW, column_BW)
    y_BH1 = (torch.arange(height, device=index_B.device) + shift_B2[:, :1])[:, :, None]
    x_B1W = (column_BW + shift_B2[:, 1:])[:, None, :]
    outside_BHW = (y_BH1 < 0) | (y_BH1 >= height) | (x_B1W < 0) | (x_B1W >= width)
    crops_BHWC = images_NHWC[index_B[:, None, None], y_BH1.clamp(0, height - 1), x_B1W.clamp(0, width - 1)]
    return crops_BHWC.masked_fill_(outside_BHW[..., None], 0)


def _constant(logits: Tensor | None) -> Tensor | None:
    return None if logits is None else logits.detach()


def _norm(images: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(images, dim=tuple(range(1, images.dim())), keepdim=True)
    return norm
