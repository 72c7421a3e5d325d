"""The loss of each method on a batch, with its forwards in their order: BatchNorm's statistics depend on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lib.steps.textbook import formulas
from bench.lib.steps.textbook.formulas import kl
from bench.lib.steps.textbook.parts import StepParts

BatchLoss = Callable[[StepParts, Tensor, Tensor, Tensor], Tensor]


def standard(step: StepParts, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy on natural images."""
    return F.cross_entropy(step.student(x), labels)


def adversarial(step: StepParts, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """Madry et al., FGSM-RS, N-FGSM: cross-entropy on adversarial images."""
    return F.cross_entropy(step.student(a), labels)


def trades(step: StepParts, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """Zhang et al.: natural cross-entropy and six times the divergence between the two predictions, S(x) anew."""
    clean = F.cross_entropy(step.student(x), labels)
    s_a = step.student(a)
    return clean + step.setting.trades_lambda * kl(step.student(x), s_a).mean()


def mart(step: StepParts, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """Wang et al. (2020); the published code has 1e-12 inside its logarithms."""
    s_x, s_a = step.student(x), step.student(a)
    floor = 1e-12 if step.setting.official else 0.0
    return formulas.mart(s_x, s_a, labels, step.setting.mart_beta, floor).mean()


# ---------------------------------------------------------------- the IAD paper's


def clean_forward(step: StepParts, x: Tensor, labels: Tensor) -> Tensor | float:
    """S(x) for the running statistics; in the published code for a cross-entropy of weight 0, backward and all."""
    if step.setting.official:
        return 0 * F.cross_entropy(step.student(x), labels)
    unread(step, x)
    return 0.0


@torch.no_grad()
def unread(step: StepParts, images: Tensor) -> None:
    """A forward of the student for the running statistics alone."""
    step.student(images)


def ard(step: StepParts, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """Goldblum et al., lambda = 0 and temperature 1."""
    s_a = step.student(a)
    clean = clean_forward(step, x, labels)
    return kl(taught(step, x), s_a).mean() + clean


@torch.no_grad()
def taught(step: StepParts, images: Tensor) -> Tensor:
    """Logits of the robust teacher, constant."""
    logits: Tensor = step.teacher(images)
    return logits


def introspection(step: StepParts, x: Tensor, a: Tensor) -> Tensor:
    """S(x) of IAD-I, which runs after the idle forwards of the published code."""
    if step.setting.official:
        step.student(a)
        step.student(x)
    s_x: Tensor = step.student(x)
    return s_x


def iad1(step: StepParts, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """IAD-I after its warm-up, lambda = 0 and temperature 1 (Algorithm 1)."""
    s_a = step.student(a)
    s_x = introspection(step, x, a)
    alpha = formulas.trust(taught(step, a), labels, step.setting.beta)
    return (kl(taught(step, x), s_a) + (1 - alpha) * kl(s_x, s_a)).mean()


def iad1_down(step: StepParts, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """IAD-I whose teacher term is weighted too (Table 8)."""
    s_a = step.student(a)
    s_x = introspection(step, x, a)
    alpha = formulas.trust(taught(step, a), labels, step.setting.beta)
    return (alpha * kl(taught(step, x), s_a) + (1 - alpha) * kl(s_x, s_a)).mean()


def akd2(step: StepParts, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """Chen et al. with the weights of the published code, temperature 1."""
    setting, s_a = step.setting, step.student(a)
    with torch.no_grad():
        n_a = step.standard_teacher(a)
    of_t, of_n = kl(taught(step, a), s_a).mean(), kl(n_a, s_a).mean()
    return setting.lam1 * F.cross_entropy(s_a, labels) + setting.lam2 * of_t + setting.lam3 * of_n


def iad2(step: StepParts, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """IAD-II after its warm-up; the self term has the weight lambda_2 too in the published code."""
    setting, s_a, s_x = step.setting, step.student(a), step.student(x)
    with torch.no_grad():
        t_a, n_a = step.teacher(a), step.standard_teacher(a)
        if setting.official:
            t_a = step.teacher(a)  # a second time, for alpha
    alpha = formulas.trust(t_a, labels, setting.beta)
    gamma = (setting.lam2 if setting.official else 1.0) * (1 - alpha)
    per_sample = setting.lam2 * alpha * kl(t_a, s_a) + gamma * kl(s_x, s_a)
    return setting.lam1 * F.cross_entropy(s_a, labels) + setting.lam3 * kl(n_a, s_a).mean() + per_sample.mean()


# ---------------------------------------------------------------- after it


def mean_as_coded(step: StepParts, per_sample: Tensor, num_classes: int) -> Tensor:
    """The mean over the batch, over its classes too in the code of RSLAD, MTARD and AdaAD for CIFAR-10."""
    return per_sample.mean() / (num_classes if step.setting.official else 1)


def rslad(step: StepParts, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """Zi et al.; log(target + 1e-5) in the published code, which moves the value and no gradient."""
    s_a, s_x = step.student(a), step.student(x)
    floor = 1e-5 if step.setting.official else 0.0
    per_sample = formulas.rslad(s_x, s_a, taught(step, x), step.setting.rslad_clean, floor)
    return mean_as_coded(step, per_sample, s_a.shape[1])


def natural(step: StepParts, x: Tensor, *, learns: bool) -> Tensor:
    """S(x), with a gradient where a term reads it."""
    with torch.set_grad_enabled(learns):
        s_x: Tensor = step.student(x)
    return s_x


def adaad(step: StepParts, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """Huang et al."""
    s_x, s_a = natural(step, x, learns=step.setting.adaad_al != 1), step.student(a)
    per_sample = formulas.adaad(s_x, s_a, taught(step, x), taught(step, a), step.setting.adaad_al)
    return mean_as_coded(step, per_sample, s_a.shape[1])


def adaiad(step: StepParts, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """Huang et al. with IAD: S(x) idle, S(a), S(x); as coded another S(x), for (1 - al) CE(S(x), y)."""
    setting, al = step.setting, step.setting.adaiad_al
    in_warmup = setting.epoch - 1 < setting.adaiad_warmup * setting.epochs
    unread(step, x)
    s_a, t_a = step.student(a), taught(step, a)
    s_x = natural(step, x, learns=al != 1 or not in_warmup)
    per_sample = formulas.adaiad(s_a, t_a, setting.adaiad_tau)
    if not in_warmup:
        per_sample = per_sample + formulas.adaiad_self(s_x, s_a, t_a, labels, setting.beta)
        if setting.official:
            s_x = natural(step, x, learns=al != 1)
    return al * per_sample.mean() + (1 - al) * F.cross_entropy(s_x, labels)


def mtard(step: StepParts, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """Zhao et al.; the weights are updated before their use, and log(target + 1e-5) moves them as coded."""
    s_a, s_x = step.student(a), step.student(x)
    with torch.no_grad():
        n_x = step.standard_teacher(x)
    floor = 1e-5 if step.setting.official else 0.0
    of_a = mean_as_coded(step, kl(taught(step, a), s_a, floor=floor), s_a.shape[1])
    of_x = mean_as_coded(step, kl(n_x, s_x, floor=floor), s_a.shape[1])
    wa, wn = step.balance.follow(of_a.item(), of_x.item())
    return wa * of_a + wn * of_x


def saad(step: StepParts, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """Lee et al.; IGDM's term grows with the epochs."""
    setting, m = step.setting, 2 * x - a
    s_a, s_m = step.student(a), step.student(m)
    s_x = natural(step, x, learns=setting.saad_b != 0)
    t_a = taught(step, a)
    w, certain = formulas.saad_weights(t_a, setting.saad_gamma)
    growth = setting.saad_al * setting.epoch / setting.epochs
    robust = kl(t_a, s_a) + growth * formulas.igdm(s_a, s_m, t_a, taught(step, m))
    return (w * robust + setting.saad_b * certain * kl(taught(step, x), s_x)).mean()


# ---------------------------------------------------------------- IGDM beside another method


def matching(step: StepParts, x: Tensor, a: Tensor, s_a: Tensor, s_m: Tensor) -> Tensor:
    """IGDM's term (Lee et al.), which grows with the epochs; as coded it is e / 200 of itself in any run."""
    setting = step.setting
    growth = setting.epoch / (200 if setting.official else setting.epochs)
    terms = formulas.igdm(s_a, s_m, taught(step, a), taught(step, 2 * x - a))
    return setting.igdm_al * growth * terms.mean()


def ard_igdm(step: StepParts, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """ARD and IGDM."""
    s_a, s_m = step.student(a), step.student(2 * x - a)
    clean = clean_forward(step, x, labels)
    return kl(taught(step, x), s_a).mean() + clean + matching(step, x, a, s_a, s_m)


def iad1_igdm(step: StepParts, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """IAD-I and IGDM."""
    s_a, s_m = step.student(a), step.student(2 * x - a)
    s_x = introspection(step, x, a)
    alpha = formulas.trust(taught(step, a), labels, step.setting.beta)
    iad = (kl(taught(step, x), s_a) + (1 - alpha) * kl(s_x, s_a)).mean()
    return iad + matching(step, x, a, s_a, s_m)


def rslad_igdm(step: StepParts, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """RSLAD and IGDM, whose authors average RSLAD over the batch alone."""
    s_a, s_m, s_x = step.student(a), step.student(2 * x - a), step.student(x)
    base = formulas.rslad(s_x, s_a, taught(step, x), step.setting.rslad_clean).mean()
    return base + matching(step, x, a, s_a, s_m)


def adaad_igdm(step: StepParts, x: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    """AdaAD and IGDM, whose authors average AdaAD over the batch alone."""
    s_x = natural(step, x, learns=step.setting.adaad_al != 1)
    s_a, s_m = step.student(a), step.student(2 * x - a)
    base = formulas.adaad(s_x, s_a, taught(step, x), taught(step, a), step.setting.adaad_al).mean()
    return base + matching(step, x, a, s_a, s_m)


METHOD_LOSSES: dict[str, BatchLoss] = {
    "st": standard,
    "at": adversarial,
    "trades": trades,
    "mart": mart,
    "fgsm-rs": adversarial,
    "n-fgsm": adversarial,
    "ard": ard,
    "akd2": akd2,
    "iad1": iad1,
    "iad1-down": iad1_down,
    "iad2": iad2,
    "rslad": rslad,
    "adaad": adaad,
    "adaiad": adaiad,
    "mtard": mtard,
    "saad": saad,
    "ard+igdm": ard_igdm,
    "iad1+igdm": iad1_igdm,
    "rslad+igdm": rslad_igdm,
    "adaad+igdm": adaad_igdm,
}
