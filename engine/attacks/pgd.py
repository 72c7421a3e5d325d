"""Projected-gradient attacks on images in [0, 1] (Eq. 2), for training and for evaluation.

The attack differentiates with respect to the image alone: parameters are frozen meanwhile, so that no weight
gradient is computed and no activation is kept for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from engine.common.lookup import look_up
from engine.config import AttackSpec, validated
from engine.kernels import pgd_update, random_start
from engine.models.layers import running_statistics_stay

Logits = Callable[[Tensor], Tensor]
Objective = Callable[[Tensor], Tensor]
"""Loss of images that the attack maximises, a sum over the batch: gradients must not depend on the batch size."""


def presets(epsilon: float = 8 / 255, threat_model: str = "Linf") -> dict[str, AttackSpec]:
    """Attacks of the evaluation by name; with the paper's epsilon = 8/255 their step is 2/255.

    fgsm: one step of epsilon from x itself; fgsm-rs: the same from a random start, as the published code does.
    pgd10, pgd20: 10 and 20 steps of epsilon/4 on the cross-entropy from a random start.
    pgd20-dlr: pgd20 on the difference of logits ratio, which no factor on the logits changes.
    cw: 30 steps of epsilon/4 on the margin of Carlini and Wagner with kappa = 50, from a random start.
    """

    def spec(num_steps: int, step_size: float, **keys: object) -> AttackSpec:
        lengths = {"epsilon": epsilon, "num_steps": num_steps, "step_size": step_size}
        return validated(AttackSpec, {"bn": "eval", "threat_model": threat_model} | lengths | keys)

    return {
        "fgsm": spec(1, epsilon, random_start="none"),
        "fgsm-rs": spec(1, epsilon),
        "pgd10": spec(10, epsilon / 4),
        "pgd20": spec(20, epsilon / 4),
        "pgd20-dlr": spec(20, epsilon / 4, loss="dlr"),
        "cw": spec(30, epsilon / 4, loss="cw", kappa=50.0),
    }


def preset(name: str, epsilon: float, threat_model: str = "Linf") -> AttackSpec:
    """The preset of that name. Raises ValueError for an unknown one."""
    return look_up("attack", name, presets(epsilon, threat_model))


def in_255(value: float) -> str:
    """Write an L-inf length as n/255."""
    return f"{value * 255:.4g}/255"


class Norm(NamedTuple):
    """Norm of a threat model: its name and its lengths in words, and its order."""

    name: str
    length: Callable[[float], str]
    order: float


NORMS = {
    "Linf": Norm("L-inf", in_255, torch.inf),
    "L2": Norm("L2", "{:g}".format, 2),
}
_STARTS: dict[str, Callable[[AttackSpec], str]] = {
    "none": lambda spec: "from x",
    "uniform": lambda spec: "random start",
    "gaussian": lambda spec: f"start {spec.gaussian_std:g} N(0,1)",
}


def describe(spec: AttackSpec) -> str:
    """All numbers of an attack in one line, epsilon and step in the units of the images."""
    start = look_up("attack.random_start", spec.random_start, _STARTS)(spec)
    if spec.random_start != "none" and not spec.clamp_start:
        start += " not clamped"
    loss = look_up("attack.loss", spec.loss, ATTACK_LOSSES).describe(spec)
    norm = look_up("attack.threat_model", spec.threat_model, NORMS)
    steps = f"{spec.num_steps} step{'s' * (spec.num_steps != 1)} of {norm.length(spec.step_size)}"
    return f"{norm.name}, epsilon {norm.length(spec.epsilon)}, {steps}, {start}, {loss}, BN {spec.bn}"


# many parameters: a public function, whose users want any one of them alone.
def pgd(
    model: nn.Module,
    x_nat: Tensor,
    labels: Tensor,
    spec: AttackSpec,
    *,
    seed: int = 0,
    counter: int = 0,
    sample: Tensor | None = None,
    start: Tensor | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    loss_scale: float = 1.0,
    counts: Tensor | None = None,
) -> Tensor:
    """Adversarial images x_adv within epsilon of x_nat and within [0, 1] (Eq. 2).

    x_nat: (B, C, H, W) in [0, 1]; labels: (B,) int64.
    The random start depends on (seed, counter, sample) alone; sample: (B,) int64, default 0..B-1.
    start: a perturbation to use instead, of the shape of x_nat.
    autocast: precision of the forward; images and their update keep the dtype of x_nat.
    loss_scale: factor on the loss; the sign and the direction of a gradient do not depend on it, but a half
    precision gradient that would vanish does.
    counts: (2,) int64, to which the zero and the non-finite entries of all gradients are added.
    """
    x_adv = started(x_nat, spec, seed=seed, counter=counter, sample=sample, start=start)

    def logits(images: Tensor) -> Tensor:
        with autocast():
            out: Tensor = model(images)
        return out if out.dtype == torch.float64 else out.float()

    with batch_norm_mode(model, spec.bn), frozen(model):
        climb(logits, x_adv, x_nat, labels, spec, loss_scale=loss_scale, counts=counts)
    return x_adv


def started(
    x_nat: Tensor,
    spec: AttackSpec,
    *,
    seed: int = 0,
    counter: int = 0,
    sample: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """x_nat + random start, in new images: the start of an attack. Arguments as of `pgd`."""
    if sample is None:
        sample = torch.arange(x_nat.shape[0], device=x_nat.device)
    if start is None:
        with record_function("random_start"):
            start = random_start(
                x_nat,
                sample,
                kind=spec.random_start,
                threat_model=spec.threat_model,
                epsilon=spec.epsilon,
                gaussian_std=spec.gaussian_std,
                seed=seed,
                counter=counter,
            )
    x_adv = x_nat + start
    return x_adv.clamp_(0, 1) if spec.clamp_start else x_adv


def climb(
    logits: Logits,
    x_adv: Tensor,
    x_nat: Tensor,
    labels: Tensor,
    spec: AttackSpec,
    *,
    loss_scale: float = 1.0,
    counts: Tensor | None = None,
) -> None:
    """The steps of the attack, in place in x_adv. logits: the network, frozen and in the mode of the attack."""
    objective = look_up("attack.loss", spec.loss, ATTACK_LOSSES).against(logits, x_nat, labels, spec)
    for _ in range(spec.num_steps):
        with torch.enable_grad():
            images = x_adv.detach().requires_grad_()
            with record_function("attack: forward"):
                loss = loss_scale * objective(images)
            with record_function("attack: backward"):
                (grad,) = torch.autograd.grad(loss, images)
        with torch.no_grad(), record_function("attack: update"):
            pgd_update(
                x_adv,
                grad,
                x_nat,
                threat_model=spec.threat_model,
                epsilon=spec.epsilon,
                step_size=spec.step_size,
                counts=counts,
            )


def _cross_entropy(logits: Logits, x_nat: Tensor, labels: Tensor, spec: AttackSpec) -> Objective:
    return lambda x_adv: F.cross_entropy(logits(x_adv), labels, reduction="sum")


def _carlini_wagner(logits: Logits, x_nat: Tensor, labels: Tensor, spec: AttackSpec) -> Objective:
    return lambda x_adv: -F.relu(_margin(logits(x_adv), labels) + spec.kappa).sum()


def _difference_of_logits_ratio(logits: Logits, x_nat: Tensor, labels: Tensor, spec: AttackSpec) -> Objective:
    """-(z_y - max_{c != y} z_c) / (z_(1) - z_(3)), Croce and Hein (2020); of two classes the margin alone."""

    def ratio(x_adv: Tensor) -> Tensor:
        logits_BC = logits(x_adv)
        margin_B = _margin(logits_BC, labels)
        if logits_BC.shape[1] < 3:
            return -margin_B.sum()
        largest_B3 = logits_BC.topk(3, dim=1).values
        return -(margin_B / (largest_B3[:, 0] - largest_B3[:, 2] + 1e-12)).sum()

    return ratio


def _divergence(logits: Logits, x_nat: Tensor, labels: Tensor, spec: AttackSpec) -> Objective:
    with torch.no_grad():
        log_target = F.log_softmax(logits(x_nat), dim=1)
    return lambda x_adv: F.kl_div(
        F.log_softmax(logits(x_adv), dim=1), log_target, reduction="sum", log_target=True
    )


class AttackLoss(NamedTuple):
    """Loss of the attack: in words, and as an objective: against(network, x_nat, labels, spec)."""

    describe: Callable[[AttackSpec], str]
    against: Callable[[Logits, Tensor, Tensor, AttackSpec], Objective]


ATTACK_LOSSES = {
    "ce": AttackLoss(lambda spec: "cross-entropy", _cross_entropy),
    "kl": AttackLoss(lambda spec: "KL to S(x)", _divergence),
    "cw": AttackLoss(lambda spec: f"CW margin, kappa {spec.kappa:g}", _carlini_wagner),
    "dlr": AttackLoss(lambda spec: "DLR", _difference_of_logits_ratio),
}


def _margin(logits_BC: Tensor, labels: Tensor) -> Tensor:
    """z_y - max_{c != y} z_c."""
    true_B1 = logits_BC.gather(1, labels[:, None])
    others_BC = logits_BC.scatter(1, labels[:, None], -torch.inf)
    return true_B1.squeeze(1) - others_BC.amax(dim=1)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Parameters need no gradient inside."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class BatchNormMode(NamedTuple):
    """by_batch: by statistics of the batch, else by the running ones. tracked: these take part, and may move."""

    by_batch: bool
    tracked: bool


BN_MODES = {
    "train": BatchNormMode(by_batch=True, tracked=True),
    "eval": BatchNormMode(by_batch=False, tracked=True),
    "batch": BatchNormMode(by_batch=True, tracked=False),
}


def bn_mode(name: str) -> BatchNormMode:
    """Mode of BatchNorm during an attack. Raises ValueError for an unknown name."""
    return look_up("attack.bn", name, BN_MODES)


@contextmanager
def batch_norm_mode(model: nn.Module, name: str) -> Iterator[None]:
    """The model runs in that mode of `BN_MODES` inside; every module's own comes back afterwards."""
    mode = bn_mode(name)
    modes = [(module, module.training) for module in model.modules()]
    model.train(mode.by_batch)
    try:
        with nullcontext() if mode.tracked else running_statistics_stay(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
