"""Projected-gradient attacks on images in [0, 1] (Eq. 2), for training and for evaluation.

The attack differentiates with respect to the image alone: parameters are frozen meanwhile, so that no weight
gradient is computed and no activation is kept for one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.profiler import record_function

from engine.common.lookup import look_up, nearest
from engine.config import AttackSpec, validated
from engine.kernels import pgd_update, random_start
from engine.models.layers import StemNetwork, release_cached, running_statistics_stay
from engine.objectives import ATTACK_LOSSES

Logits = Callable[[Tensor], Tensor]


class Division(NamedTuple):
    """A student in two parts, of which an attack differentiates the second alone: logits = rest(stem(images)).

    update: a step (x_adv, grad, x_nat, *, epsilon, step_size, counts) by the gradient to what `rest` is given.
    """

    stem: Callable[[Tensor], Tensor]
    rest: Logits
    update: Callable[..., object]


class Attacked(NamedTuple):
    """Networks of an attack, frozen and in its mode.

    teacher, t_nat: the robust teacher, and T(x), where the loss needs them. division: of the student, where it is
    divided; its update is of L-inf.
    """

    student: Logits
    teacher: Logits | None = None
    t_nat: Tensor | None = None
    division: Division | None = None


Objective = Callable[[Tensor, Tensor], Tensor]
"""Loss of images x~ and the student's logits S(x~) that the attack maximises.

A sum over the batch: gradients must not depend on the batch size.
"""


PRESETS = ("fgsm", "fgsm-rs", "pgd10", "pgd20", "pgd20-dlr", "cw")
"""The usual attacks of an evaluation, of those that `preset` makes."""
# Name -> number of steps, length of a step as a part of epsilon, and what differs from PGD on the cross-entropy.
_FIXED: dict[str, tuple[int, float, dict[str, object]]] = {
    "fgsm": (1, 1, {"random_start": "none"}),
    "fgsm-rs": (1, 1, {}),
    "cw": (30, 1 / 4, {"loss": "cw", "kappa": 50.0}),
}
_LOSSES: dict[str, dict[str, object]] = {
    "": {},
    "-dlr": {"loss": "dlr"},
    "-cw": {"loss": "cw", "kappa": 50.0},
}
PGD_NAMES = tuple(f"pgdN{loss}" for loss in _LOSSES)
"""Names with any number of steps for N."""
PGD_NAME = re.compile(rf"pgd([1-9][0-9]{{0,5}})({'|'.join(_LOSSES)})")


def presets(epsilon: float = 8 / 255, threat_model: str = "Linf") -> dict[str, AttackSpec]:
    """The attacks of `PRESETS`; with the paper's epsilon = 8/255 the steps of PGD and CW are of 2/255."""
    return {name: preset(name, epsilon, threat_model) for name in PRESETS}


def preset(name: str, epsilon: float, threat_model: str = "Linf") -> AttackSpec:
    """The attack of the evaluation of that name.

    fgsm: one step of epsilon from x itself; fgsm-rs: the same from a random start, as the published code does.
    pgdN, as pgd20: N steps of epsilon/4 on the cross-entropy from a random start.
    pgdN-dlr: pgdN on the difference of logits ratio, which no factor on the logits changes.
    pgdN-cw: pgdN on the margin of Carlini and Wagner with kappa = 50; cw: the same with 30 steps.
    Raises ValueError for an unknown name.
    """
    if match := PGD_NAME.fullmatch(name):
        num_steps, part, keys = int(match[1]), 1 / 4, _LOSSES[match[2]]
    elif name in _FIXED:
        num_steps, part, keys = _FIXED[name]
    else:
        raise ValueError(f"attack: {name!r} is not known; {nearest(name, (*PRESETS, *PGD_NAMES))}")
    lengths = {"epsilon": epsilon, "num_steps": num_steps, "step_size": epsilon * part}
    return validated(AttackSpec, {"bn": "eval", "threat_model": threat_model} | lengths | keys)


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


def _start_ball(spec: AttackSpec) -> str:
    if spec.start_epsilon is None:
        return ""
    return f" in {look_up('attack.threat_model', spec.threat_model, NORMS).length(spec.start_epsilon)}"


_STARTS: dict[str, Callable[[AttackSpec], str]] = {
    "none": lambda spec: "from x",
    "uniform": lambda spec: "random start" + _start_ball(spec),
    "gaussian": lambda spec: f"start {spec.gaussian_std:g} N(0,1)",
}


