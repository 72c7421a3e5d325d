"""The loss of every method: six terms per sample, weighted by how far the teacher can be trusted.

Shape suffixes: B batch, C classes, K the six terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DistillLoss(NamedTuple):
    """What `distill_loss` returns; only `loss` carries a gradient.

    loss: scalar, mean over the batch. alpha: (B,), trust in the teacher, 1 where no T_at(x~) is given.
    terms: (6,), batch means of the unweighted terms, 0 for a term of zero weight.
    """

    loss: Tensor
    alpha: Tensor
    terms: Tensor


def distill_loss(
    s_adv: Tensor | None,
    labels: Tensor,
    *,
    s_nat: Tensor | None = None,
    t_at_nat: Tensor | None = None,
    t_at_adv: Tensor | None = None,
    t_st_adv: Tensor | None = None,
    weights: Sequence[tuple[float, float]],
    tau: float = 1.0,
    tau_self: float = 1.0,
    beta: float = 0.1,
    detach_self: bool = False,
    sample_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> DistillLoss:
    """Weighted sum of the six terms of the paper's Table 1, averaged over the batch.

    loss = mean_i v_i sum_k (a_k + b_k alpha_i) l_ik,   alpha_i = softmax(T_at(x~_i))[y_i] ** beta   (Eq. 3-4)

    l_0 CE(S(x), y), l_1 CE(S(x~), y), l_2 KL(S(x) || S(x~)) at temperature tau_self, and at temperature tau
    l_3 KL(T_at(x) || S(x~)), l_4 KL(T_at(x~) || S(x~)), l_5 KL(T_st(x~) || S(x~)), with
    KL(p || q) = sum_c p_c (log p_c - log q_c). Any factor tau^2 belongs to the weights.

    s_adv, s_nat, t_at_nat, t_at_adv, t_st_adv: logits (B, C) of one floating dtype, None where absent.
    labels: (B,) int64. weights: six pairs (a, b). detach_self: no gradient into S(x) through l_2.
    sample_weights: v, (B,), default 1; the mean still divides by B. label_smoothing: of l_0 and l_1 alone.
    Half precision is computed in float32. Only s_adv and s_nat receive a gradient.

    Raises ValueError for a term of nonzero weight whose logits are absent, and for shapes that do not fit.
    """
    logits = {
        "s_nat": s_nat, "s_adv": s_adv, "t_at_nat": t_at_nat, "t_at_adv": t_at_adv, "t_st_adv": t_st_adv,
    }  # fmt: skip
    _check(logits, labels, weights, tau, tau_self, sample_weights)
    s_nat, s_adv, t_at_nat, t_at_adv, t_st_adv = (
        None if given is None else given if given.dtype == torch.float64 else given.float()
        for given in logits.values()
    )
    example = next(given for given in (s_adv, s_nat) if given is not None)

    def cross_entropy(s_BC: Tensor | None) -> Tensor:
        assert s_BC is not None
        return F.cross_entropy(s_BC, labels, reduction="none", label_smoothing=label_smoothing)

    def divergence(target_BC: Tensor | None, temperature: float) -> Tensor:
        assert target_BC is not None
        assert s_adv is not None
        log_p_BC = F.log_softmax(target_BC / temperature, dim=1)
        log_q_BC = F.log_softmax(s_adv / temperature, dim=1)
        return F.kl_div(log_q_BC, log_p_BC, reduction="none", log_target=True).sum(dim=1)

    with torch.no_grad():
        alpha_B = torch.ones_like(example[:, 0])
        if t_at_adv is not None:
            alpha_B = trust(t_at_adv, labels, beta)

    terms: tuple[Callable[[], Tensor], ...] = (
        lambda: cross_entropy(s_nat),
        lambda: cross_entropy(s_adv),
        lambda: divergence(s_nat.detach() if detach_self and s_nat is not None else s_nat, tau_self),
        lambda: divergence(_constant(t_at_nat), tau),
        lambda: divergence(_constant(t_at_adv), tau),
        lambda: divergence(_constant(t_st_adv), tau),
    )
    loss_B = torch.zeros_like(alpha_B)
    means_K = []
    for (a, b), term in zip(weights, terms, strict=True):
        if a == 0 and b == 0:
            means_K.append(alpha_B.new_zeros(()))
            continue
        term_B = term()
        loss_B = loss_B + (a + b * alpha_B if b else a) * term_B
        means_K.append(term_B.detach().mean())
    if sample_weights is not None:
        loss_B = loss_B * sample_weights.detach().to(loss_B.dtype)
    return DistillLoss(loss_B.mean(), alpha_B, torch.stack(means_K))


def trust(t_at_adv: Tensor, labels: Tensor, beta: float) -> Tensor:
    """How far the teacher is trusted on each sample: alpha_i = softmax(T_at(x~_i))[y_i] ** beta (Eq. 4).

    t_at_adv: logits (B, C). labels: (B,) int64. Returns (B,), in [0, 1].
    """
    log_p_B = F.log_softmax(t_at_adv, dim=1).gather(1, labels[:, None]).squeeze(1)
    # A probability that underflows to 0 gives alpha 1 at beta = 0, not 0 * -inf.
    return (beta * log_p_B.clamp_min(torch.finfo(log_p_B.dtype).min)).exp()


def _constant(logits: Tensor | None) -> Tensor | None:
    return None if logits is None else logits.detach()


_READS = (
    ("s_nat",),
    ("s_adv",),
    ("s_adv", "s_nat"),
    ("s_adv", "t_at_nat"),
    ("s_adv", "t_at_adv"),
    ("s_adv", "t_st_adv"),
)


def _check(
    logits: dict[str, Tensor | None],
    labels: Tensor,
    weights: Sequence[tuple[float, float]],
    tau: float,
    tau_self: float,
    sample_weights: Tensor | None,
) -> None:
    if len(weights) != len(_READS):
        raise ValueError(f"weights: six pairs (a, b) are needed, got {len(weights)}")
    for k, ((a, b), reads) in enumerate(zip(weights, _READS, strict=True)):
        needed = reads if (a or b) else ()
        for name in (*needed, *(("t_at_adv",) if b else ())):
            if logits[name] is None:
                raise ValueError(f"{name} is absent, and weights[{k}] = ({a:g}, {b:g}) needs it")
    given = {name: value for name, value in logits.items() if value is not None}
    if "s_adv" not in given and "s_nat" not in given:
        raise ValueError("s_adv and s_nat are both absent: there is no student to train")
    shape = next(iter(given.values())).shape
    for name, value in given.items():
        if value.dim() != 2 or value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected (B, C) = {tuple(shape)}")
        if not value.dtype.is_floating_point:
            raise ValueError(f"{name} has dtype {value.dtype}, expected a floating one")
    if labels.shape != shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: expected int64 of shape ({shape[0]},), got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if sample_weights is not None and sample_weights.shape != shape[:1]:
        raise ValueError(f"sample_weights: expected shape ({shape[0]},), got {tuple(sample_weights.shape)}")
    if (
        labels.device.type == "cpu"
        and labels.numel()
        and not 0 <= int(labels.min()) <= int(labels.max()) < shape[1]
    ):
        # On an accelerator the gather asserts on the device: a check here would wait for it.
        raise ValueError(f"labels: expected 0 <= label < {shape[1]}, got {int(labels.min())}..{int(labels.max())}")
    for name, temperature in (("tau", tau), ("tau_self", tau_self)):
        if not temperature > 0:
            raise ValueError(f"{name} must be positive, got {temperature:g}")
