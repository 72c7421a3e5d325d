"""The losses of each sample, (B,), as functions of logits. Repositories: where the formula is coded so."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kl(target: Tensor, logits: Tensor, temperature: float = 1.0, floor: float = 0.0) -> Tensor:
    """KL(target || logits), as code computes what papers write KL(S || T). floor: added in log p, p the target."""
    p = F.softmax(target / temperature, dim=1)
    log_p = torch.log(p + floor) if floor else F.log_softmax(target / temperature, dim=1)
    return (p * (log_p - F.log_softmax(logits / temperature, dim=1))).sum(dim=1)


def of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """P(x | y), the probability of the label."""
    return F.softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)


def trust(t_a: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Trust in the teacher, alpha of IAD: P_T(x~ | y) ** beta (Eq. 4)."""
    return of_label(t_a, labels) ** beta


def rslad(s_x: Tensor, s_a: Tensor, t_x: Tensor, clean: float = 1 / 6, floor: float = 0.0) -> Tensor:
    """RSLAD: 5/6 KL(T(x) || S(a)) + 1/6 KL(T(x) || S(x)). zibojia/RSLAD, whose floor is 1e-5."""
    return (1 - clean) * kl(t_x, s_a, floor=floor) + clean * kl(t_x, s_x, floor=floor)


def adaad(s_x: Tensor, s_a: Tensor, t_x: Tensor, t_a: Tensor, al: float = 1.0) -> Tensor:
    """AdaAD: al KL(T(a) || S(a)) + (1 - al) KL(T(x) || S(x)). boyellow/AdaAD."""
    return al * kl(t_a, s_a) + (1 - al) * kl(t_x, s_x)


def adaiad(s_a: Tensor, t_a: Tensor, tau: float = 30.0) -> Tensor:
    """AdaIAD in its warm-up, al = 1: tau^2 KL(T(a) || S(a); tau). boyellow/AdaAD."""
    return tau**2 * kl(t_a, s_a, tau)


def adaiad_self(s_x: Tensor, s_a: Tensor, t_a: Tensor, labels: Tensor, beta: float = 0.1) -> Tensor:
    """AdaIAD's second term after the warm-up: (1 - L) KL(S(x) || S(a)), L = P_T(a | y) ** beta; S(x) is live."""
    return (1 - trust(t_a, labels, beta)) * kl(s_x, s_a)


def igdm(s_a: Tensor, s_m: Tensor, t_a: Tensor, t_m: Tensor) -> Tensor:
    """IGDM: KL(T(x+d) - T(x-d) || S(x+d) - S(x-d)), d = a - x. HongsinLee/saad, igdm.py."""
    return kl(t_a - t_m, s_a - s_m)


def renyi_entropy(logits: Tensor, order: float = 1.0) -> Tensor:
    """Renyi entropy of softmax(logits); order 1: Shannon's."""
    p = F.softmax(logits, dim=1)
    if order == 1:
        return -(p * p.log()).sum(dim=1)
    return (p**order).sum(dim=1).log() / (1 - order)


def saad_weights(t_a: Tensor, order: float = 1.0) -> tuple[Tensor, Tensor]:
    """SAAD's weights of the robust and of the clean terms: w = 5 (H - min H), and 1 - w scaled to [0, 1]."""
    entropy = renyi_entropy(t_a, order)
    w = 5 * (entropy - entropy.min())
    return w, 1 - (w - w.min()) / (w.max() - w.min() + 1e-8)


def margin(s_a: Tensor, labels: Tensor, floor: float = 1e-12) -> Tensor:
    """MART's margin: -log(1.0001 - max_{k != y} p_k(a)). YisenWang/MART, with 1e-12 inside."""
    p = F.softmax(s_a, dim=1)
    others = p.masked_fill(F.one_hot(labels, p.shape[1]).bool(), 0).amax(dim=1)
    return -torch.log(1.0001 - others + floor)


def mart(s_x: Tensor, s_a: Tensor, labels: Tensor, beta: float = 5.0, floor: float = 1e-12) -> Tensor:
    """MART: CE(S(a), y), the margin, and beta (1.0000001 - P_S(x | y)) KL(S(x) || S(a)), of which all is live."""
    robust = F.cross_entropy(s_a, labels, reduction="none") + margin(s_a, labels, floor)
    p = F.softmax(s_x, dim=1)
    divergence = (p * (p.log() - torch.log(F.softmax(s_a, dim=1) + floor))).sum(dim=1)
    return robust + beta * (1.0000001 - of_label(s_x, labels)) * divergence
