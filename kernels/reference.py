"""The ops in eager torch: the standard of the other implementations, and the fallback where none of them serves.

Shape suffixes: B batch, C classes or channels, K terms; N data set, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.contract import (
    ALPHA_BINS,
    BatchSums,
    DistillLoss,
    LossInputs,
    LossSpec,
    MeasuredBatch,
    SgdNumbers,
    SgdTensors,
    check_kinds,
)
from engine.kernels.philox import Stream, random_words, uniform

# torch ignores the label -100 by default: here that is an error, like any other label that is no class.
_NO_LABEL = torch.iinfo(torch.int64).min


def distill_loss(inputs: LossInputs, spec: LossSpec) -> DistillLoss:
    """The loss of `engine.kernels.distill_loss`, differentiable by autograd."""
    check_kinds("the reference", _TERMS, spec)
    logits = [given if given.dtype == torch.float64 else given.float() for given in inputs.logits]
    labels, count = inputs.labels, max(len(inputs.labels), 1)
    with torch.no_grad():
        dtype = torch.promote_types(inputs.logits[0].dtype, torch.float32)
        alpha_B = torch.ones_like(labels, dtype=dtype)
        if spec.trust >= 0:
            alpha_B = trust(logits[spec.trust], labels, spec.beta)
    loss_B = torch.zeros_like(alpha_B)
    means_K = []
    for term in spec.terms:
        target_BC = None if term.target < 0 else logits[term.target]
        if target_BC is not None and term.detach:
            target_BC = target_BC.detach()
        call = TermCall(logits[term.student], target_BC, labels, term.temperature, spec.label_smoothing)
        term_B = _TERMS[term.kind](call)
        weight = term.a + term.b * alpha_B if term.b else term.a
        if term.factor >= 0:
            assert inputs.factors is not None
            weight = weight * inputs.factors[:, term.factor].detach().to(dtype)
        loss_B = loss_B + weight * term_B
        means_K.append(term_B.detach().sum() / count)
    if inputs.sample_weights is not None:
        loss_B = loss_B * inputs.sample_weights.detach().to(loss_B.dtype)
    return DistillLoss(loss_B.sum() / count, alpha_B, torch.stack(means_K), loss_B.detach())


class TermCall(NamedTuple):
    """Arguments of a term. target_BC: None where it compares with the labels."""

    student_BC: Tensor
    target_BC: Tensor | None
    labels: Tensor
    temperature: float
    label_smoothing: float


def _cross_entropy(call: TermCall) -> Tensor:
    return F.cross_entropy(
        call.student_BC,
        call.labels,
        reduction="none",
        label_smoothing=call.label_smoothing,
        ignore_index=_NO_LABEL,
    )


def _divergence(call: TermCall) -> Tensor:
    assert call.target_BC is not None
    log_p_BC = F.log_softmax(call.target_BC / call.temperature, dim=1)
    log_q_BC = F.log_softmax(call.student_BC / call.temperature, dim=1)
    return F.kl_div(log_q_BC, log_p_BC, reduction="none", log_target=True).sum(dim=1)


def _margin(call: TermCall) -> Tensor:
    p_BC = F.softmax(call.student_BC, dim=1)
    others_B = p_BC.scatter(1, call.labels[:, None], -torch.inf).amax(dim=1)
    return -torch.log(1.0001 - others_B + 1e-12)


def _live_divergence(call: TermCall) -> Tensor:
    assert call.target_BC is not None
    log_p_BC = F.log_softmax(call.target_BC / call.temperature, dim=1)
    log_q_BC = torch.log(F.softmax(call.student_BC / call.temperature, dim=1) + 1e-12)
    true_B = F.softmax(call.target_BC, dim=1).gather(1, call.labels[:, None]).squeeze(1)
    return (1.0000001 - true_B) * F.kl_div(log_q_BC, log_p_BC, reduction="none", log_target=True).sum(dim=1)


_TERMS: dict[str, Callable[[TermCall], Tensor]] = {
    "ce": _cross_entropy,
    "kl": _divergence,
    "margin": _margin,
    "kl_live": _live_divergence,
}


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


NEWTON_STEPS = 50
"""Most steps of a projection: each leaves at most a quarter of what is missing times the slope."""
LEAST_NORM = 1e-8
"""Norm of a projection, at least: of two that do not move at all each has the same share."""
NO_WEIGHT = 1e-8
"""Weights below it do not move a pixel in L2, as in the published implementation of FAB."""


def fab_step(
    x_adv: Tensor, x_nat: Tensor, grad: Tensor, difference_B: Tensor, l2: bool, alpha_max: float, eta: float
) -> None:
    """`engine.kernels.fab_step`, into x_adv, computed in float64."""
    if not x_adv.numel():
        return
    x_BN, nat_BN, w_BN = (given.flatten(1).double() for given in (x_adv, x_nat, grad))
    distance_B = difference_B.double()
    nat_distance_B = distance_B + (w_BN * (nat_BN - x_BN)).sum(dim=1)
    p_BN = box_projection(x_BN, w_BN, distance_B, l2)
    nat_p_BN = box_projection(nat_BN, w_BN, nat_distance_B, l2)
    order = 2.0 if l2 else torch.inf
    norm_B1, nat_norm_B1 = (
        torch.linalg.vector_norm(p, order, dim=1, keepdim=True).clamp_min(LEAST_NORM) for p in (p_BN, nat_p_BN)
    )
    alpha_B1 = (norm_B1 / (norm_B1 + nat_norm_B1)).clamp_max(alpha_max)
    moved_BN = (1 - alpha_B1) * (x_BN + eta * p_BN) + alpha_B1 * (nat_BN + eta * nat_p_BN)
    # Not finite where the gradient, the difference or an image is not.
    is_finite_B1 = nat_distance_B.isfinite()[:, None]
    x_adv.copy_(torch.where(is_finite_B1, moved_BN.clamp(0, 1), x_BN).view(x_adv.shape))


def box_projection(points_BN: Tensor, normal_BN: Tensor, distance_B: Tensor, l2: bool) -> Tensor:
    """Shortest p with <normal, p> = -distance and points + p in [0, 1], in L2 or L-inf, else to a corner.

    A pixel moves against the normal by min(m s_i, room_i), s_i = |normal_i| in L2 and 1 in L-inf, room_i the way
    to its border. Newton's method, from below, finds the m with sum |normal_i| min(m s_i, room_i) = |distance|:
    that sum is concave, increasing and piecewise linear in m.
    """
    towards_BN = torch.where(distance_B < 0, -1.0, 1.0)[:, None] * normal_BN
    weight_BN = normal_BN.abs()
    if l2:
        weight_BN = torch.where(weight_BN < NO_WEIGHT, 0.0, weight_BN)
    speed_BN = weight_BN if l2 else (weight_BN > 0).to(weight_BN.dtype)
    room_BN = torch.where(towards_BN > 0, points_BN, 1 - points_BN)
    slope_BN, whole_BN, wanted_B1 = weight_BN * speed_BN, weight_BN * room_BN, distance_B.abs()[:, None]
    # A host that reads memory of its own does not wait; elsewhere, and in a graph, all steps are taken.
    stops = points_BN.device.type == "cpu" and not torch.compiler.is_compiling()
    m_B1 = torch.zeros_like(wanted_B1)
    for _ in range(NEWTON_STEPS):
        is_full_BN = m_B1 * speed_BN >= room_BN
        slope_B1 = slope_BN.masked_fill(is_full_BN, 0).sum(dim=1, keepdim=True)
        missing_B1 = wanted_B1 - whole_BN.masked_fill(~is_full_BN, 0).sum(dim=1, keepdim=True)
        next_B1 = torch.where(slope_B1 > 0, missing_B1 / slope_B1, 0).clamp_max(torch.finfo(m_B1.dtype).max)
        if stops and not (next_B1 > m_B1).any():
            break
        m_B1 = torch.maximum(m_B1, next_B1)
    return -towards_BN.sign() * torch.minimum(m_B1 * speed_BN, room_BN) * (weight_BN > 0)


def random_start(noise: Tensor, sample_B: Tensor, epsilon: float, seed: int, counter: int | Tensor) -> None:
    """`engine.kernels.random_start` of the kind "uniform" in an L-inf ball, into `noise`.

    Numbers run in (C, H, W) order whatever the strides of noise.
    """
    uniform_BN = uniform(seed, Stream.ATTACK_START, counter, sample_B, math.prod(noise.shape[1:]))
    noise.copy_((epsilon * (2 * uniform_BN - 1)).view(noise.shape))


# many parameters: those of the op, in one order for all implementations
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> Tensor:
    """`engine.kernels.batch_norm`, differentiable by autograd."""
    out = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    if residual is not None:
        out = out + residual
    return F.relu(out, inplace=True) if relu else out


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


def sgd_update(tensors: SgdTensors, numbers: SgdNumbers) -> None:
    """`engine.kernels.sgd_update` by torch's fused SGD, of gradients that are brought to the weights' format."""
    weights, gradients, momenta, halves = tensors
    gradients = list(gradients)
    other = [
        place
        for place, (weight, gradient) in enumerate(zip(weights, gradients, strict=True))
        if gradient.dtype != weight.dtype or gradient.stride() != weight.stride()
    ]
    if other:
        brought = [torch.empty_like(weights[place], requires_grad=False) for place in other]
        torch._foreach_copy_(brought, [gradients[place] for place in other])
        for place, gradient in zip(other, brought, strict=True):
            gradients[place] = gradient
    in_order = all(map(_is_dense, weights)) and all(
        w.stride() == m.stride() for w, m in zip(weights, momenta, strict=False)
    )
    if in_order and not torch.compiler.is_compiling():
        torch._fused_sgd_(
            weights,
            gradients,
            momenta,
            **numbers._asdict(),
            dampening=0.0,
            maximize=False,
            is_first_step=False,
        )
    else:  # torch's fused SGD takes memory in its order, and torch.compile does not know it
        for place, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            _sgd_step(weight, gradient, momenta[place] if momenta else None, numbers)
    pairs = [(half, weight) for half, weight in zip(halves, weights, strict=True) if half is not None]
    if pairs:
        copies, originals = zip(*pairs, strict=True)
        torch._foreach_copy_(copies, originals)


def _sgd_step(weight: Tensor, gradient: Tensor, momentum: Tensor | None, numbers: SgdNumbers) -> None:
    """The update of one weight of any strides."""
    if numbers.grad_scale is not None:
        gradient = gradient / numbers.grad_scale
    direction = gradient + numbers.weight_decay * weight
    moved = direction
    if momentum is not None:
        moved = numbers.momentum * momentum + direction
        direction = direction + numbers.momentum * moved if numbers.nesterov else moved
    step = numbers.lr * direction
    if numbers.found_inf is not None:
        is_finite = numbers.found_inf == 0
        step = torch.where(is_finite, step, 0)
        moved = moved if momentum is None else torch.where(is_finite, moved, momentum)
    weight.sub_(step)
    if momentum is not None:
        momentum.copy_(moved)


def _is_dense(tensor: Tensor) -> bool:
    """True if its values fill its memory without gaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def batch_sums(sums: BatchSums, batch: MeasuredBatch) -> None:
    """`engine.kernels.batch_sums`, into the three tensors of `sums`."""
    count = float(batch.labels.shape[0])
    loss, zero, full = batch.loss, batch.loss.new_zeros(()), batch.loss.new_full((), count)
    right = [None if given is None else given.argmax(dim=1) == batch.labels for given in batch.logits]
    terms = batch.terms.unbind()
    terms_K = torch.stack([zero if source < 0 else terms[source] for source in batch.sources])
    row = [full, loss * count, *(terms_K * count)]
    row += [zero, zero] if batch.alpha is None else [batch.alpha.sum(), full]
    for right_B in right:
        row += [zero, zero] if right_B is None else [right_B.sum(), full]
    nat_B, adv_B = right[2], right[3]
    if nat_B is None or adv_B is None:
        row += [zero] * 5
    else:
        row += [*count_cases(nat_B, adv_B), full]
    row += [full * batch.entries]
    sums.totals.add_(torch.stack([value.to(torch.float64) for value in row]))
    if batch.alpha is not None:
        sums.histogram.add_(histogram(batch.alpha))
    record = torch.cat((batch.step.to(torch.float64)[None], (~terms_K.isfinite()).to(torch.float64)))
    is_first = ~loss.isfinite() & (sums.record[0] < 0)
    sums.record.copy_(torch.where(is_first, record, sums.record))