def describe(spec: AttackSpec) -> str:
    """All numbers of an attack in one line, epsilon and step in the units of the images."""
    start = look_up("attack.random_start", spec.random_start, _STARTS)(spec)
    if spec.random_start != "none" and not spec.clamp_start:
        start += " not clamped"
    loss = look_up("attack.loss", spec.loss, ATTACK_LOSSES).text.format(kappa=spec.kappa, slope=spec.slope)
    norm = look_up("attack.threat_model", spec.threat_model, NORMS)
    steps = f"{spec.num_steps} step{'s' * (spec.num_steps != 1)} of {norm.length(spec.step_size)}"
    if not spec.project:
        steps += " not projected"
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
    teacher: nn.Module | None = None,
) -> Tensor:
    """Adversarial images x_adv within epsilon of x_nat, where the attack projects, and within [0, 1] (Eq. 2).

    x_nat: (B, C, H, W) in [0, 1]; labels: (B,) int64, or of mixed images the share of each class, (B, classes).
    The random start depends on (seed, counter, sample) alone; sample: (B,) int64, default 0..B-1.
    start: a perturbation to use instead, of the shape of x_nat.
    autocast: precision of the forward; images and their update keep the dtype of x_nat.
    loss_scale: factor on the loss; the sign and the direction of a gradient do not depend on it, but a half
    precision gradient that would vanish does.
    counts: (2,) int64, to which the zero and the non-finite entries of all gradients are added.
    teacher: the robust one, in evaluation mode, for a loss that runs it; without it ValueError is raised.
    """
    x_adv = started(x_nat, spec, seed=seed, counter=counter, sample=sample, start=start)

    def passed(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(inputs: Tensor) -> Tensor:
            with autocast():
                return network(inputs)

        return forward

    def logits_of(network: Callable[[Tensor], Tensor]) -> Logits:
        return lambda inputs: at_least_float(passed(network)(inputs))

    loss = look_up("attack.loss", spec.loss, ATTACK_LOSSES)
    if not loss.teacher:
        teacher = None  # it is not asked
    attacked = Attacked(logits_of(model))
    if isinstance(model, StemNetwork) and model.is_divisible:
        division = Division(passed(model.stem), logits_of(model.rest), model.stem_update)
        attacked = attacked._replace(division=division)
    with batch_norm_mode(model, spec.bn), frozen(model), nullcontext() if teacher is None else frozen(teacher):
        if teacher is not None:
            asked = logits_of(teacher)
            with torch.no_grad():
                attacked = attacked._replace(teacher=asked, t_nat=asked(x_nat) if loss.reads else None)
        climb(attacked, x_adv, x_nat, labels, spec, loss_scale=loss_scale, counts=counts)
    return x_adv


def started(
    x_nat: Tensor,
    spec: AttackSpec,
    *,
    seed: int = 0,
    counter: int | Tensor = 0,
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
                epsilon=spec.epsilon if spec.start_epsilon is None else spec.start_epsilon,
                gaussian_std=spec.gaussian_std,
                seed=seed,
                counter=counter,
            )
    x_adv = x_nat + start
    return x_adv.clamp_(0, 1) if spec.clamp_start else x_adv


def climb(
    attacked: Attacked,
    x_adv: Tensor,
    x_nat: Tensor,
    labels: Tensor,
    spec: AttackSpec,
    *,
    loss_scale: float = 1.0,
    counts: Tensor | None = None,
) -> None:
    """The steps of the attack, in place in x_adv. Raises ValueError for mixed labels where its loss knows one."""
    if labels.is_floating_point() and look_up("attack.loss", spec.loss, ATTACK_LOSSES).one_label:
        raise ValueError(f"attack.loss: {spec.loss!r} is of one label an image, and these are mixed ones")
    objective = look_up("attack.loss", spec.loss, _OBJECTIVES)(attacked, x_nat, labels, spec)
    division = _division(attacked, spec)
    epsilon = spec.epsilon if spec.project else torch.inf
    for _ in range(spec.num_steps):
        grad = _gradient(division, objective, x_adv, loss_scale)
        with torch.no_grad(), record_function("attack: update"):
            division.update(x_adv, grad, x_nat, epsilon=epsilon, step_size=spec.step_size, counts=counts)
        del grad  # which else is kept through the passes of the next step


def _gradient(division: Division, objective: Objective, x_adv: Tensor, loss_scale: float) -> Tensor:
    """The gradient of the loss to what the second part of the student is given."""
    with record_function("attack: forward"):
        with torch.no_grad():
            inputs = division.stem(x_adv)
        with torch.enable_grad():
            inputs = inputs.detach().requires_grad_()
            loss = loss_scale * objective(inputs, division.rest(inputs))
    with record_function("attack: backward"):
        (grad,) = torch.autograd.grad(loss, inputs)
    return grad


def _division(attacked: Attacked, spec: AttackSpec) -> Division:
    """The student's where the attack can use it; else all of the student is differentiated."""
    loss = look_up("attack.loss", spec.loss, ATTACK_LOSSES)
    if attacked.division is not None and spec.threat_model == "Linf" and not loss.reads_images:
        return attacked.division
    return Division(lambda images: images, attacked.student, partial(pgd_update, threat_model=spec.threat_model))


def _cross_entropy(attacked: Attacked, x_nat: Tensor, labels: Tensor, spec: AttackSpec) -> Objective:
    return lambda _, logits_BC: F.cross_entropy(logits_BC, labels, reduction="sum")


def _carlini_wagner(attacked: Attacked, x_nat: Tensor, labels: Tensor, spec: AttackSpec) -> Objective:
    return lambda _, logits_BC: -F.relu(_margin(logits_BC, labels) + spec.kappa).sum()


def _difference_of_logits_ratio(attacked: Attacked, x_nat: Tensor, labels: Tensor, spec: AttackSpec) -> Objective:
    """-(z_y - max_{c != y} z_c) / (z_(1) - z_(3)), Croce and Hein (2020); of two classes the margin alone."""

    def ratio(_: Tensor, logits_BC: Tensor) -> Tensor:
        margin_B = _margin(logits_BC, labels)
        if logits_BC.shape[1] < 3:
            return -margin_B.sum()
        largest_B3 = logits_BC.topk(3, dim=1).values
        return -(margin_B / (largest_B3[:, 0] - largest_B3[:, 2] + 1e-12)).sum()

    return ratio


def _divergence(attacked: Attacked, x_nat: Tensor, labels: Tensor, spec: AttackSpec) -> Objective:
    with torch.no_grad():
        log_target = F.log_softmax(attacked.student(x_nat), dim=1)
    return lambda _, logits_BC: _kl(log_target, logits_BC)


def _divergence_from_teacher(attacked: Attacked, x_nat: Tensor, labels: Tensor, spec: AttackSpec) -> Objective:
    """KL(T(x) || S(x~)), T(x) fixed: the attack of RSLAD (Zi et al., 2021)."""
    log_target = F.log_softmax(_given("T(x)", attacked.t_nat, spec), dim=1)
    return lambda _, logits_BC: _kl(log_target, logits_BC)


def _divergence_from_moving_teacher(
    attacked: Attacked, x_nat: Tensor, labels: Tensor, spec: AttackSpec
) -> Objective:
    """KL(T(x~) || S(x~)), with the gradient through both networks: the attack of AdaAD (Huang et al., 2023)."""
    teacher = _given("the teacher", attacked.teacher, spec)
    return lambda x_adv, logits_BC: _kl(F.log_softmax(teacher(x_adv), dim=1), logits_BC)


def _divergence_from_linear_teacher(
    attacked: Attacked, x_nat: Tensor, labels: Tensor, spec: AttackSpec
) -> Objective:
    """KL(p || S(x~)) of SAAD: p = softmax(T(x)), but p_y + slope <grad_x p_y, x~ - x> at y; p is not normalised.

    A p_y that this makes negative is 1e-12: its logarithm would be NaN, and so the gradient.
    """
    teacher = _given("the teacher", attacked.teacher, spec)
    with torch.enable_grad():
        images = x_nat.detach().requires_grad_()
        target_BC = F.softmax(teacher(images), dim=1)
        true_B1 = target_BC.gather(1, labels[:, None])
        (slope,) = torch.autograd.grad(true_B1.sum(), images)
    target_BC, true_B1 = target_BC.detach(), true_B1.detach()

    def divergence(x_adv: Tensor, logits_BC: Tensor) -> Tensor:
        moved_B1 = true_B1 + spec.slope * (slope * (x_adv - x_nat)).flatten(1).sum(dim=1, keepdim=True)
        p_BC = target_BC.scatter(1, labels[:, None], moved_B1.clamp_min(1e-12))
        return F.kl_div(F.log_softmax(logits_BC, dim=1), p_BC, reduction="sum")

    return divergence


def at_least_float(values: Tensor) -> Tensor:
    """The values, but none in half precision."""
    return values if values.dtype == torch.float64 else values.float()


def _kl(log_target_BC: Tensor, logits_BC: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits_BC, dim=1), log_target_BC, reduction="sum", log_target=True)


Needed = TypeVar("Needed")


def _given(name: str, value: Needed | None, spec: AttackSpec) -> Needed:
    if value is None:
        raise ValueError(f"attack.loss: {spec.loss!r} needs {name}, and there is none")
    return value


# The functions of `objectives.ATTACK_LOSSES`.
_OBJECTIVES: dict[str, Callable[[Attacked, Tensor, Tensor, AttackSpec], Objective]] = {
    "ce": _cross_entropy,
    "kl": _divergence,
    "cw": _carlini_wagner,
    "dlr": _difference_of_logits_ratio,
    "kl-teacher": _divergence_from_teacher,
    "kl-teacher-moving": _divergence_from_moving_teacher,
    "kl-teacher-linear": _divergence_from_linear_teacher,
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
    """BatchNorm runs in that mode of `BN_MODES` inside, and all else in evaluation mode; each own comes back."""
    mode = bn_mode(name)
    modes = [(module, module.training) for module in model.modules()]
    release_cached(model)
    model.eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.training = mode.by_batch
    try:
        with nullcontext() if mode.tracked else running_statistics_stay(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
