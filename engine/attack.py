"""Projected-gradient attacks on images in [0, 1] (Eq. 2), for training and for evaluation.

The attack differentiates with respect to the image alone: parameters are frozen meanwhile, so that no weight
gradient is computed and no activation is kept for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from engine.config import AttackSpec, nearest, validated
from engine.kernels import pgd_update, random_start
from engine.models.layers import running_statistics_stay


def presets(epsilon: float = 8 / 255, threat_model: str = "Linf") -> dict[str, AttackSpec]:
    """Attacks of the evaluation by name; with the paper's epsilon = 8/255 their step is 2/255.

    fgsm: one step of epsilon from x itself; fgsm-rs: the same from a random start, as the published code does.
    pgd10, pgd20: 10 and 20 steps of epsilon/4 on the cross-entropy from a random start.
    cw: 30 steps of epsilon/4 on the margin of Carlini and Wagner with kappa = 50, from a random start.
    """

    def spec(num_steps: int, step_size: float, **keys: object) -> AttackSpec:
        given = {"threat_model": threat_model, "epsilon": epsilon, "num_steps": num_steps, "step_size": step_size}
        return validated(AttackSpec, {"bn": "eval"} | given | keys)

    return {
        "fgsm": spec(1, epsilon, random_start="none"),
        "fgsm-rs": spec(1, epsilon),
        "pgd10": spec(10, epsilon / 4),
        "pgd20": spec(20, epsilon / 4),
        "cw": spec(30, epsilon / 4, loss="cw", kappa=50.0),
    }


def preset(name: str, epsilon: float, threat_model: str = "Linf") -> AttackSpec:
    """The preset of that name. Raises ValueError for an unknown one."""
    known = presets(epsilon, threat_model)
    if name not in known:
        raise ValueError(f"attack: {name!r} is not known; {nearest(name, known)}")
    return known[name]


def describe(spec: AttackSpec) -> str:
    """All numbers of an attack in one line, epsilon and step in the units of the images."""
    start = {
        "none": "from x",
        "uniform": "random start",
        "gaussian": f"start {spec.gaussian_std:g} N(0,1)",
    }[spec.random_start]
    if spec.random_start == "uniform" and not spec.clamp_start:
        start += " not clamped"
    loss = {"ce": "cross-entropy", "kl": "KL to S(x)", "cw": f"CW margin, kappa {spec.kappa:g}"}[spec.loss]
    unit = in_255 if spec.threat_model == "Linf" else "{:g}".format
    norm = {"Linf": "L-inf", "L2": "L2"}[spec.threat_model]
    steps = f"{spec.num_steps} step{'s' * (spec.num_steps != 1)} of {unit(spec.step_size)}"
    return f"{norm}, epsilon {unit(spec.epsilon)}, {steps}, {start}, {loss}, BN {spec.bn}"


def in_255(value: float) -> str:
    """Write an L-inf length as n/255."""
    return f"{value * 255:.4g}/255"


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
    """Where the attack begins: new images at x_nat plus a random start. Arguments as of `pgd`."""
    if sample is None:
        sample = torch.arange(x_nat.shape[0], device=x_nat.device)
    if start is None:
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
    logits: Callable[[Tensor], Tensor],
    x_adv: Tensor,
    x_nat: Tensor,
    labels: Tensor,
    spec: AttackSpec,
    *,
    loss_scale: float = 1.0,
    counts: Tensor | None = None,
) -> None:
    """The steps of the attack, in place in x_adv. logits: the network, frozen and in the mode of the attack."""
    objective = _objective(logits, x_nat, labels, spec)
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


def _objective(
    logits: Callable[[Tensor], Tensor], x_nat: Tensor, labels: Tensor, spec: AttackSpec
) -> Callable[[Tensor], Tensor]:
    """What the attack maximises, summed over the batch: a sample's gradient must not depend on the batch size."""
    if spec.loss == "ce":
        return lambda x_adv: F.cross_entropy(logits(x_adv), labels, reduction="sum")
    if spec.loss == "cw":
        return lambda x_adv: -F.relu(_margin(logits(x_adv), labels) + spec.kappa).sum()
    with torch.no_grad():
        log_target = F.log_softmax(logits(x_nat), dim=1)
    return lambda x_adv: F.kl_div(
        F.log_softmax(logits(x_adv), dim=1), log_target, reduction="sum", log_target=True
    )


def _margin(logits_BC: Tensor, labels: Tensor) -> Tensor:
    """How far the true class leads the best other one."""
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


@contextmanager
def batch_norm_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """How the model runs inside; every module's own mode comes back afterwards.

    "train": batch statistics, and running statistics move. "eval": running statistics, which stay.
    "batch": batch statistics, and running statistics stay.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train(mode != "eval")
    try:
        with running_statistics_stay(model) if mode == "batch" else nullcontext():
            yield
    finally:
        for module, training in modes:
            module.training = training