def count_cases(nat_B: Tensor, adv_B: Tensor) -> list[Tensor]:
    """Samples where both are right, only the first, none, only the second. nat_B, adv_B: True where right."""
    return [(nat_B & adv_B).sum(), (nat_B & ~adv_B).sum(), (~nat_B & ~adv_B).sum(), (~nat_B & adv_B).sum()]


def histogram(alpha_B: Tensor) -> Tensor:
    """Samples in each of `ALPHA_BINS` equal bins of [0, 1]."""
    bins_B = (alpha_B * ALPHA_BINS).long().clamp(0, ALPHA_BINS - 1)
    return F.one_hot(bins_B, ALPHA_BINS).sum(dim=0).to(torch.float64)


def _norm(images: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(images, dim=tuple(range(1, images.dim())), keepdim=True)
    return norm


def conv3x3(images_BCHW: Tensor, weight_OC33: Tensor, bias_O: Tensor | None) -> Tensor:
    """The convolution of `engine.kernels.conv3x3`, differentiable by autograd."""
    return F.conv2d(images_BCHW, weight_OC33, bias_O, padding=1)


def image_conv3x3(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`engine.kernels.image_conv3x3`, differentiable by autograd."""
    return F.conv2d(_normalised(images, mean, std), weight, bias, padding=1).to(dtype)


def _normalised(images: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
    return images if mean is None or std is None else (images - mean) / std


def image_conv3x3_backward(grad: Tensor, weight: Tensor, std: Tensor | None) -> Tensor:
    """Gradient of the images of `image_conv3x3`."""
    images = grad.new_empty(grad.shape[0], 3, *grad.shape[2:], dtype=weight.dtype)  # for its shape alone
    of_images = _gradients(grad, images, weight, [True, False, False])[0]
    return of_images if std is None else of_images / std


def image_conv3x3_weight(
    grad: Tensor, images: Tensor, weight: Tensor, mean: Tensor | None, std: Tensor | None
) -> Tensor:
    """Gradient of the weight of `image_conv3x3`."""
    return _gradients(grad, _normalised(images, mean, std), weight, [False, True, False])[1]


def _gradients(grad: Tensor, images: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    """Gradients of the images, the weight and the bias of a 3x3 convolution."""
    one = [1, 1]
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        grad.to(weight.dtype), images, weight, None, one, one, one, False, [0, 0], 1, wanted
    )
    return found
